"""Filter variety with Torch-Pruning: as many channels go as before, but redundant ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ip_plugin import bake, interspace, masks, set_masks
from ip_plugin.errors import AmountError, ArgumentError
from ip_plugin.methods.filter_variety import removal_order

pytest.importorskip("torch_pruning")

import torch_pruning as tp

from ip_plugin.adapters.shared.plain_view import kernels
from ip_plugin.adapters.torch_pruning import plain_layers, pruner
from ip_plugin.adapters.torch_pruning.variety import VariedImportance

SPACES = ["plain", "interspace"]


class Net(nn.Module):
    """A residual sum of two convolutions, and a depthwise and a transposed one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.branch = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.branch(x))
        return self.head(torch.relu(self.up(self.depthwise(x))))


X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def network(space: str) -> Net:
    torch.manual_seed(0)
    model = Net().double()
    return interspace(model, basis="orthonormal") if space == "interspace" else model


def cut(model: nn.Module, importance: Any, **options: Any) -> Any:
    options = {"pruning_ratio": 0.5, "ignored_layers": [model.head], **options}  # type: ignore[dict-item]
    cutter = pruner(tp.pruner.BasePruner, model, X.double(), importance=importance, **options)
    cutter.step()
    return cutter


def shapes(model: Any) -> list[int]:
    return [model.stem.out_channels, model.branch.out_channels, model.up.out_channels]


@pytest.mark.parametrize("space", SPACES)
def test_a_rare_filter_stays_and_the_weaker_copies_go(space: str) -> None:
    model = network(space)
    bake(model)
    with torch.no_grad():
        copies = torch.randn(3, 3, 3, 3).double()
        weight = torch.cat([copies * 3, copies * 2, torch.randn(2, 3, 3, 3).double() * 0.1])
        model.stem.weight.copy_(weight)
        for layer in (model.branch, model.depthwise):
            layer.weight.zero_()
    if space == "interspace":
        interspace(model, basis="orthonormal")
    by_magnitude, varied = copy.deepcopy(model), model
    magnitude = tp.importance.GroupMagnitudeImportance(p=2, normalizer=None)
    options = {"pruning_ratio_dict": {model.up: 0.0}, "pruning_ratio": 3 / 8}
    cut(by_magnitude, magnitude, **{**options, "pruning_ratio_dict": {by_magnitude.up: 0.0}})
    cut(varied, VariedImportance(magnitude), **options)
    assert shapes(by_magnitude) == shapes(varied) == [5, 5, 6]
    torch.testing.assert_close(bake(varied).stem.weight, torch.cat([weight[:3], weight[6:]]))
    assert bake(by_magnitude).stem.weight.flatten(1).norm(dim=1).min() > 1  # both rare ones have gone


@pytest.mark.parametrize("options", [{}, {"global_pruning": True}, {"global_pruning": True, "isomorphic": True}])
@pytest.mark.parametrize("space", SPACES)
def test_every_group_loses_as_many_channels_as_before(space: str, options: dict[str, Any]) -> None:
    for importance in (tp.importance.GroupMagnitudeImportance(p=1), tp.importance.LAMPImportance()):
        model, reference = network(space), network(space)
        cut(model, VariedImportance(importance), **options)
        cut(reference, importance, **options)
        assert shapes(model) == shapes(reference)
        assert model(X.double()).isfinite().all()


def test_both_spaces_cut_the_same_channels() -> None:
    histories = [
        cut(network(space), VariedImportance(tp.importance.GroupMagnitudeImportance(p=2))).pruning_history()
        for space in SPACES
    ]
    assert histories[0] == histories[1] != []


def test_coupled_channels_are_compared_by_all_their_kernels() -> None:
    model = network("plain")
    with torch.no_grad():  # only the depthwise kernels tell channels apart
        model.stem.weight.copy_(model.stem.weight[:1].expand_as(model.stem.weight))
        model.branch.weight.copy_(model.branch.weight[:1].expand_as(model.branch.weight))
        model.depthwise.weight.mul_(10)
    scores = torch.rand(8, dtype=torch.float64)
    filters = torch.cat([w.detach().flatten(1) for w in (model.stem.weight, model.branch.weight,
                                                        model.depthwise.weight)], 1)  # fmt: skip
    graph = tp.DependencyGraph().build_dependency(model, X.double())
    (group,) = [each for each in graph.get_all_groups() if any(i.dep.target.module is model.branch for i in each.items)]
    reassigned = VariedImportance(lambda _: scores)(group)
    assert reassigned is not None
    assert reassigned.argsort().tolist() == removal_order(scores, filters).tolist() != scores.argsort().tolist()
    assert torch.equal(reassigned.sort().values, scores.sort().values)


@pytest.mark.parametrize("calls", ["a pruner", "by hand"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("similarity", ["coefficients", "weights"])
def test_coefficients_or_kernels_are_compared(similarity: Any, masked: bool, calls: str) -> None:
    """In a skewed basis filters whose coefficients differ make kernels that are alike."""
    torch.manual_seed(0)
    basis = (torch.eye(9) + 0.8 * torch.rand(9, 9)).double()
    basis[4] = 0
    model: Any = nn.Sequential(nn.Conv2d(2, 16, 3, bias=False), nn.Conv2d(16, 2, 1)).double()
    interspace(model, basis=torch.eye(9).double(), constraint="none")
    with torch.no_grad():
        model[0].parametrizations.weight[0].basis.copy_(basis)
    if masked:
        set_masks(model, {"0": torch.rand(16, 2, 3, 3) > 0.4})
    kept = masks(model).get("0", torch.ones(()))
    coefficients = model[0].parametrizations.weight.original.detach() * kept * basis.norm(dim=1).reshape(1, 1, 3, 3)
    scores = torch.arange(16.0).double()
    by = {"coefficients": coefficients, "weights": model[0].weight.detach()}
    expected = {name: removal_order(scores, filters).tolist() for name, filters in by.items()}
    assert expected["coefficients"] != expected["weights"]
    importance = VariedImportance(lambda *_: scores, similarity=similarity)
    x = torch.zeros(1, 2, 5, 5).double()
    if calls == "a pruner":
        cutter: Any = pruner(tp.pruner.BasePruner, model, x, importance=importance)
        group = cutter.DG.get_pruning_group(model[0], tp.prune_conv_out_channels, list(range(16)))
        reassigned = cutter.estimate_importance(group)
    else:
        with plain_layers(model):
            graph = tp.DependencyGraph().build_dependency(model, x)
            group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, list(range(16)))
            reassigned = importance(group)
    assert reassigned.argsort().tolist() == expected[similarity]


def test_kernels_of_a_layer_exposed_and_not() -> None:
    model = network("interspace")
    whole = model.stem.weight.detach()
    assert torch.equal(kernels(model.stem), whole) and torch.equal(kernels(model.head), model.head.weight)
    with plain_layers(model):
        assert not torch.allclose(model.stem.weight, whole)
        torch.testing.assert_close(kernels(model.stem), whole)
    assert torch.equal(kernels(model.stem), whole)


def test_no_strength_is_the_importance_alone() -> None:
    importance = tp.importance.GroupMagnitudeImportance(p=1)
    alone, without, varied = (
        cut(network("plain"), each).pruning_history()
        for each in (importance, VariedImportance(importance, strength=0), VariedImportance(importance))
    )
    assert without == alone != varied


@pytest.mark.parametrize("space", SPACES)
def test_the_hessian_importance_is_reached_through_it(space: str) -> None:
    model = network(space)
    inner = tp.importance.GroupHessianImportance()
    importance = copy.deepcopy(VariedImportance(inner))
    for loss in model(X.double()).flatten()[:4]:
        model.zero_grad()
        loss.backward(retain_graph=True)
        importance.accumulate_grad(model)
    cut(model, importance)
    assert shapes(model) == [4, 4, 3]


def test_gradients_that_an_importance_has_gathered_are_read_in_their_own_gauge() -> None:
    found = []
    for wrap in (False, True):
        model = network("interspace")
        with torch.no_grad():
            for layer in (model.stem, model.branch):
                layer.parametrizations.weight[0].basis.mul_(torch.logspace(-1, 1, 9).double()[:, None])
        inner = tp.importance.GroupHessianImportance()
        for loss in model(X.double()).flatten()[:4]:
            model.zero_grad()
            loss.backward(retain_graph=True)
            inner.accumulate_grad(model)
        cutter = pruner(
            tp.pruner.BasePruner, model, X.double(), importance=VariedImportance(inner, 0) if wrap else inner
        )
        group = cutter.DG.get_pruning_group(model.branch, tp.prune_conv_out_channels, list(range(8)))
        found.append(cutter.estimate_importance(group))
    torch.testing.assert_close(found[0], found[1])


def test_grouped_transposed_filters() -> None:
    from ip_plugin.adapters.torch_pruning.variety import made_by

    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    graph = tp.DependencyGraph().build_dependency(nn.Sequential(layer, nn.Conv2d(6, 2, 1)), torch.zeros(1, 4, 5, 5))
    (group,) = [g for g in graph.get_all_groups() if g[0].dep.target.module is layer]
    found = made_by(group, 6, lambda module: module.weight.detach())
    assert found is not None
    # Output 4 is the second of the second group: it reads inputs 2 and 3.
    torch.testing.assert_close(found[4], layer.weight.detach()[2:4, 1].flatten())


def test_a_strength_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(AmountError, match="'much'"):
        VariedImportance(tp.importance.RandomImportance(), "much")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="coefficients or weights"):
        VariedImportance(tp.importance.RandomImportance(), similarity="both")  # type: ignore[arg-type]
