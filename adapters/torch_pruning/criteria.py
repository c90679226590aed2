"""Importances of Torch-Pruning as criteria of ``ip-plugin compare``, with filter variety and without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from ip_plugin.adapters import Criterion, Stage, TrainingContext, with_and_without_variety
from ip_plugin.adapters.torch_pruning.scores import ScoredImportance
from ip_plugin.adapters.torch_pruning.variety import VariedImportance
from ip_plugin.adapters.torch_pruning.wrapping import pruner
from ip_plugin.methods import movement

#: Batches that movement is computed on: of a hundred images, a thousand in all.
_BATCHES = 10


def _pruner(model: nn.Module, ratio: float, images: Tensor, importance: Any) -> Any:
    """A pruner that removes a share of the channels of every layer but the last."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    return pruner(
        tp.pruner.BasePruner, model, images[:1], importance=importance, pruning_ratio=ratio, ignored_layers=last
    )


def _remove(
    importance: Callable[[], Any], varied: bool, model: nn.Module, ratio: float, training: TrainingContext
) -> Any:
    """Remove channels in one step; returns the pruner."""
    images, labels = training.batches(1)[0]
    scorer = importance()
    model.eval()
    model.zero_grad()
    if isinstance(scorer, tp.importance.GroupHessianImportance):
        for loss in F.cross_entropy(model(images), labels, reduction="none"):
            model.zero_grad()
            loss.backward(retain_graph=True)
            scorer.accumulate_grad(model)
    elif isinstance(scorer, tp.importance.GroupTaylorImportance):
        F.cross_entropy(model(images), labels, reduction="none").mean().backward()
    host = _pruner(model, ratio, images, VariedImportance(scorer) if varied else scorer)
    host.step()
    model.zero_grad()
    return host


def _movement(varied: bool, model: nn.Module, ratio: float, training: TrainingContext) -> None:
    training.train()
    model.eval()
    scorer = partial(ScoredImportance, model, movement(model, training.batches(_BATCHES), training.loss))
    _remove(scorer, varied, model, ratio, training)
    training.finetune()


def _ticket(varied: bool, model: nn.Module, ratio: float, training: TrainingContext) -> None:
    """Train, choose channels, remove them from the network as it was before that training, and train that."""
    initial = copy.deepcopy(model.state_dict())
    training.train()
    history = _remove(_L1, varied, copy.deepcopy(model), ratio, training).pruning_history()
    model.load_state_dict(initial)
    images, _ = training.batches(1)[0]
    _pruner(model, ratio, images, tp.importance.RandomImportance()).load_pruning_history(history)
    training.train()


_L1 = partial(tp.importance.GroupMagnitudeImportance, 1)
_IMPORTANCES: dict[str, tuple[str, Stage, Callable[[], Any]]] = {
    "magnitude": ("channels by group magnitude (L2)", "after training", tp.importance.GroupMagnitudeImportance),
    "l1": ("channels by group magnitude (L1)", "after training", _L1),
    "bn_scale": ("channels by scale of their norm", "after training", tp.importance.BNScaleImportance),
    "lamp": ("channels by LAMP", "after training", tp.importance.LAMPImportance),
    "fpgm": ("channels by distance to the others (FPGM)", "after training", tp.importance.FPGMImportance),
    "taylor": ("channels by first-order effect on the loss", "after training", tp.importance.GroupTaylorImportance),
    "hessian": ("channels by second-order effect on the loss", "after training", tp.importance.GroupHessianImportance),
    "random": ("random channels", "at initialisation", tp.importance.RandomImportance),
    "random_trained": ("random channels", "after training", tp.importance.RandomImportance),
}
CRITERIA: dict[str, Criterion] = {}
for _name, (_title, _stage, _importance) in _IMPORTANCES.items():
    CRITERIA |= with_and_without_variety(_name, f"{_title}{{}}, {_stage}", _stage, partial(_remove, _importance))
CRITERIA |= with_and_without_variety(
    "movement", "channels by movement{}, after training", "while training", _movement, finetunings=1
)
CRITERIA |= with_and_without_variety(
    "ticket", "lottery ticket: channels by L1{}, rewound to the start", "while training", _ticket, trainings=2
)
