"""Scores of single entries as an importance of Torch-Pruning: `ScoredImportance`."""

from __future__ import annotations

import math
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn

from ip_plugin.core.tensor_ref import prunable_tensors
from ip_plugin.errors import InvalidScoresError
from ip_plugin.methods import Scores

from .variety import made_by


class ScoredImportance(tp.importance.Importance):  # type: ignore[misc]  # the host has no types
    """The importance of a channel: the sum of the scores of all entries that make it, in every layer of its group.

    For one step of a pruner: afterwards tensors have other shapes. Entries that are pruned add nothing.

    Args:
        model: the model that was scored, and is cut.
        scores: of `ip_plugin.methods`, for example `movement`.

    >>> import torch
    >>> from ip_plugin.adapters.torch_pruning import pruner
    >>> from ip_plugin.methods import movement
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 2, 3), nn.Flatten())
    >>> batches = [(torch.rand(4, 3, 5, 5), torch.tensor([0, 1, 1, 0]))]
    >>> importance = ScoredImportance(model, movement(model, batches, nn.functional.cross_entropy))
    >>> cutter = pruner(tp.pruner.BasePruner, model, torch.zeros(1, 3, 5, 5), importance=importance,
    ...                 pruning_ratio=0.5, ignored_layers=[model[2]])
    >>> cutter.step()
    >>> model[0].out_channels
    8
    """

    def __init__(self, model: nn.Module, scores: Scores) -> None:
        self.scores = {
            layer.module: scores[layer.target] for layer in prunable_tensors(model) if layer.target in scores
        }

    def __call__(self, group: Any) -> Tensor | None:
        """One number for each channel of a group; None if no layer that was scored makes them."""
        rows = made_by(group, len(group[0].idxs), self._of)
        return None if rows is None else rows.sum(dim=1)

    def _of(self, module: nn.Module) -> Tensor | None:
        scores = self.scores.get(module)
        if scores is None:
            return None
        weight: Any = module.weight
        if scores.shape != weight.shape:
            raise InvalidScoresError("weight", weight.shape, scores.shape)
        return scores.masked_fill(scores == -math.inf, 0)
