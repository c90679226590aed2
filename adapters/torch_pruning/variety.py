"""Filter variety for any importance of Torch-Pruning: `VariedImportance`."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from ip_plugin.core.channels import output_filters
from ip_plugin.core.gauge import Similarity
from ip_plugin.methods.filter_variety import check_similarity, varied
from ip_plugin.utils.validation import check_fraction

from ..shared.plain_view import kernels


class VariedImportance(tp.importance.Importance):  # type: ignore[misc]  # the host has no types
    """An importance by which redundant filters are removed before rare ones; see `ip_plugin.methods.filter_variety`.

    Every group loses as many channels as before, but others. Channels that are coupled (residual sums) are compared
    by all the kernels that compute them, as one filter.

    Args:
        importance: any importance of Torch-Pruning, or a function of a group.
        strength: 1: redundancy decides, the importance only between two similar filters; 0: the importance alone.
        similarity: what is compared: "coefficients", as they are for filters of unit norm, or the composed "weights".

    Raises:
        AmountError: the strength is not in [0, 1].
        ArgumentError: an unknown similarity.

    >>> from torch import nn
    >>> from ip_plugin.adapters.torch_pruning import pruner
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    >>> importance = VariedImportance(tp.importance.GroupMagnitudeImportance(p=1))
    >>> channel_pruner = pruner(tp.pruner.BasePruner, model, torch.zeros(1, 3, 8, 8), importance=importance,
    ...                         pruning_ratio=0.5, ignored_layers=[model[2]])
    >>> channel_pruner.step()
    >>> model[0]
    Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
    """

    def __init__(
        self, importance: Callable[..., Tensor | None], strength: float = 1.0, similarity: Similarity = "coefficients"
    ) -> None:
        check_fraction(strength, "strength")
        check_similarity(similarity)
        self.importance, self.strength, self.similarity = importance, strength, similarity

    def __call__(self, group: Any, *args: Any, **kwargs: Any) -> Tensor | None:
        """The importances of a group, reassigned by filter variety."""
        scores = self.importance(group, *args, **kwargs)
        values = kernels if self.similarity == "weights" else attrgetter("weight")
        filters = None if scores is None else made_by(group, len(scores), values)
        return scores if scores is None or filters is None else varied(scores, filters, self.strength)

    def __getattr__(self, name: str) -> Any:
        """Other attributes of the importance (``accumulate_grad`` of the Hessian one)."""
        if name == "importance":  # not there yet: this is being copied
            raise AttributeError(name)
        return getattr(self.importance, name)


def made_by(group: Any, count: int, values: Callable[[nn.Module], Tensor | None]) -> Tensor | None:
    """Values of all kernels that compute the `count` channels of a group, one row for each; None if there are none.

    `values` returns those of a layer, in the shape of its weight, or None for a layer that does not count.
    """
    rows: list[Tensor] = []
    for item in group.items:
        layer = item.dep.target.module
        makes = item.dep.handler in MAKERS and None not in item.root_idxs
        weight = values(layer) if makes else None
        if weight is not None:
            filters = output_filters(layer, weight.detach())[item.idxs]
            rows.append(filters.new_zeros(count, filters.shape[1]))
            rows[-1][item.root_idxs] = filters
    return torch.cat(rows, dim=1) if rows else None


#: Torch-Pruning's functions that remove output channels.
MAKERS = (
    tp.pruner.function.prune_conv_out_channels,
    tp.pruner.function.prune_linear_out_channels,
    tp.pruner.function.prune_depthwise_conv_out_channels,
)
