"""Training a network of a study, and measuring it."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ip_plugin import param_groups
from ip_plugin.adapters import Begin
from ip_plugin.utils.seeds import derived_seed

from . import config
from .record import Epoch
from .tasks import Split, Task

OnEpoch: TypeAlias = Callable[[Epoch], object]
#: The learning rate of a fine-tuning, as a part of that of a training.
FINETUNING_LR = 0.25


class TrainingCache:
    """The states in which trainings of one study ended, so that no training is done twice.

    Criteria that prune a trained network begin with the same training. A training that begins like an earlier one, in
    every bit of the model and of the random state, ends as that one did, and leaves no gradients and no optimizer state
    behind. Of trainings without a `begin` callback the `size` that were used last are kept.
    """

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._ends: OrderedDict[str, tuple[list[Tensor], Tensor, Tensor, list[Epoch]]] = OrderedDict()

    def restore(self, key: str, training: Training) -> bool:
        """Put a training into the state in which one with this key ended; returns whether there was one."""
        if key not in self._ends:
            return False
        self._ends.move_to_end(key)
        values, order, random_state, curve = self._ends[key]
        training.model.train()
        with torch.no_grad():
            for (_, tensor), value in zip(_tensors(training.model), values, strict=True):
                tensor.copy_(value)
        training.order.set_state(order)
        torch.set_rng_state(random_state)
        for epoch in curve:
            training.note(epoch)
        return True

    def keep(self, key: str, training: Training) -> None:
        """Keep the state in which a training has ended."""
        values = [tensor.detach().clone() for _, tensor in _tensors(training.model)]
        curve = training.curve[-training.settings.epochs :]
        self._ends[key] = values, training.order.get_state(), torch.get_rng_state(), curve
        if len(self._ends) > self.size:
            self._ends.popitem(last=False)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


class Training:
    """The `ip_plugin.adapters.TrainingContext` of studies: SGD with momentum and a one-cycle schedule.

    Args:
        model: the network to train.
        split: training images and labels, on the model's device.
        task, settings: of the study; the task says how images are augmented.
        seed: of the cell, for the order of the images and their augmentation.
        on_epoch: called after each epoch.
        cache: of trainings with the same split, task and settings; without one every training is done.
    """

    def __init__(
        self,
        model: nn.Module,
        split: Split,
        task: Task,
        settings: config.Training,
        seed: int,
        on_epoch: OnEpoch = lambda _: None,
        cache: TrainingCache | None = None,
    ) -> None:
        self.model, self.split, self.task, self.settings, self.seed = model, split, task, settings, seed
        self._on_epoch, self._cache = on_epoch, cache
        self.curve: list[Epoch] = []
        self._phase: Literal["train", "finetune"] = "train"
        self._began = time.perf_counter()
        self.order = torch.Generator().manual_seed(derived_seed(seed, "order of images"))

    @property
    def _steps_per_epoch(self) -> int:
        return -(-len(self.split.labels) // self.settings.batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of one `train`."""
        return self.settings.epochs * self._steps_per_epoch

    @property
    def finetuning_steps(self) -> int:
        """Optimizer steps of one `finetune`."""
        return self.settings.finetune_epochs * self._steps_per_epoch

    def batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """The first `count` batches of the training images, in the order in which they are stored."""
        size = self.settings.batch_size
        return list(zip(self.split.images.split(size), self.split.labels.split(size), strict=True))[:count]

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(outputs, labels)

    def train(self, begin: Begin | None = None) -> None:
        """Train for all epochs."""
        epochs, lr = self.settings.epochs, self.settings.lr
        if begin is not None or self._cache is None:
            self.fit(epochs, lr, begin)
            return
        key = self._fingerprint()
        if not self._cache.restore(key, self):
            self.fit(epochs, lr)
            self._cache.keep(key, self)

    def finetune(self, begin: Begin | None = None) -> None:
        """Train for the epochs of fine-tuning, at a part of the learning rate."""
        self._phase = "finetune"
        self.fit(self.settings.finetune_epochs, self.settings.lr * FINETUNING_LR, begin)
        self._phase = "train"

    def _fingerprint(self) -> str:
        """A hash of everything that a training depends on."""
        digest = hashlib.sha256(repr(self.model).encode())
        numbers: dict[int, int] = {}  # tell which names are one tensor
        for name, tensor in _tensors(self.model):
            number = numbers.setdefault(id(tensor), len(numbers))
            layout = (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.requires_grad)
            digest.update(f"{name} {number} {layout}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        for state in (self.order.get_state(), torch.get_rng_state()):
            digest.update(state.numpy().tobytes())
        return digest.hexdigest()

    def note(self, epoch: Epoch) -> None:
        """Keep and report an epoch, numbered and timed as one of this cell."""
        self.curve.append(replace(epoch, epoch=len(self.curve) + 1, seconds=time.perf_counter() - self._began))
        self._on_epoch(self.curve[-1])

    def fit(self, epochs: int, lr: float, begin: Begin | None = None) -> None:
        """Train with a new optimizer and a whole one-cycle schedule that peaks at `lr`."""
        if epochs == 0:
            return
        model, (images, labels) = self.model, self.split
        groups = param_groups(model, weight_decay=self.settings.weight_decay, basis_lr=lr * self.settings.basis_lr)
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
        peaks = [group["lr"] for group in optimizer.param_groups]
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, peaks, total_steps=epochs * self._steps_per_epoch, pct_start=0.15
        )
        after_step = None if begin is None else begin(optimizer)
        model.train()
        for _ in range(epochs):
            total = torch.zeros((), device=labels.device)
            for batch in torch.randperm(len(labels), generator=self.order).split(self.settings.batch_size):
                batch = batch.to(labels.device)
                seen, truth = self.task.augment(images[batch], self.order), labels[batch]

                def loss(seen: Tensor = seen, truth: Tensor = truth) -> Tensor:
                    return self.loss(model(seen), truth)

                optimizer.zero_grad()
                value = loss()
                value.backward()
                total += value.detach() * len(truth)
                optimizer.step()
                schedule.step()
                if after_step is not None:
                    after_step(loss)
            note = Epoch(0, self._phase, float(total) / len(labels), optimizer.param_groups[0]["lr"], None, 0.0)
            self.note(note)
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Share of the images that are classified correctly, in percent."""
    model.eval()
    hits = sum(
        int((model(images).argmax(1) == labels).sum())
        for images, labels in zip(split.images.split(1000), split.labels.split(1000), strict=True)
    )
    return 100 * hits / len(split.labels)
