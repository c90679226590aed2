"""Filter variety with torch.nn.utils.prune: as many slices go as before, but redundant ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as host

from ip_plugin import interspace, masks, set_masks
from ip_plugin.adapters import torch_prune
from ip_plugin.adapters.torch_prune import variety as prune
from ip_plugin.errors import AmountError, ArgumentError, ScoreError
from ip_plugin.methods.filter_variety import removal_order

SPACES = ["plain", "interspace"]


def copies(space: str = "plain", dim: int = 0) -> nn.Sequential:
    """Three copies of one filter, of norms 3, 1 and 2, and a small rare one orthogonal to it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False) if dim == 0 else nn.Conv2d(4, 2, 3, bias=False))
    kernel, rare = torch.randn(2, 2, 3, 3)
    kernel /= kernel.norm()
    rare -= (rare * kernel).sum() * kernel
    rare /= 10 * rare.norm()
    with torch.no_grad():
        model[0].weight.copy_(torch.stack([3 * kernel, kernel, 2 * kernel, rare], dim=dim))
    return interspace(model, basis="orthonormal") if space == "interspace" else model


def left(model: nn.Module, dim: int = 0) -> list[int]:
    """Of each slice 1 if it is left; all of it is, or nothing."""
    slices = masks(model)["0"].movedim(dim, 0).flatten(1)
    assert (slices.all(dim=1) == slices.any(dim=1)).all()
    return slices[:, 0].int().tolist()


@pytest.mark.parametrize("similarity", ["coefficients", "weights"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("space", SPACES)
def test_the_rare_filter_stays_and_the_weakest_copies_go(space: str, dim: int, similarity: Any) -> None:
    for amount, expected, without in (
        (1, [1, 0, 1, 1], [1, 1, 1, 0]),
        (2, [1, 0, 0, 1], [1, 0, 1, 0]),
        (0.5, [1, 0, 0, 1], [1, 0, 1, 0]),
        (3, [1, 0, 0, 0], [1, 0, 0, 0]),
        (1.0, [0, 0, 0, 0], [0, 0, 0, 0]),
    ):
        model, alone, hosts = copies(space, dim), copies(space, dim), copies(space, dim)
        assert prune.ln_structured(model[0], "weight", amount, 2, dim, similarity=similarity) is model[0]
        prune.ln_structured(alone[0], "weight", amount, 2, dim, strength=0, similarity=similarity)
        torch_prune.ln_structured(hosts[0], "weight", amount, 2, dim)
        assert (left(model, dim), left(alone, dim), left(hosts, dim)) == (expected, without, without), amount
    nothing = copies(space, dim)
    prune.ln_structured(nothing[0], "weight", 0, 2, dim)
    assert not masks(nothing) or all(mask.all() for mask in masks(nothing).values())


@pytest.mark.parametrize("space", SPACES)
def test_at_random_the_rare_filter_stays(space: str) -> None:
    found = set()
    for seed in range(20):
        model = copies(space)
        torch.manual_seed(seed)
        assert prune.random_structured(model[0], "weight", 2) is model[0]
        assert left(model)[3] == 1 and sum(left(model)) == 2
        found.add(tuple(left(model)))
    assert len(found) == 3
    strengthless = set()
    for seed in range(20):
        model = copies(space)
        torch.manual_seed(seed)
        prune.random_structured(model[0], "weight", 2, strength=0)
        strengthless.add(left(model)[3])
    assert strengthless == {0, 1}


@pytest.mark.parametrize("space", SPACES)
def test_own_scores_decide_within_copies(space: str) -> None:
    scores = torch.ones(4, 2, 3, 3) * torch.tensor([1.0, 4.0, 3.0, 0.1]).reshape(4, 1, 1, 1)
    model = copies(space)
    prune.ln_structured(model[0], "weight", 2, 1, importance_scores=scores)
    assert left(model) == [0, 1, 0, 1]
    model = copies(space)
    given = prune.varied_scores(model[0], "weight", torch.tensor([-1.0, 4.0, 3.0, -2.0]))
    assert given.shape == (4, 2, 3, 3) and given.is_contiguous()
    # Removed 0, 2, and of the orthogonal two that are left the one of the lower score, 3.
    assert given[:, 0, 0, 0].tolist() == [2.0, 5.0, 3.0, 4.0]
    assert all((slice_ == slice_.flatten()[0]).all() for slice_ in given)
    for n in (1, 2, math.inf, -math.inf):
        model = copies(space)
        torch_prune.ln_structured(model[0], "weight", 2, n, 0, importance_scores=given)
        assert left(model) == [0, 1, 0, 1]


def test_the_hosts_own_functions_take_the_scores() -> None:
    model = copies()
    host.ln_structured(model[0], "weight", 2, 1, 0, prune.varied_scores(model[0], "weight", torch.arange(4.0)))
    assert left(model) == [0, 0, 1, 1]


@pytest.mark.parametrize("by", ["ours", "the host"])
@pytest.mark.parametrize("space", SPACES)
def test_what_is_pruned_stays_so_and_is_compared_with_nothing(space: str, by: str) -> None:
    """Filter 0 is masked: of the copies 1 and 2 the weaker goes, then of 2 and 3 neither has a copy."""
    model = copies(space)
    mask = torch.ones(4, 2, 3, 3, dtype=torch.bool)
    mask[0] = False
    if by == "ours":
        set_masks(model, {"0": mask})
    else:
        where = (model[0].parametrizations.weight, "original") if space == "interspace" else (model[0], "weight")
        host.custom_from_mask(*where, mask=mask)
    assert prune.varied_scores(model[0], "weight", torch.arange(4.0))[:, 0, 0, 0].tolist() == [1.0, 2.0, 3.0, 4.0]
    prune.ln_structured(model[0], "weight", 1 / 3, 2)  # of the three that are left
    assert left(model) == [0, 0, 1, 1]
    prune.ln_structured(model[0], "weight", 1, 2)
    assert left(model) == [0, 0, 1, 0]
    prune.ln_structured(model[0], "weight", 1.0, 2)
    assert left(model) == [0, 0, 0, 0]
    assert (prune.varied_scores(model[0], "weight", torch.arange(4.0)) == 1).all()


def test_filters_are_compared_without_their_masked_entries() -> None:
    """By what is left the first two are alike and the first is the weaker one; by all entries neither holds."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 0.0, 20.0, 0.0], [2.0, 0.1, 0.0, 9.0], [0.0, 0.5, 20.0, 0.0]])
    set_masks(model, {"0": torch.tensor([[True, True, False, False]] * 3)})
    prune.ln_structured(model[0], "weight", 1, 1)
    assert masks(model)["0"].tolist() == [[False] * 4, [True, True, False, False], [True, True, False, False]]


def test_coefficients_are_read_in_unit_gauge() -> None:
    orders = []
    for basis in (torch.eye(9), torch.eye(9) * torch.logspace(-2, 2, 9)[:, None]):
        torch.manual_seed(1)
        model = interspace(nn.Conv2d(3, 12, 3), basis=basis)
        prune.ln_structured(model, "weight", 6, 1)
        orders.append(masks(model)[""].flatten(1).any(1).tolist())
    assert orders[0] == orders[1] and sum(orders[0]) == 6


@pytest.mark.parametrize("similarity", ["coefficients", "weights"])
def test_coefficients_or_kernels_are_compared(similarity: Any) -> None:
    """In a skewed basis filters whose coefficients differ make kernels that are alike."""
    torch.manual_seed(0)
    model = interspace(nn.Conv2d(2, 16, 3, bias=False), basis=torch.eye(9) + 0.8 * torch.rand(9, 9))
    space: Any = model.parametrizations.weight[0]
    norms = space.basis.detach().norm(dim=1).reshape(1, 1, 3, 3)
    found = model.parametrizations.weight.original.detach() * norms
    by = {"coefficients": found.flatten(1), "weights": model.weight.detach().flatten(1)}
    scores = found.flatten(1).abs().sum(1)
    orders = {name: removal_order(scores, filters).tolist() for name, filters in by.items()}
    assert orders["coefficients"][:8] != orders["weights"][:8]
    prune.ln_structured(model, "weight", 8, 1, similarity=similarity)
    gone = (~masks(model)[""].flatten(1).any(1)).nonzero().squeeze(1).tolist()
    assert gone == sorted(orders[similarity][:8])


def test_other_tensors_and_precisions() -> None:
    layer = nn.LSTM(4, 4)
    prune.ln_structured(layer, "weight_hh_l0", 6, 2)
    assert int((layer.weight_hh_l0 == 0).all(dim=1).sum()) == 6
    wide = nn.Linear(8, 600, bias=False).to(torch.bfloat16)
    prune.ln_structured(wide, "weight", 300, 2)
    assert int((wide.weight == 0).all(dim=1).sum()) == 300 and wide.weight.dtype == torch.bfloat16


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dim 2": ({"dim": 2}, ArgumentError, r"dimension 0 or 1.*\n.*dim 2 of 'weight'"),
    "dim -1": ({"dim": -1}, ArgumentError, "dim -1"),
    "a vector": ({"name": "bias"}, ArgumentError, r"'bias', shape \(4,\)"),
    "strength": ({"strength": 2.0}, AmountError, "2.0"),
    "similarity": ({"similarity": "kernels"}, ArgumentError, "coefficients or weights.*\n.*'kernels'"),
    "amount": ({"amount": 5}, AmountError, "5"),
    "scores": ({"importance_scores": torch.ones(4)}, ScoreError, r"shape \(4,\)"),
    "NaN": ({"importance_scores": torch.full((4, 2, 3, 3), torch.nan)}, ScoreError, "NaN"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused_and_changes_nothing(name: str) -> None:
    changed, error, text = BAD[name]
    model = interspace(nn.Conv2d(2, 4, 3))
    with pytest.raises(error, match=text):
        prune.ln_structured(model, **{"name": "weight", "amount": 1, "n": 2, **changed})
    assert not masks(model)
    with pytest.raises(ScoreError, match=r"scores \(3,\), 4 slices along 0"):
        prune.varied_scores(model, "weight", torch.ones(3))
    with pytest.raises(ArgumentError, match="dim 3"):
        prune.random_structured(model, "weight", 1, dim=3)


def test_it_prunes_as_many_as_the_host() -> None:
    for amount in (0.1, 0.3, 0.5, 0.77, 5):
        counts = []
        for functions in (prune, torch_prune):
            torch.manual_seed(0)
            layer: Any = nn.Conv2d(3, 13, 3)
            for _ in range(2):
                functions.ln_structured(layer, "weight", amount, 1, 0)  # type: ignore[attr-defined]
            kept: Tensor = layer.weight_mask
            counts.append(int(kept.sum()))
        assert counts[0] == counts[1]
