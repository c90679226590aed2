"""Scores of entries as an importance of Torch-Pruning: sums over all that makes a channel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ip_plugin import interspace, set_masks
from ip_plugin.core.tensor_ref import prunable_tensors
from ip_plugin.errors import InvalidScoresError
from ip_plugin.methods import magnitude, movement

pytest.importorskip("torch_pruning")

import torch_pruning as tp

from ip_plugin.adapters.torch_pruning import pruner
from ip_plugin.adapters.torch_pruning.scores import ScoredImportance
from ip_plugin.adapters.torch_pruning.variety import VariedImportance


class Net(nn.Module):
    """Two convolutions into one sum, and a transposed one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(2, 4, 3, bias=False)
        self.right = nn.Conv2d(2, 4, 3, bias=False)
        self.up = nn.ConvTranspose2d(4, 6, 2)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.left(x) + self.right(x))).mean((2, 3))


X = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))
BATCHES = [(X, torch.tensor([0, 1, 1, 0]))]


def network(space: str) -> Any:
    torch.manual_seed(0)
    return interspace(Net(), basis="orthonormal") if space == "interspace" else Net()


@pytest.mark.parametrize("space", ["plain", "interspace"])
def test_a_channel_is_worth_the_sum_over_all_that_makes_it(space: str) -> None:
    model = network(space)
    scores = movement(model, BATCHES, nn.functional.cross_entropy)
    of = {layer.module_name: scores[layer.target] for layer in prunable_tensors(model)}
    sums = {
        "left": of["left"].flatten(1).sum(1) + of["right"].flatten(1).sum(1),
        "up": of["up"].sum((0, 2, 3)),  # (in, out, *kernel)
    }
    importance = ScoredImportance(model, scores)
    cutter: Any = pruner(tp.pruner.BasePruner, model, X[:1], importance=importance, ignored_layers=[model.head])
    for name, make in (("left", tp.prune_conv_out_channels), ("up", tp.prune_conv_out_channels)):
        group = cutter.DG.get_pruning_group(getattr(model, name), make, list(range(len(sums[name]))))
        torch.testing.assert_close(cutter.estimate_importance(group), sums[name])
    again: Any = pruner(
        tp.pruner.BasePruner, model, X[:1], importance=VariedImportance(importance), ignored_layers=[model.head],
        pruning_ratio=0.5,
    )  # fmt: skip
    again.step()
    assert (model.left.out_channels, model.right.out_channels, model.up.out_channels) == (2, 2, 3)


def test_entries_that_are_pruned_add_nothing() -> None:
    model = network("plain")
    mask = torch.ones_like(model.left.weight, dtype=torch.bool)
    mask[1] = False
    mask[2, 0] = False
    set_masks(model, {"left": mask})
    importance = ScoredImportance(model, magnitude(model))
    cutter: Any = pruner(tp.pruner.BasePruner, model, X[:1], importance=importance)
    group = cutter.DG.get_pruning_group(model.right, tp.prune_conv_out_channels, [0, 1, 2, 3])
    expected = (model.left.weight.abs() + model.right.weight.abs()).flatten(1).sum(1).detach()
    torch.testing.assert_close(cutter.estimate_importance(group), expected)


def test_what_was_not_scored_or_has_another_shape_by_now() -> None:
    model = network("plain")
    scores = magnitude(model)
    target = next(layer.target for layer in prunable_tensors(model) if layer.module_name == "up")
    importance = ScoredImportance(model, {target: scores[target]})
    graph = tp.DependencyGraph().build_dependency(model, X[:1])
    assert importance(graph.get_pruning_group(model.left, tp.prune_conv_out_channels, [0, 1])) is None
    group = graph.get_pruning_group(model.up, tp.prune_conv_out_channels, list(range(6)))
    torch.testing.assert_close(importance(group), scores[target].sum((0, 2, 3)))
    graph.get_pruning_group(model.up, tp.prune_conv_out_channels, [0]).prune()
    group = graph.get_pruning_group(model.up, tp.prune_conv_out_channels, list(range(5)))
    with pytest.raises(InvalidScoresError, match=r"\(4, 5, 2, 2\).*\n.*\(4, 6, 2, 2\)"):
        importance(group)
