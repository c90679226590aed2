"""Training a network of a study, and measuring it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ip_plugin import param_groups
from ip_plugin.adapters import Begin
from ip_plugin.utils.seeds import derived_seed

from .config import Settings
from .tasks import Split, Task

#: Fine-tuning begins at this part of the learning rate of the training.
FINETUNING = 0.25


class _End(NamedTuple):
    """What a training has changed."""

    tensors: dict[str, Tensor]
    order: Tensor
    random_state: Tensor


class Memory:
    """How trainings of one study have ended, by what they began with, so that none is done twice.

    Criteria that prune a trained network begin with the same training. What is kept is the end of the last trainings
    that were not interfered with; another one that begins as one of them did, in every bit of model and random state,
    ends there at once. Gradients and the state of the optimizer are left by no training.

    Args:
        size: how many are kept.
    """

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._ends: OrderedDict[str, _End] = OrderedDict()

    def recall(self, training: Training) -> tuple[str, bool]:
        """A name for a training that is to begin now; whether it is known, and has ended now."""
        model = training.model
        key = hashlib.sha256(repr(model).encode())
        numbers: dict[int, int] = {}  # tell which names are one tensor
        for name, tensor in _tensors(model):
            number = numbers.setdefault(id(tensor), len(numbers))
            layout = (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.requires_grad)
            key.update(f"{name} {number} {layout}".encode())
            key.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        for state in (training.order.get_state(), torch.get_rng_state()):
            key.update(state.numpy().tobytes())
        end = self._ends.get(key.hexdigest())
        if end is not None:
            self._ends.move_to_end(key.hexdigest())
            model.train()
            with torch.no_grad():
                for name, tensor in _tensors(model):
                    tensor.copy_(end.tensors[name])
            training.order.set_state(end.order)
            torch.set_rng_state(end.random_state)
        return key.hexdigest(), end is not None

    def keep(self, key: str, training: Training) -> None:
        """Remember how it has ended."""
        tensors = {name: tensor.detach().clone() for name, tensor in _tensors(training.model)}
        self._ends[key] = _End(tensors, training.order.get_state(), torch.get_rng_state())
        if len(self._ends) > self.size:
            self._ends.popitem(last=False)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


class Training:
    """The training of one model: SGD with momentum and a one-cycle schedule; see `ip_plugin.adapters.Training`.

    Args:
        model: what is trained.
        split: on the model's device.
        task: says how images are augmented.
        settings: of the study.
        seed: of the run: the order of the images and their augmentation.
        epoch_done: called after each epoch.
        memory: of trainings with the same split, task and settings; None does every training anew.
    """

    def __init__(
        self,
        model: nn.Module,
        split: Split,
        task: Task,
        settings: Settings,
        seed: int,
        epoch_done: Callable[[], None],
        memory: Memory | None = None,
    ) -> None:
        self.model, self.split, self.task, self.settings, self.seed = model, split, task, settings, seed
        self._epoch_done, self._memory = epoch_done, memory
        self.order = torch.Generator().manual_seed(derived_seed(seed, "order of images"))

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
        if begin is not None or self._memory is None:
            self._run(self.settings.epochs, self.settings.lr, begin)
            return
        key, known = self._memory.recall(self)
        if known:
            for _ in range(self.settings.epochs):
                self._epoch_done()
        else:
            self._run(self.settings.epochs, self.settings.lr, None)
            self._memory.keep(key, self)

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
            for batch in torch.randperm(len(labels), generator=self.order).split(self.settings.batch_size):
                batch = batch.to(labels.device)
                seen, truth = self.task.augment(images[batch], self.order), labels[batch]

                def loss(seen: Tensor = seen, truth: Tensor = truth) -> Tensor:
                    return self.loss(model(seen), truth)

                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
                schedule.step()
                if after_step is not None:
                    after_step(loss)
            self._epoch_done()
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
