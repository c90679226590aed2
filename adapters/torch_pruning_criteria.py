"""Importances of Torch-Pruning as criteria of ``ip-plugin compare``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from ip_plugin.adapters import ChannelCriterion
from ip_plugin.adapters.torch_pruning import pruner


def _cut(importance: Callable[[], Any], model: nn.Module, ratio: float, images: Tensor, labels: Tensor) -> None:
    """Cut a share of the channels of every layer but the last, in one step."""
    scorer = importance()
    gradients = isinstance(scorer, (tp.importance.GroupTaylorImportance, tp.importance.GroupHessianImportance))
    model.eval()
    if gradients:
        losses = F.cross_entropy(model(images), labels, reduction="none")
        if isinstance(scorer, tp.importance.GroupHessianImportance):
            for loss in losses:
                model.zero_grad()
                loss.backward(retain_graph=True)
                scorer.accumulate_grad(model)
        else:
            losses.mean().backward()
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    cutter = pruner(
        tp.pruner.BasePruner, model, images[:1], importance=scorer, pruning_ratio=ratio, ignored_layers=last
    )
    cutter.step()
    model.zero_grad()


def _criterion(title: str, importance: Callable[[], Any], when: Any = "after training") -> ChannelCriterion:
    return ChannelCriterion(f"{title}, {when}", when, partial(_cut, importance))


CRITERIA = {
    "magnitude": _criterion("channels by group magnitude (L2)", tp.importance.GroupMagnitudeImportance),
    "l1": _criterion("channels by group magnitude (L1)", partial(tp.importance.GroupMagnitudeImportance, 1)),
    "bn_scale": _criterion("channels by scale of their norm", tp.importance.BNScaleImportance),
    "lamp": _criterion("channels by LAMP", tp.importance.LAMPImportance),
    "fpgm": _criterion("channels by distance to the others (FPGM)", tp.importance.FPGMImportance),
    "taylor": _criterion("channels by first-order effect on the loss", tp.importance.GroupTaylorImportance),
    "hessian": _criterion("channels by second-order effect on the loss", tp.importance.GroupHessianImportance),
    "random": _criterion("random channels", tp.importance.RandomImportance, "at initialisation"),
}
