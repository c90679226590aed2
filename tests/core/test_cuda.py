"""Converted models on a GPU; skipped where there is none."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from kinds import KINDS, every_kind
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ip_plugin import bake, interspace, load, masks, report, save
from ip_plugin.methods import RigL, magnitude, prune

pytestmark = [pytest.mark.contract, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def pruned(kind: str) -> tuple[nn.Sequential, Tensor]:
    plain, x = KINDS[kind].ready()
    return prune(interspace(plain, basis="orthonormal"), magnitude, sparsity=0.5), x


@every_kind
def test_a_gpu_computes_what_the_cpu_computes(kind: str, tmp_path: Path) -> None:
    model, x = pruned(kind)
    on_gpu = copy.deepcopy(model).double().cuda()
    expected = model.double()(x.double())
    torch.testing.assert_close(on_gpu(x.double().cuda()).cpu(), expected)
    assert all(mask.is_cuda and mask.dtype is torch.bool for mask in masks(on_gpu).values())
    fresh = interspace(KINDS[kind].ready()[0].double())
    fresh.load_state_dict(on_gpu.state_dict())  # to the CPU
    torch.testing.assert_close(fresh(x.double()), expected)
    assert report(on_gpu).prunable.nonzeros == report(model).prunable.nonzeros
    save(on_gpu, tmp_path / "model")
    loaded = load(KINDS[kind].ready()[0].double().cuda(), tmp_path / "model")
    torch.testing.assert_close(loaded(x.double().cuda()), on_gpu(x.double().cuda()))
    torch.testing.assert_close(bake(loaded)(x.double().cuda()).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_rigl_and_an_average(dtype: torch.dtype) -> None:
    model, x = KINDS["conv2d"].ready()
    x, target = x.cuda(), torch.arange(2, device="cuda")
    interspace(model.cuda().to(memory_format=torch.channels_last), sharing="model")
    average = AveragedModel(model, use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
    schedule = RigL(model, optimizer, sparsity=0.5, end_step=100, update_every=2)

    def loss() -> Tensor:
        with torch.autocast("cuda", dtype):
            return nn.functional.cross_entropy(model(x), target)

    first, before = float(loss().detach()), masks(model)
    for _ in range(12):
        optimizer.zero_grad()
        scaler.scale(loss()).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step(loss)
        average.update_parameters(model)
    assert float(loss().detach()) < first
    assert any(not torch.equal(mask, before[name]) for name, mask in masks(model).items())
    assert all(torch.equal(mask, masks(average.module)[name]) for name, mask in masks(model).items())
    kept = sum(int(mask.sum()) for mask in masks(model).values())
    assert kept == pytest.approx(0.5 * report(model).prunable.parameters, abs=len(masks(model)))


def test_a_captured_graph_computes_the_same_with_masks_of_ones_and_others() -> None:
    for sparsity in (0.0, 0.5):
        model, x = KINDS["conv2d"].ready()
        interspace(model.cuda())
        if sparsity:
            prune(model, magnitude, sparsity=sparsity)
        x = x.cuda()
        with torch.no_grad():
            expected = model(x)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = model(x)
            graph.replay()
        torch.testing.assert_close(out, expected)


def test_inductor_needs_no_new_graph_for_the_first_pruning() -> None:
    model, x = KINDS["conv2d"].ready()
    x = x.cuda()
    interspace(model.cuda())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)
    prune(model, magnitude, sparsity=0.5)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)
