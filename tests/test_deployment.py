"""Pruned models are stored and exported by torch's own means: state dicts, pickles, torch.export, ONNX."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path

import pytest
import torch
from checkpoint_workers import pruned, small
from torch import Tensor, nn

from ip_plugin import bake, load, save

SPACES = pytest.mark.parametrize("space", ["spatial", "interspace", "host"])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 9, 9)


def baked(space: str, tmp_path: Path) -> tuple[nn.Module, nn.Module]:
    """A pruned model, and one that was loaded from its compressed checkpoint and baked."""
    model = pruned(space).eval()
    save(model, tmp_path / "model")
    return model, bake(load(small().eval(), tmp_path / "model"))


@SPACES
def test_state_dicts_and_pickles(space: str, tmp_path: Path, x: Tensor) -> None:
    model, plain = baked(space, tmp_path)
    pruned_again = pruned(space).eval()
    pruned_again.load_state_dict(model.state_dict())
    assert torch.equal(pruned_again(x), model(x))
    torch.save(plain, tmp_path / "pickled")
    again = torch.load(tmp_path / "pickled", weights_only=False)
    assert torch.equal(again(x), model(x))
    other = small().eval()
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other(x), model(x))
    if space != "host":  # the host's pruned models cannot be copied once they have run
        torch.save(bake(copy.deepcopy(model)), tmp_path / "copied")
        assert torch.equal(torch.load(tmp_path / "copied", weights_only=False)(x), model(x))


@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_exported_programs(space: str, tmp_path: Path, x: Tensor) -> None:
    model, plain = baked(space, tmp_path)
    program = torch.export.export(plain, (x,))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    assert torch.allclose(loaded(x), model(x), atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_traces(space: str, x: Tensor) -> None:
    model = pruned(space).eval()
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(torch.jit.freeze(traced)(x), model(x))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x))


@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_onnx(space: str, tmp_path: Path, x: Tensor) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, plain = baked(space, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The newer exporter of torch 2.5 does not go with today's onnxscript.
        torch.onnx.export(plain, (x,), str(tmp_path / "model.onnx"), dynamo=torch.__version__ >= "2.6")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert (torch.from_numpy(outputs) - model(x)).abs().max() <= 1e-5
