"""Filter variety for NNI's structured pruners: `with_variety`."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from ip_plugin.core.gauge import Similarity, compared
from ip_plugin.core.tensor_ref import TensorRef
from ip_plugin.errors import InvalidVarietyError
from ip_plugin.methods.filter_variety import check_similarity, check_strength, varied

P = TypeVar("P", bound=type)


def with_variety(pruner: P, strength: float = 1.0, similarity: Similarity = "coefficients") -> P:
    """The same pruner, which takes redundant channels first; see `ip_plugin.methods.filter_variety`.

    Of every layer as many channels go as before, but others. Layers of one ``dependency_group_id`` are compared by all
    their kernels, channel by channel, as one filter.

    Args:
        pruner: a class of `ip_plugin.adapters.nni` that ranks channels: by a norm, FPGM, Taylor, Slim.
        strength: 1: redundancy decides, the metric only between two that are alike; 0: the metric alone.
        similarity: whether coefficients are compared, in unit gauge, or the kernels that they make.

    Returns:
        A subclass, used as the pruner is.

    Raises:
        InvalidVarietyError: the pruner ranks single entries (when masks are made); the strength or similarity is none.

    >>> from torch import nn
    >>> from ip_plugin.adapters.nni import L1NormPruner
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> pruner = with_variety(L1NormPruner)(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    >>> _, masks = pruner.compress()
    >>> int(masks["0"]["bias"].sum())
    4
    """
    check_strength(strength)
    check_similarity(similarity)
    content = {"variety": strength, "similarity": similarity, "__module__": __name__}
    made: Any = type(f"Varied{pruner.__name__}", (_Varied, pruner), content)
    return made  # type: ignore[no-any-return]


class _Varied:
    """Deals metrics of channels out anew, before masks are made of them."""

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
                    found = f"a metric of shape {tuple(metric.shape)} for {target!r} of {module!r}"
                    raise InvalidVarietyError("Variety is for pruners that rank channels.", found)
                where = (module, target)
                groups.setdefault(space.dependency_group_id or where, []).append(where)
        for members in groups.values():
            scores = torch.stack([metrics[module][target].flatten() for module, target in members]).mean(0)
            filters = torch.cat([self._filters(module, target) for module, target in members], dim=1)
            dealt = varied(scores, filters, self.variety)
            for module, target in members:
                metrics[module][target] = dealt.reshape(metrics[module][target].shape)
        return metrics

    def _filters(self, module: str, target: str) -> Tensor:
        space = self._target_spaces[module][target]
        values = space.target.detach()
        values = values if space.mask is None else values * space.mask
        parametrization = TensorRef(self._module_wrappers[module].module, "original").parametrization
        if parametrization is not None and parametrization.mask is not None:
            values = values * parametrization.mask
        return compared(values, parametrization, self.similarity).flatten(1)
