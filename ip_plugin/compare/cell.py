"""One run: train, prune and measure one network; and the engine that does it run by run.

The two spaces of a pair start from the same weights, see the same batches in the same order and keep the same number of
parameters: where ordinary pruning keeps k values, interspace pruning keeps k minus the numbers of its trained bases.
Where channels are cut both keep the same channels' number, and the network of the interspace is baked: it has no bases.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import nn

from ip_plugin import interspace, prunable, report
from ip_plugin.adapters import ChannelCriterion, ChannelTrainingCriterion, TrainingCriterion, cuts_channels
from ip_plugin.core.tensor_ref import prunable_tensors
from ip_plugin.errors import InvalidStudyError, LayerCollapseWarning
from ip_plugin.utils.seeds import derived_seed

from . import criteria
from .config import Run, Settings
from .deployment import Deployment, measure
from .tasks import TASKS, Split
from .training import Memory, Training, accuracy

EpochDone = Callable[[], None]


@dataclass(frozen=True)
class Result:
    """What a run measured.

    Attributes:
        run: which run.
        accuracy: share of the test images classified correctly at the end, in percent.
        accuracy_before_pruning: of the trained network before it was pruned; None where it was not pruned between
            training and fine-tuning.
        parameters: prunable parameters of the network.
        parameters_left: non-zeros among them at the end, with the numbers of trained bases where the network needs
            them (a network whose channels were cut is baked).
        basis_parameters: numbers of trained bases.
        spatial_layers: convolutions that stayed spatial because their budget would not pay for their basis.
        seconds: time of the run without what was measured for its deployment; short where a training was known from
            another one.
        macs: multiply-adds of the convolution and linear layers for one image, before pruning; None unless channels
            were cut.
        macs_left: after it.
        deployment: what the pruned network costs when it is deployed; None unless the settings ask for it.
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
    deployment: Deployment | None = None


def execute(run: Run, settings: Settings, epoch_done: EpochDone = lambda: None, memory: Memory | None = None) -> Result:
    """Run one cell of the grid. Equal arguments give equal results (on one machine, with one number of threads).

    Args:
        run: the cell.
        settings: of its study.
        epoch_done: called after each epoch; `epochs_of` says how often.
        memory: of runs with the same settings: a training that it knows is not done again, with the same result.

    Raises:
        InvalidStudyError: the network is too small for the sparsity, or latencies cannot be measured here.
    """
    started = time.perf_counter()
    criterion, task = criteria.load(run.criterion), TASKS[settings.task]
    cuts = cuts_channels(criterion)
    devices = [torch.device(settings.device)] if torch.device(settings.device).type == "cuda" else []
    train, test = (
        Split(*(tensor.to(settings.device) for tensor in split))
        for split in task.load(settings.data, settings.train_images)
    )
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore", LayerCollapseWarning)  # a study compares criteria as they are
        torch.manual_seed(run.seed)
        model = task.network().to(settings.device)
        dense = None if settings.deploy_threads is None else copy.deepcopy(model).eval()
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
        torch.manual_seed(derived_seed(run.seed, "pruning"))
        training = Training(model, train, task, settings, run.seed, epoch_done, memory)
        before = None

        def prune() -> None:
            if isinstance(criterion, ChannelCriterion):
                criterion.cut(model, run.sparsity, *training.batches(1)[0])
            elif isinstance(criterion, ChannelTrainingCriterion):
                criterion.train(model, run.sparsity, training)
            elif isinstance(criterion, TrainingCriterion):
                criterion.train(model, parameters - kept + basis_parameters, training)
            else:
                criterion.prune(model, parameters - kept + basis_parameters)

        if isinstance(criterion, (TrainingCriterion, ChannelTrainingCriterion)):
            prune()
        elif criterion.when == "after training":
            training.train()
            before = accuracy(model, test)
            prune()
            training.finetune()
        else:
            prune()
            training.train()
    left = report(model, train.images[:1]).prunable
    reached = accuracy(model, test)
    seconds = time.perf_counter() - started
    deployment = None
    if dense is not None and settings.deploy_threads is not None:
        deployment = measure(model, dense, test.images[:1], settings.deploy_threads)
    return Result(
        run=run,
        accuracy=reached,
        accuracy_before_pruning=before,
        parameters=parameters,
        parameters_left=left.nonzeros + (0 if cuts else basis_parameters),
        basis_parameters=basis_parameters,
        spatial_layers=tuple(spatial_layers),
        seconds=seconds,
        macs=macs,
        macs_left=left.macs_dense if cuts else None,
        deployment=deployment,
    )


def epochs_of(run: Run, settings: Settings) -> int:
    """How many epochs a run takes."""
    criterion = criteria.load(run.criterion)
    if isinstance(criterion, (TrainingCriterion, ChannelTrainingCriterion)):
        return criterion.trainings * settings.epochs + criterion.finetunings * settings.finetune_epochs
    return settings.epochs + (settings.finetune_epochs if criterion.when == "after training" else 0)


def _convert(model: nn.Module, run: Run, settings: Settings, budget: bool) -> list[str]:
    """Move to the interspace what can pay for its basis; returns the names of the convolutions that cannot.

    Without a budget nothing is to be paid for.
    """
    sharers: dict[object, list[tuple[str, int, int]]] = defaultdict(list)
    for layer in prunable_tensors(model):
        shape = layer.parameter.shape
        elements = shape[2:].numel()
        if elements > 1:
            key = layer.module_name if settings.sharing == "layer" else shape[2:]
            sharers[key].append((layer.module_name, shape.numel(), elements**2))
    converted: list[str] = []
    spatial: list[str] = []
    for members in sharers.values():
        available = (1 - run.sparsity) * sum(size for _, size, _ in members)
        pays = not budget or available > members[0][2]
        (converted if pays else spatial).extend(name for name, _, _ in members)
    if converted:
        how = {"basis": settings.basis, "sharing": settings.sharing, "constraint": settings.constraint}
        interspace(model, layers=converted, seed=run.seed, **how)  # type: ignore[arg-type]
    return spatial


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


def here(runs: Sequence[Run], settings: Settings, began: Callable[[Run], None], epoch_done: EpochDone) -> Outcomes:
    """The engine that runs cells in this process, one after the other; what they train alike is trained once."""
    yield from one_by_one(partial(execute, memory=Memory()))(runs, settings, began, epoch_done)
