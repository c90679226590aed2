"""Importances of Torch-Pruning as criteria of ``ip-plugin compare``, each with filter variety and without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from ip_plugin.adapters import VARIED, AnyCriterion, ChannelCriterion, ChannelTrainingCriterion, Training
from ip_plugin.adapters.torch_pruning.scores import ScoredImportance
from ip_plugin.adapters.torch_pruning.variety import VariedImportance
from ip_plugin.adapters.torch_pruning.wrapping import pruner
from ip_plugin.methods import movement

#: Batches that movement is computed on: of a hundred images, a thousand in all.
_BATCHES = 10


def _pruner(model: nn.Module, ratio: float, images: Tensor, importance: Any) -> Any:
    """That takes a share of the channels of every layer but the last."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    return pruner(
        tp.pruner.BasePruner, model, images[:1], importance=importance, pruning_ratio=ratio, ignored_layers=last
    )


def _cut(
    importance: Callable[[], Any], varied: bool, model: nn.Module, ratio: float, images: Tensor, labels: Tensor
) -> Any:
    """Cut channels in one step; returns the pruner."""
    scorer = importance()
    gradients = isinstance(scorer, (tp.importance.GroupTaylorImportance, tp.importance.GroupHessianImportance))
    model.eval()
    model.zero_grad()
    if gradients:
        losses = F.cross_entropy(model(images), labels, reduction="none")
        if isinstance(scorer, tp.importance.GroupHessianImportance):
            for loss in losses:
                model.zero_grad()
                loss.backward(retain_graph=True)
                scorer.accumulate_grad(model)
        else:
            losses.mean().backward()
    cutter = _pruner(model, ratio, images, VariedImportance(scorer) if varied else scorer)
    cutter.step()
    model.zero_grad()
    return cutter


def _movement(varied: bool, model: nn.Module, ratio: float, training: Training) -> None:
    training.train()
    model.eval()
    scorer = partial(ScoredImportance, model, movement(model, training.batches(_BATCHES), training.loss))
    _cut(scorer, varied, model, ratio, *training.batches(1)[0])
    training.finetune()


def _ticket(varied: bool, model: nn.Module, ratio: float, training: Training) -> None:
    """The channels that a trained network would lose are cut out of what it began as, and that is trained."""
    early = copy.deepcopy(model.state_dict())
    training.train()
    images, labels = training.batches(1)[0]
    history = _cut(_L1, varied, copy.deepcopy(model), ratio, images, labels).pruning_history()
    model.load_state_dict(early)
    _pruner(model, ratio, images, tp.importance.RandomImportance()).load_pruning_history(history)
    training.train()


_L1 = partial(tp.importance.GroupMagnitudeImportance, 1)


@dataclass(frozen=True)
class _Kind:
    """A criterion but for the question whether it has variety."""

    title: str
    importance: Callable[[], Any]
    when: Literal["at initialisation", "after training"] = "after training"

    def criterion(self, varied: bool) -> ChannelCriterion:
        title = _titled(f"{self.title}{{}}, {self.when}", varied)
        return ChannelCriterion(title, self.when, partial(_cut, self.importance, varied))


@dataclass(frozen=True)
class _TrainingKind:
    """The same of a criterion that takes part in the training; its title has a place for the answer."""

    title: str
    train: Callable[[bool, nn.Module, float, Training], None]
    trainings: int = 1
    finetunings: int = 0

    def criterion(self, varied: bool) -> ChannelTrainingCriterion:
        title = _titled(self.title, varied)
        return ChannelTrainingCriterion(title, partial(self.train, varied), self.trainings, self.finetunings)


def _titled(title: str, varied: bool) -> str:
    return title.format(" with variety" if varied else "")


_KINDS: dict[str, _Kind | _TrainingKind] = {
    "magnitude": _Kind("channels by group magnitude (L2)", tp.importance.GroupMagnitudeImportance),
    "l1": _Kind("channels by group magnitude (L1)", _L1),
    "bn_scale": _Kind("channels by scale of their norm", tp.importance.BNScaleImportance),
    "lamp": _Kind("channels by LAMP", tp.importance.LAMPImportance),
    "fpgm": _Kind("channels by distance to the others (FPGM)", tp.importance.FPGMImportance),
    "taylor": _Kind("channels by first-order effect on the loss", tp.importance.GroupTaylorImportance),
    "hessian": _Kind("channels by second-order effect on the loss", tp.importance.GroupHessianImportance),
    "random": _Kind("random channels", tp.importance.RandomImportance, "at initialisation"),
    "random_trained": _Kind("random channels", tp.importance.RandomImportance),
    "movement": _TrainingKind("channels by movement{}, after training", _movement, finetunings=1),
    "ticket": _TrainingKind("lottery ticket: channels by L1{}, rewound to the start", _ticket, trainings=2),
}
CRITERIA: dict[str, AnyCriterion] = {
    f"{name}{VARIED if varied else ''}": kind.criterion(varied)
    for name, kind in _KINDS.items()
    for varied in (False, True)
}
