"""Other people's training functions: what they are called with, besides the model and the data.

A study calls such a function for each training and each fine-tuning of a cell, so that any criterion takes part::

    def train(model, data, context):
        optimizer = torch.optim.SGD(param_groups(model, weight_decay=5e-4), lr=context.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, context.steps)
        context.before_training(optimizer)
        for _ in range(context.epochs):
            for images, labels in DataLoader(data.train, context.batch_size, shuffle=True):

                def loss():
                    return F.cross_entropy(model(images), labels)

                optimizer.zero_grad()
                value = loss()
                value.backward()
                optimizer.step()
                schedule.step()
                context.after_step(value, loss)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from ip_plugin.adapters import Begin
from ip_plugin.errors import StudyError

if TYPE_CHECKING:
    from .training import Phase, Training


class OwnTraining:
    """The third argument of a training function: its two calls let criteria take part, and draw the training curve.

    Attributes:
        phase: ``"train"``, or ``"finetune"`` after pruning.
        epochs: how many are to be trained now.
        steps: how many optimizer steps these have; `after_step` must be called as often.
        batch_size: of the study.
        lr: the learning rate: that of the study or that tuned for the space; a quarter of it in fine-tuning.
        seed: of the cell. Torch's random state is seeded anew before each call, the same in both spaces.
        device: where the model is, and where images in memory are.
    """

    def __init__(self, training: Training, epochs: int, lr: float, begin: Begin | None) -> None:
        self._training, self._begin = training, begin
        self.phase: Phase = training.phase
        self.epochs, self.lr, self.seed = epochs, lr, training.seed
        self.steps = epochs * training.steps_per_epoch
        self.batch_size, self.device = training.settings.batch_size, torch.device(training.settings.device)
        self._optimizer: Optimizer | None = None
        self._after_step: Callable[[Callable[[], Tensor]], object] | None = None
        self._done = 0
        self._total: Tensor | float = 0.0

    def before_training(self, optimizer: Optimizer) -> None:
        """Call this once, before the first step, with the optimizer."""
        self._optimizer = optimizer
        self._after_step = None if self._begin is None else self._begin(optimizer)

    def after_step(self, value: Tensor, loss: Callable[[], Tensor]) -> None:
        """Call this after each step of the optimizer.

        Args:
            value: the loss of the batch.
            loss: computes the loss of the same batch again; criteria such as RigL need its gradients.
        """
        if self._optimizer is None:
            rule = "A training function must call context.before_training before context.after_step."
            raise StudyError(rule, "no call", "call context.before_training(optimizer) before the first step")
        self._done += 1
        self._total = self._total + value.detach()
        if self._after_step is not None:
            self._after_step(loss)
        if self._done % self._training.steps_per_epoch == 0:
            mean = float(self._total) / self._training.steps_per_epoch
            self._total = 0.0
            self._training.note_epoch(mean, self._optimizer.param_groups[0]["lr"])

    def check(self, name: str) -> None:
        """Raise StudyError unless the function named `name` has made every step."""
        if self._done != self.steps:
            rule = f"The training function {name!r} must call context.after_step after each of {self.steps} steps."
            found = f"{self._done} calls in {self.epochs} epochs of {self._training.steps_per_epoch} batches"
            raise StudyError(rule, found, "train context.epochs epochs in batches of context.batch_size images")
