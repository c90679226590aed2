"""A basis that several layers share is in a state dict once, and loads into all of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from ip_plugin import interspace
from ip_plugin.methods import magnitude, prune

pytestmark = pytest.mark.contract

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
LAYERS = ("0", "1.0", "1.1")


def network(seed: int = 0) -> nn.Sequential:
    """Three layers that share a basis, whose values are those of no named basis."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)), nn.Flatten(), nn.Linear(16, 3)
    )
    return interspace(model, basis=(torch.eye(9, device="cpu") + 0.3 * torch.rand(9, 9, device="cpu")), sharing="model")


def shared(model: nn.Module) -> bool:
    bases = {id(model.get_submodule(f"{name}.parametrizations.weight.0").basis) for name in LAYERS}
    return len(bases) == 1


def with_keys(model: nn.Module, *layers: str) -> dict[str, Tensor]:
    """The state dict with the basis under the keys of these layers."""
    state = {key: value for key, value in model.state_dict().items() if not key.endswith(".basis")}
    basis = model[0].parametrizations.weight[0].basis.detach()
    return state | {f"{name}.parametrizations.weight.0.basis": basis.clone() for name in layers}


def test_it_is_stored_once_also_for_a_part_of_the_model() -> None:
    model = network()
    for part, owner in ((model, "0."), (model[1], "0."), (model[1][1], ""), (model[1][1].parametrizations, None)):
        keys = [key for key in part.state_dict(keep_vars=True) if key.endswith("basis")]
        assert keys == ["weight.0.basis" if owner is None else f"{owner}parametrizations.weight.0.basis"]
    both: dict[str, Any] = {}
    model[1].state_dict(destination=both, prefix="a.")
    model[1].state_dict(destination=both, prefix="b.")
    assert [key for key in both if key.endswith("basis")] == ["a.0.parametrizations.weight.0.basis"]
    own = interspace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)))
    assert sum(key.endswith("basis") for key in own.state_dict()) == 2
    with torch.device("meta"):
        assert sum(key.endswith("basis") for key in network().state_dict()) == 1
        own = interspace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)))
        assert sum(key.endswith("basis") for key in own.state_dict()) == 2


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("layers", [("0",), ("1.0",), ("1.1",), LAYERS], ids=" ".join)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_any_of_its_keys_is_enough(device: str, layers: tuple[str, ...], assign: bool) -> None:
    model = network()
    for _ in range(2):  # a second call must not remember the first
        if device == "meta" and not assign:
            continue
        with torch.device(device):
            fresh = network(1)
        result = fresh.load_state_dict(with_keys(model, *layers), strict=True, assign=assign)
        assert not result.missing_keys and not result.unexpected_keys
        assert shared(fresh) and torch.equal(fresh(X), model(X))
        assert sum(name.endswith("basis") for name, _ in fresh.named_parameters()) == 1
        fresh.load_state_dict(with_keys(model, *layers), strict=True, assign=assign)


def test_a_state_dict_without_it_lacks_it_for_every_layer() -> None:
    model = network()
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.para.*basis".*"1\.0\.para.*basis".*"1\.1\.para.*basis"'):
        model.load_state_dict(with_keys(model))
    part = network(1)[1]
    part.load_state_dict(model[1].state_dict(), strict=True)
    assert torch.equal(part[1].weight, model[1][1].weight)


def test_layers_that_share_none_lack_theirs() -> None:
    own = interspace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)))
    state = own.state_dict()
    del state["1.parametrizations.weight.0.basis"]
    assert own.load_state_dict(state, strict=False).missing_keys == ["1.parametrizations.weight.0.basis"]


@pytest.mark.parametrize("masked", [False, True])
def test_safetensors(tmp_path: Path, masked: bool) -> None:
    model, fresh, again = network(), network(1), network(2)
    if masked:
        for each in (model, fresh, again):
            prune(each, magnitude, sparsity=0.5)
    save_model(model, str(tmp_path / "model"))
    save_file(model.state_dict(), tmp_path / "state")
    assert load_model(fresh, tmp_path / "model", strict=True) == (set(), [])
    again.load_state_dict(load_file(tmp_path / "state"), strict=True)
    for loaded in (fresh, again):
        assert torch.equal(loaded(X), model(X)) and shared(loaded)


def test_an_average_of_state_dicts_moves_it_once() -> None:
    model, average = network(), network(1)
    before = average[0].parametrizations.weight[0].basis.detach().clone()
    with torch.no_grad():  # as timm's ModelEmaV2
        for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            mean.copy_(0.5 * mean + 0.5 * value)
    moved = average[0].parametrizations.weight[0].basis
    torch.testing.assert_close(moved, 0.5 * before + 0.5 * model[0].parametrizations.weight[0].basis)


def test_transformers_and_accelerate(tmp_path: Path) -> None:
    transformers, accelerate = pytest.importorskip("transformers"), pytest.importorskip("accelerate")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    plain = transformers.ResNetForImageClassification(config).eval()
    x = torch.randn(1, 3, 32, 32)
    models = []
    for _ in range(3):
        models.append(interspace(copy.deepcopy(plain), basis="orthonormal", sharing="model"))
        for parameter in plain.parameters():
            nn.init.normal_(parameter, std=0.1)
    first, second, third = models
    first.save_pretrained(tmp_path)
    second.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(second(x).logits, first(x).logits)
    accelerate.Accelerator().save_model(second, tmp_path / "accelerate")
    accelerate.load_checkpoint_in_model(third, tmp_path / "accelerate", strict=True)
    assert torch.equal(third(x).logits, first(x).logits)
