"""Filter variety for NNI's structured pruners: `with_variety`."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from ip_plugin.core.gauge import Similarity, compared
from ip_plugin.core.tensor_ref import TensorRef
from ip_plugin.errors import HostError
from ip_plugin.methods.filter_variety import check_similarity, varied
from ip_plugin.utils.validation import check_fraction

P = TypeVar("P", bound=type)


def with_variety(pruner: P, strength: float = 1.0, similarity: Similarity = "coefficients") -> P:
    """A pruner class that removes redundant channels before rare ones; see `ip_plugin.methods.filter_variety`.

    Every layer loses as many channels as before, but others. Channels of layers with one ``dependency_group_id`` are
    compared by the kernels of all these layers, as one filter.

    Args:
        pruner: a class of `ip_plugin.adapters.nni` that ranks channels: by a norm, FPGM, Taylor, Slim.
        strength: 1: redundancy decides, the metric only between two similar channels; 0: the metric alone.
        similarity: what is compared: "coefficients", as they are for filters of unit norm, or the composed "weights".

    Returns:
        A subclass of `pruner`, with its arguments.

    Raises:
        AmountError: the strength is not in [0, 1].
        ArgumentError: an unknown similarity.
        HostError: when masks are made: the pruner ranks single entries.

    >>> from torch import nn
    >>> from ip_plugin.adapters.nni import L1NormPruner
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> pruner = with_variety(L1NormPruner)(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    >>> _, masks = pruner.compress()
    >>> int(masks["0"]["bias"].sum())
    4
    """
    check_fraction(strength, "strength")
    check_similarity(similarity)
    content = {"variety": strength, "similarity": similarity, "__module__": __name__}
    return type(f"Varied{pruner.__name__}", (_Varied, pruner), content)  # type: ignore[return-value]


class _Varied:
    """Reassigns metrics of channels by filter variety, before masks are made of them."""

    variety: float
    similarity: Similarity
    _target_spaces: dict[str, dict[str, Any]]
    _module_wrappers: dict[str, Any]

    def _calculate_metrics(self, data: Any) -> Any:
        metrics = super()._calculate_metrics(data)  # type: ignore[misc]
        groups: dict[object, list[tuple[str, str]]] = {}
        for module, of_targets in metrics.items():
            for target, metric in of_targets.items():
                space = self._target_spaces[module][target]
                if space.target is None or metric.numel() != metric.shape[0] or metric.shape[0] != space.shape[0]:
                    raise HostError(
                        "Variety is for pruners that rank channels.",
                        f"a metric of shape {tuple(metric.shape)} for {target!r} of {module!r}",
                        "use it with L1NormPruner, L2NormPruner, FPGMPruner, TaylorPruner or SlimPruner",
                    )
                groups.setdefault(space.dependency_group_id or (module, target), []).append((module, target))
        for members in groups.values():
            scores = torch.stack([metrics[module][target].flatten() for module, target in members]).mean(0)
            filters = torch.cat([self._filters(module, target) for module, target in members], dim=1)
            reassigned = varied(scores, filters, self.variety)
            for module, target in members:
                metrics[module][target] = reassigned.reshape(metrics[module][target].shape)
        return metrics

    def _filters(self, module: str, target: str) -> Tensor:
        space = self._target_spaces[module][target]
        values = space.target.detach()
        values = values if space.mask is None else values * space.mask
        parametrization = TensorRef(self._module_wrappers[module].module, "original").parametrization
        if parametrization is not None and parametrization.mask is not None:
            values = values * parametrization.mask
        return compared(values, parametrization, self.similarity).flatten(1)
