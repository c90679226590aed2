"""One run: train, prune and measure one network; and the engine that does it run by run.

The two spaces of a pair start from the same weights, see the same batches in the same order and keep the same number of
parameters: where ordinary pruning keeps k values, interspace pruning keeps k minus the numbers of its trained bases.
Where channels are cut both keep the same channels' number, and the network of the interspace is baked: it has no bases.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from ip_plugin import interspace, param_groups, prunable, report
from ip_plugin.adapters import ChannelCriterion
from ip_plugin.errors import InvalidStudyError
from ip_plugin.layer import layers

from . import criteria
from .config import Run, Settings
from .tasks import TASKS, Split

EpochDone = Callable[[], None]


@dataclass(frozen=True)
class Result:
    """What a run measured.

    Attributes:
        run: which run.
        accuracy: share of the test images classified correctly at the end, in percent.
        accuracy_before_pruning: of the trained network before it was pruned; None where pruning came first.
        parameters: prunable parameters of the network.
        parameters_left: non-zeros among them at the end, with the numbers of trained bases where the network needs
            them (a network whose channels were cut is baked).
        basis_parameters: numbers of trained bases.
        spatial_layers: convolutions that stayed spatial because their budget would not pay for their basis.
        seconds: time of the run.
        macs: multiply-adds of the convolution and linear layers for one image, before pruning; None unless channels
            were cut.
        macs_left: after it.
    """

    run: Run
    accuracy: float
    accuracy_before_pruning: float | None
    parameters: int
    parameters_left: int
    basis_parameters: int
    spatial_layers: tuple[str, ...]
    seconds: float
    macs: int | None = None
    macs_left: int | None = None


def execute(run: Run, settings: Settings, epoch_done: EpochDone = lambda: None) -> Result:
    """Run one cell of the grid. Equal arguments give equal results (on one machine, with one number of threads).

    Args:
        run: the cell.
        settings: of its study.
        epoch_done: called after each epoch; `epochs_of` says how often.

    Raises:
        InvalidStudyError: the network is too small for the sparsity.
    """
    started = time.perf_counter()
    criterion, task = criteria.load(run.criterion), TASKS[settings.task]
    cuts = isinstance(criterion, ChannelCriterion)
    devices = [torch.device(settings.device)] if torch.device(settings.device).type == "cuda" else []
    train, test = (Split(*(tensor.to(settings.device) for tensor in split)) for split in task.load())
    with torch.random.fork_rng(devices):
        torch.manual_seed(run.seed)
        model = task.network().to(settings.device)
        parameters = sum(getattr(*target).numel() for target in prunable(model))
        macs = report(model, train.images[:1]).prunable.macs_dense if cuts else None
        kept = round((1 - run.sparsity) * parameters)
        spatial_layers: list[str] = []
        if run.space == "interspace":
            spatial_layers = _convert(model, run, settings, budget=not cuts)
        basis_parameters = report(model).prunable.basis_parameters
        if kept - basis_parameters < 1 and not cuts:
            raise InvalidStudyError(
                "A run must keep at least one parameter.",
                f"{kept} of {parameters} at sparsity {run.sparsity:g}, {basis_parameters} of them in bases",
                "compare at a lower sparsity",
            )
        torch.manual_seed(run.seed)
        order = torch.Generator().manual_seed(run.seed)
        before = None

        def prune() -> None:
            if isinstance(criterion, ChannelCriterion):
                batch = slice(settings.batch_size)
                criterion.cut(model, run.sparsity, train.images[batch], train.labels[batch])
            else:
                criterion.prune(model, parameters - kept + basis_parameters)

        if criterion.when == "after training":
            _train(model, train, settings.epochs, settings.lr, settings, order, epoch_done)
            before = _accuracy(model, test)
            prune()
            _train(model, train, settings.finetune_epochs, settings.lr / 4, settings, order, epoch_done)
        else:
            prune()
            _train(model, train, settings.epochs, settings.lr, settings, order, epoch_done)
    left = report(model, train.images[:1]).prunable
    return Result(
        run=run,
        accuracy=_accuracy(model, test),
        accuracy_before_pruning=before,
        parameters=parameters,
        parameters_left=left.nonzeros + (0 if cuts else basis_parameters),
        basis_parameters=basis_parameters,
        spatial_layers=tuple(spatial_layers),
        seconds=time.perf_counter() - started,
        macs=macs,
        macs_left=left.macs_dense if cuts else None,
    )


def epochs_of(run: Run, settings: Settings) -> int:
    """How many epochs a run takes."""
    after = criteria.load(run.criterion).when == "after training"
    return settings.epochs + (settings.finetune_epochs if after else 0)


def _convert(model: nn.Module, run: Run, settings: Settings, budget: bool) -> list[str]:
    """Move to the interspace what can pay for its basis; returns the names of the convolutions that cannot.

    Without a budget nothing is to be paid for.
    """
    sharers: dict[object, list[tuple[str, int, int]]] = defaultdict(list)
    for layer in layers(model):
        shape = layer.coefficients.shape
        elements = shape[2:].numel()
        if elements > 1:
            key = layer.name if settings.sharing == "layer" else shape[2:]
            sharers[key].append((layer.name, shape.numel(), elements**2))
    converted: list[str] = []
    spatial: list[str] = []
    for members in sharers.values():
        available = (1 - run.sparsity) * sum(size for _, size, _ in members)
        pays = not budget or available > members[0][2]
        (converted if pays else spatial).extend(name for name, _, _ in members)
    if converted:
        interspace(model, basis=settings.basis, sharing=settings.sharing, layers=converted, seed=run.seed)
    return spatial


def _train(
    model: nn.Module, split: Split, epochs: int, lr: float, settings: Settings, order: torch.Generator, done: EpochDone
) -> None:
    if epochs == 0:
        return
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=settings.weight_decay), lr=lr, momentum=0.9)
    batches = -(-len(split.labels) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches, pct_start=0.15)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(split.labels), generator=order).split(settings.batch_size):
            batch = batch.to(split.labels.device)
            optimizer.zero_grad()
            F.cross_entropy(model(split.images[batch]), split.labels[batch]).backward()
            optimizer.step()
            schedule.step()
        done()


@torch.no_grad()
def _accuracy(model: nn.Module, split: Split) -> float:
    model.eval()
    hits = sum(
        int((model(images).argmax(1) == labels).sum())
        for images, labels in zip(split.images.split(1000), split.labels.split(1000), strict=True)
    )
    return 100 * hits / len(split.labels)


Outcomes: TypeAlias = Generator[tuple[Run, Result | Exception], None, None]
#: Runs cells, and yields each with its result or with what went wrong, as they finish. It is told the cells, their
#: settings, what to call when it begins a cell, and what to call after each epoch.
Engine: TypeAlias = Callable[[Sequence[Run], Settings, Callable[[Run], None], EpochDone], Outcomes]


def one_by_one(execute: Callable[[Run, Settings, EpochDone], Result]) -> Engine:
    """The engine that runs cells in this process, one after the other, by a function like `execute`."""

    def engine(
        runs: Sequence[Run], settings: Settings, began: Callable[[Run], None], epoch_done: EpochDone
    ) -> Outcomes:
        for run in runs:
            began(run)
            outcome: Result | Exception
            try:
                outcome = execute(run, settings, epoch_done)
            except Exception as error:
                outcome = error
            yield run, outcome

    return engine


here = one_by_one(execute)
