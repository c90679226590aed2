"""State dicts of pruned models in models that were built and converted anew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kinds import KINDS, every_kind
from torch import Tensor, nn
from torch.nn.utils import prune as host

from ip_plugin import bake, interspace, masks, prunable, set_masks
from ip_plugin.adapters import torch_prune as prune
from ip_plugin.errors import MaskError
from ip_plugin.methods import magnitude
from ip_plugin.methods import prune as prune_by_score

pytestmark = pytest.mark.contract


def other(model: nn.Module) -> nn.Module:
    """A copy with other values."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(torch.rand_like(parameter))
    return copied


def by_score(model: nn.Module) -> None:
    prune_by_score(model, magnitude, sparsity=0.5)


def by_the_host(model: nn.Module) -> None:
    prune.global_unstructured(prunable(model), prune.L1Unstructured, amount=0.5)


def by_the_hosts_own_function(model: nn.Module) -> None:
    host.l1_unstructured(model[4], "weight", amount=0.5)  # type: ignore[index]


def not_at_all(model: nn.Module) -> None:
    """Leave it as it is."""


WAYS = [by_score, by_the_host, by_the_hosts_own_function, not_at_all]


@every_kind
@pytest.mark.parametrize("pruned", WAYS)
def test_a_fresh_converted_model_loads_any_state_of_the_architecture(
    kind: str, pruned: Callable[[nn.Module], None]
) -> None:
    plain, x = KINDS[kind].ready()
    saved = interspace(copy.deepcopy(plain), basis="orthonormal")
    pruned(saved)
    for prunes_before in (not_at_all, by_score, by_the_hosts_own_function):
        for strict in (True, False):
            fresh = interspace(other(plain))
            prunes_before(fresh)
            fresh.load_state_dict(saved.state_dict(), strict=strict)
            torch.testing.assert_close(fresh(x), saved(x), rtol=0, atol=0)
            mine, theirs = masks(fresh), masks(saved)
            assert all(torch.equal(mask, theirs.get(name, torch.ones_like(mask))) for name, mask in mine.items())
            assert all(bool(mask.all()) for name, mask in theirs.items() if name not in mine)
            torch.testing.assert_close(bake(fresh)(x), saved(x))


def test_states_of_plain_models_load_too() -> None:
    plain, x = KINDS["conv2d"].ready()
    fresh = interspace(other(plain))
    fresh.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(fresh(x), plain(x))
    host.l1_unstructured(plain[4], "weight", amount=0.5)
    fresh.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(fresh(x), plain(x))
    assert int((~masks(fresh)["4"]).sum()) == round(plain[4].weight.numel() / 2)  # type: ignore[operator, union-attr]


def test_through_a_file_without_pickled_classes(tmp_path: Path) -> None:
    plain, x = KINDS["conv2d"].ready()
    saved = interspace(copy.deepcopy(plain))
    by_score(saved)
    torch.save(saved.state_dict(), tmp_path / "state.pt")
    fresh = interspace(other(plain))
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True, assign=True)
    assert torch.equal(fresh(x), saved(x))
    assert {type(mask) for mask in torch.load(tmp_path / "state.pt").values()} == {Tensor}


def test_a_model_of_the_meta_device_loads_too() -> None:
    plain, x = KINDS["conv2d"].ready()
    saved = interspace(copy.deepcopy(plain))
    by_score(saved)
    for assign in (False, True):
        with torch.device("meta"):
            fresh = interspace(KINDS["conv2d"].layers()[0])
        if not assign:
            fresh.to_empty(device="cpu")
            assert bool(fresh.parametrizations.weight[0].mask.all())  # type: ignore[union-attr, index]
        state = {key.removeprefix("0."): value for key, value in saved.state_dict().items() if key.startswith("0.")}
        fresh.load_state_dict(state, strict=True, assign=assign)
        assert torch.equal(fresh(x), saved[0](x))


def test_a_state_from_before_the_pruning_takes_the_masks_away() -> None:
    model, x = KINDS["conv2d"].ready()
    interspace(model)
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    by_score(model)
    model.load_state_dict(before, strict=True)
    assert masks(model) == {} or all(bool(mask.all()) for mask in masks(model).values())
    assert torch.equal(model(x), expected)


def test_the_hosts_own_function_prunes_a_linear_layer_by_its_weight() -> None:
    model, _ = KINDS["conv2d"].ready()
    interspace(model)
    expected = model[4].weight.detach().clone()
    parameter = model[4].parametrizations.weight.original
    assert int((~host.l1_unstructured(model[4], "weight", amount=5).weight_mask.bool()).sum()) == 5
    assert model[4].weight_orig is parameter
    assert torch.equal(model[4].weight, expected * model[4].weight_mask)
    assert list(masks(model)) == ["4"]
    host.remove(model[4], "weight")
    assert masks(model) == {} and model[4].weight is parameter


def test_the_hosts_own_function_is_told_where_coefficients_are() -> None:
    model, _ = KINDS["conv2d"].ready()
    interspace(model)
    set_masks(model, {"4": torch.rand(model[4].weight.shape) < 0.5})
    for layer in (model[0], model[4]):  # in the interspace, and masked
        with pytest.raises(MaskError, match="ip_plugin.prunable"):
            host.l1_unstructured(layer, "weight", amount=5)
    host.l1_unstructured(model[0].parametrizations.weight, "original", amount=5)
    assert int((~masks(model)["0"]).sum()) == 5
