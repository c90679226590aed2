"""Filter variety for NNI's structured pruners: `with_variety`."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from ip_plugin.errors import InvalidVarietyError
from ip_plugin.gauge import unit_gauge
from ip_plugin.reparametrization import ours_in
from ip_plugin.variety import check_strength, varied

P = TypeVar("P", bound=type)


def with_variety(pruner: P, strength: float = 1.0) -> P:
    """The same pruner, which takes redundant channels first, and leaves rare ones; see `ip_plugin.variety`.

    Of every layer as many channels go as before, but others. Layers of one ``dependency_group_id`` are compared by all
    their kernels, channel by channel, as one filter. Coefficients are compared in unit gauge.

    Args:
        pruner: a class of `ip_plugin.adapters.nni` that ranks channels: by a norm, FPGM, Taylor, Slim.
        strength: 1: redundancy decides, the metric only between two that are alike; 0: the metric alone.

    Returns:
        A subclass, used as the pruner is.

    Raises:
        InvalidVarietyError: the pruner ranks single entries (when masks are made), or the strength is none.

    >>> from torch import nn
    >>> from ip_plugin.adapters.nni import L1NormPruner
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> pruner = with_variety(L1NormPruner)(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    >>> _, masks = pruner.compress()
    >>> int(masks["0"]["bias"].sum())
    4
    """
    check_strength(strength)
    made: Any = type(f"Varied{pruner.__name__}", (_Varied, pruner), {"variety": strength, "__module__": __name__})
    return made  # type: ignore[no-any-return]


class _Varied:
    """Deals metrics of channels out anew, before masks are made of them."""

    variety: float
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
        parametrization = ours_in(self._module_wrappers[module].module)
        if parametrization is not None and parametrization.mask is not None:
            values = values * parametrization.mask
        return unit_gauge(values, parametrization).flatten(1)
