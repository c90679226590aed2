"""Training a network of a study, and measuring it."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR

from ip_plugin import param_groups
from ip_plugin.adapters import Begin
from ip_plugin.utils.seeds import derived_seed, seeded

from . import config
from .data import Images, Part, Split
from .named import called, named
from .own_training import OwnTraining
from .record import Epoch

OnEpoch: TypeAlias = Callable[[Epoch], object]
Phase: TypeAlias = Literal["train", "finetune"]
#: The learning rate of a fine-tuning, as a part of that of a training.
FINETUNING_LR = 0.25


class TrainingCache:
    """The states in which trainings of one study ended, so that no training is done twice.

    Criteria that prune a trained network begin with the same training. A training that begins like an earlier one, in
    every bit of the model and of the random state, with the same data and settings, ends as that one did, and leaves no
    gradients and no optimizer state behind. Of trainings without a `begin` callback the `size` that were used last are
    kept. Trainings by other people's functions are not.
    """

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._ends: OrderedDict[str, tuple[list[Tensor], Tensor, list[Tensor], list[Epoch], Images]] = OrderedDict()

    def restore(self, key: str, training: Training) -> bool:
        """Put a training into the state in which one with this key ended; returns whether there was one."""
        if key not in self._ends:
            return False
        self._ends.move_to_end(key)
        values, order, random_states, curve, _ = self._ends[key]
        training.model.train()
        with torch.no_grad():
            for (_, tensor), value in zip(_tensors(training.model), values, strict=True):
                tensor.copy_(value)
        training.order.set_state(order)
        torch.set_rng_state(random_states[0])
        for state in random_states[1:]:
            torch.cuda.set_rng_state(state, training.settings.device)
        for epoch in curve:
            training.note(epoch)
        return True

    def keep(self, key: str, training: Training) -> None:
        """Keep the state in which a training has ended."""
        values = [tensor.detach().clone() for _, tensor in _tensors(training.model)]
        curve = training.curve[-training.settings.epochs :]
        # The data are kept with it: the key has their identity.
        self._ends[key] = values, training.order.get_state(), _random_states(training), curve, training.images
        if len(self._ends) > self.size:
            self._ends.popitem(last=False)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _random_states(training: Training) -> list[Tensor]:
    device = torch.device(training.settings.device)
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


class Training:
    """The `ip_plugin.adapters.TrainingContext` of studies.

    Args:
        model: the network to train.
        images: the data, on the model's device.
        settings: of the study.
        seed: of the cell, for the order of the images and their augmentation.
        on_epoch: called after each epoch.
        cache: of trainings; without one every training is done.
        fresh: makes the network of the cell anew, with other initial values; controls need it.

    Attributes:
        curve: the epochs until now.
        order: the generator of the order of images and of their augmentation.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        settings: config.Training,
        seed: int,
        on_epoch: OnEpoch = lambda _: None,
        cache: TrainingCache | None = None,
        fresh: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.model, self.images, self.settings, self.seed, self.fresh = model, images, settings, seed, fresh
        self._on_epoch, self._cache = on_epoch, cache
        self.curve: list[Epoch] = []
        self.phase: Phase = "train"
        self._began = time.perf_counter()
        self.order = torch.Generator().manual_seed(derived_seed(seed, "order of images"))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last batch may be smaller."""
        return -(-len(self.images.train) // self.settings.batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of one `train`."""
        return self.settings.epochs * self.steps_per_epoch

    @property
    def finetuning_steps(self) -> int:
        """Optimizer steps of one `finetune`."""
        return self.settings.finetune_epochs * self.steps_per_epoch

    def batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """The first `count` batches of the training images, in the order in which they are stored, not augmented."""
        return list(islice(self.images.train.batches(self.settings.batch_size), count))

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(outputs, labels, label_smoothing=self.settings.label_smoothing)

    def train(self, begin: Begin | None = None) -> None:
        """Train for all epochs."""
        epochs, lr = self.settings.epochs, self.settings.lr
        if begin is not None or self._cache is None or self.settings.function is not None:
            self.fit(epochs, lr, begin)
            return
        key = self._fingerprint()
        if not self._cache.restore(key, self):
            self.fit(epochs, lr)
            self._cache.keep(key, self)

    def finetune(self, begin: Begin | None = None) -> None:
        """Train for the epochs of fine-tuning, at a part of the learning rate."""
        self.phase = "finetune"
        self.fit(self.settings.finetune_epochs, self.settings.lr * FINETUNING_LR, begin)
        self.phase = "train"

    def _fingerprint(self) -> str:
        """A hash of everything that a training depends on."""
        digest = hashlib.sha256(f"{self.model!r} {self.settings!r} {id(self.images)}".encode())
        numbers: dict[int, int] = {}  # tell which names are one tensor
        for name, tensor in _tensors(self.model):
            number = numbers.setdefault(id(tensor), len(numbers))
            layout = (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.requires_grad)
            digest.update(f"{name} {number} {layout}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        for state in (self.order.get_state(), *_random_states(self)):
            digest.update(state.numpy().tobytes())
        return digest.hexdigest()

    def note(self, epoch: Epoch) -> None:
        """Keep and report an epoch, numbered and timed as one of this cell."""
        self.curve.append(replace(epoch, epoch=len(self.curve) + 1, seconds=time.perf_counter() - self._began))
        self._on_epoch(self.curve[-1])

    def note_epoch(self, loss: float, lr: float, train_accuracy: float | None = None) -> None:
        """Measure the accuracy on the validation images, if there are any, and note an epoch."""
        reached = None if self.images.validation is None else accuracy(self.model, self.images.validation)
        self.model.train()
        self.note(Epoch(0, self.phase, loss, lr, reached, 0.0, train_accuracy))

    def fit(self, epochs: int, lr: float, begin: Begin | None = None) -> None:
        """Train with a new optimizer and a whole schedule of learning rates that peaks at `lr`."""
        if epochs == 0:
            return
        if self.settings.function is not None:
            self._fit_by_function(self.settings.function, epochs, lr, begin)
            return
        model, settings, number = self.model, self.settings, len(self.images.train)
        optimizer = self.optimizer(lr)
        schedule = _schedule(optimizer, settings, epochs * self.steps_per_epoch)
        after_step = None if begin is None else begin(optimizer)
        model.train()
        forward = torch.compile(model) if settings.compile else model
        outputs: Tensor
        for _ in range(epochs):
            total, hits = torch.zeros(2, device=settings.device)
            for images, labels in self.images.train.shuffled(settings.batch_size, self.order):
                if settings.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)

                def loss(images: Tensor = images, labels: Tensor = labels) -> Tensor:
                    nonlocal outputs
                    with self._precision():
                        outputs = forward(images)
                        return self.loss(outputs, labels)

                optimizer.zero_grad()
                value = loss()
                value.backward()
                total += value.detach() * len(labels)
                hits += (outputs.detach().argmax(1) == labels).sum()
                optimizer.step()
                schedule.step()
                if after_step is not None:
                    after_step(loss)
            self.note_epoch(float(total) / number, optimizer.param_groups[0]["lr"], 100 * float(hits) / number)
        optimizer.zero_grad()

    def _precision(self) -> AbstractContextManager[object]:
        device = torch.device(self.settings.device).type
        return torch.autocast(device, torch.bfloat16, enabled=self.settings.amp)

    def optimizer(self, lr: float) -> Optimizer:
        """The optimizer of the settings; bases have a learning rate of their own, and no weight decay."""
        settings = self.settings
        groups = param_groups(self.model, weight_decay=settings.weight_decay, basis_lr=lr * settings.basis_lr)
        if settings.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=lr)
        return torch.optim.SGD(groups, lr=lr, momentum=settings.momentum)

    def _fit_by_function(self, name: str, epochs: int, lr: float, begin: Begin | None) -> None:
        """Let other people's function train; it starts with the same random numbers in both spaces."""
        function = named(name, "training function")
        self.model.train()
        context = OwnTraining(self, epochs, lr, begin)
        with seeded(int(torch.randint(1 << 62, (), generator=self.order)), self.settings.device):
            called(name, "training function", function, self.model, self.images, context)
        context.check(name)
        for parameter in self.model.parameters():
            parameter.grad = None


def _schedule(optimizer: Optimizer, settings: config.Training, steps: int) -> LRScheduler:
    """Learning rates over so many steps; one-cycle also moves the momentum of SGD, by 0.05 to either side."""
    if settings.schedule == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    if settings.schedule == "steps":
        return MultiStepLR(optimizer, [round(0.5 * steps), round(0.75 * steps)])
    peaks = [group["lr"] for group in optimizer.param_groups]
    momentum = settings.momentum if settings.optimizer == "sgd" else 0.0
    return OneCycleLR(
        optimizer, peaks, total_steps=steps, pct_start=0.15, cycle_momentum=momentum > 0,
        base_momentum=max(0.0, round(momentum - 0.05, 9)), max_momentum=min(round(momentum + 0.05, 9), 0.999),
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """Share of the images that are classified correctly, in percent."""
    model.eval()
    batches = part.batches(1000 if isinstance(part, Split) else 100)
    hits = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return 100 * hits / len(part)
