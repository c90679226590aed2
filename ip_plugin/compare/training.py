"""Training a network of a study, and measuring it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ip_plugin import param_groups
from ip_plugin.adapters import Begin
from ip_plugin.seeds import derived_seed

from .config import Settings
from .tasks import Split, Task

#: Fine-tuning begins at this part of the learning rate of the training.
FINETUNING = 0.25


class Training:
    """The training of one model: SGD with momentum and a one-cycle schedule; see `ip_plugin.adapters.Training`.

    Args:
        model: what is trained.
        split: on the model's device.
        task: says how images are augmented.
        settings: of the study.
        seed: of the run: the order of the images and their augmentation.
        epoch_done: called after each epoch.
    """

    def __init__(
        self, model: nn.Module, split: Split, task: Task, settings: Settings, seed: int, epoch_done: Callable[[], None]
    ) -> None:
        self.model, self.split, self.task, self.settings, self.seed = model, split, task, settings, seed
        self._epoch_done = epoch_done
        self._order = torch.Generator().manual_seed(derived_seed(seed, "order of images"))

    @property
    def _steps_of_an_epoch(self) -> int:
        return -(-len(self.split.labels) // self.settings.batch_size)

    @property
    def steps(self) -> int:
        """Of a training."""
        return self.settings.epochs * self._steps_of_an_epoch

    @property
    def finetuning_steps(self) -> int:
        """Of the fine-tuning."""
        return self.settings.finetune_epochs * self._steps_of_an_epoch

    def batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """The first batches of the training images, in their own order."""
        size = self.settings.batch_size
        return list(zip(self.split.images.split(size), self.split.labels.split(size), strict=True))[:count]

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(outputs, labels)

    def train(self, begin: Begin | None = None) -> None:
        """Train for all epochs."""
        self._run(self.settings.epochs, self.settings.lr, begin)

    def finetune(self, begin: Begin | None = None) -> None:
        """Train for the epochs of fine-tuning, at a part of the learning rate."""
        self._run(self.settings.finetune_epochs, self.settings.lr * FINETUNING, begin)

    def _run(self, epochs: int, lr: float, begin: Begin | None) -> None:
        if epochs == 0:
            return
        model, (images, labels) = self.model, self.split
        groups = param_groups(model, weight_decay=self.settings.weight_decay, basis_lr=lr * self.settings.basis_lr)
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
            total_steps=epochs * self._steps_of_an_epoch,
            pct_start=0.15,
        )
        after_step = None if begin is None else begin(optimizer)
        model.train()
        for _ in range(epochs):
            for batch in torch.randperm(len(labels), generator=self._order).split(self.settings.batch_size):
                batch = batch.to(labels.device)
                seen, truth = self.task.augment(images[batch], self._order), labels[batch]

                def loss(seen: Tensor = seen, truth: Tensor = truth) -> Tensor:
                    return self.loss(model(seen), truth)

                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
                schedule.step()
                if after_step is not None:
                    after_step(loss)
            self._epoch_done()


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Share of the images that are classified correctly, in percent."""
    model.eval()
    hits = sum(
        int((model(images).argmax(1) == labels).sum())
        for images, labels in zip(split.images.split(1000), split.labels.split(1000), strict=True)
    )
    return 100 * hits / len(split.labels)
