"""Filter variety for any importance of Torch-Pruning: `VariedImportance`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from ip_plugin.core.gauge import Similarity
from ip_plugin.core.tensor_ref import output_filters
from ip_plugin.methods.filter_variety import check_similarity, check_strength, varied

from ..shared.plain_view import kernels


class VariedImportance(tp.importance.Importance):  # type: ignore[misc]  # the host has no types
    """An importance that takes redundant filters first, and leaves rare ones; see `ip_plugin.methods.filter_variety`.

    Of every group as many channels go as before, but others. Channels that are coupled (residual sums) are compared
    by all the kernels that make them, as one filter.

    Args:
        importance: any importance of the host, or a function of a group.
        strength: 1: redundancy decides, the importance only between two that are alike; 0: the importance alone.
        similarity: whether coefficients are compared, in unit gauge, or the kernels that they make.

    Raises:
        InvalidVarietyError: the strength is none, or the similarity.

    >>> from torch import nn
    >>> from ip_plugin.adapters.torch_pruning import pruner
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    >>> importance = VariedImportance(tp.importance.GroupMagnitudeImportance(p=1))
    >>> cutter = pruner(tp.pruner.BasePruner, model, torch.zeros(1, 3, 8, 8), importance=importance,
    ...                 pruning_ratio=0.5, ignored_layers=[model[2]])
    >>> cutter.step()
    >>> model[0]
    Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
    """

    def __init__(
        self,
        importance: Callable[..., Tensor | None],
        strength: float = 1.0,
        similarity: Similarity = "coefficients",
    ) -> None:
        check_strength(strength)
        check_similarity(similarity)
        self.importance, self.strength, self.similarity = importance, strength, similarity

    def __call__(self, group: Any, *args: Any, **kwargs: Any) -> Tensor | None:
        """The importances of a group, dealt out anew."""
        scores = self.importance(group, *args, **kwargs)
        values = kernels if self.similarity == "weights" else _weight
        filters = None if scores is None else made_by(group, len(scores), values)
        if scores is None or filters is None:
            return scores
        return varied(scores, filters, self.strength)

    def __getattr__(self, name: str) -> Any:
        """What else the importance has (``accumulate_grad`` of the Hessian one)."""
        if name == "importance":  # not there yet: this is being copied
            raise AttributeError(name)
        return getattr(self.importance, name)


def made_by(group: Any, count: int, values: Callable[[nn.Module], Tensor | None]) -> Tensor | None:
    """Values of all kernels that make the channels of a group, one row for each channel; None if there are none.

    Args:
        group: the host's.
        count: of its channels.
        values: of a layer, shaped as its weight; None for a layer that does not count.
    """
    rows: list[Tensor] = []
    for item in group.items:
        layer = item.dep.target.module
        if item.dep.handler not in MAKERS or None in item.root_idxs:
            continue
        found = values(layer)
        if found is not None:
            made = output_filters(layer, found)[item.idxs]
            row = torch.zeros(count, made.shape[1], dtype=made.dtype, device=made.device)
            row[item.root_idxs] = made
            rows.append(row)
    return torch.cat(rows, dim=1) if rows else None


def _weight(layer: nn.Module) -> Tensor:
    found: Tensor = layer.weight  # type: ignore[assignment]
    return found.detach()


#: The host's functions that cut what makes a channel.
MAKERS = (
    tp.pruner.function.prune_conv_out_channels,
    tp.pruner.function.prune_linear_out_channels,
    tp.pruner.function.prune_depthwise_conv_out_channels,
)
