"""One cell of a study: train, prune and measure one network.

The two spaces of a pair start from the same weights, see the same batches in the same order and keep the same number of
parameters: where ordinary pruning keeps k values, interspace pruning keeps k minus the size of its trained bases. Where
channels are removed, both spaces keep equally many; the network of the interspace is then baked, and has no bases.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import nn

from ip_plugin import interspace, prunable, report
from ip_plugin.adapters import Criterion
from ip_plugin.core.convert import basis_pays, groups_of
from ip_plugin.errors import LayerCollapseWarning, StudyError
from ip_plugin.utils.seeds import derived_seed

from . import criteria
from .config import DENSE, Cell, SpaceSpec, Study
from .deployment import measure
from .record import Record, Result
from .tasks import Split, task_of
from .training import OnEpoch, Training, TrainingCache, accuracy


def execute(cell: Cell, study: Study, on_epoch: OnEpoch = lambda _: None, cache: TrainingCache | None = None) -> Record:
    """Run one cell. Equal arguments give equal results (on one machine, with one number of threads).

    Args:
        cell, study: which cell, and its study.
        on_epoch: called after each epoch; `epochs_of` says how often.
        cache: of trainings of other cells of the study; it changes nothing but the time.

    Raises:
        StudyError: the network is too small for the sparsity, or latencies cannot be measured here.
    """
    started = time.perf_counter()
    criterion, (task, data) = criteria.load(cell.criterion), task_of(study)
    settings, space = study.training, SpaceSpec.parse(cell.space)
    train, test = (
        Split(*(tensor.to(settings.device) for tensor in split)) for split in task.load(data, study.data.train_images)
    )
    image = train.images[:1]
    with _seeded(cell.seed, settings.device):
        model = task.network().to(settings.device)
        dense = copy.deepcopy(model).eval()
        parameters = sum(getattr(*target).numel() for target in prunable(model))
        macs = report(model, image).prunable.macs_dense if criterion.removes_channels else None
        spatial_layers = _convert(model, cell, space, criterion) if space.kind == "interspace" else ()
        basis_parameters = report(model).prunable.basis_parameters
        amount = _amount(cell, criterion, parameters, basis_parameters)
        torch.manual_seed(derived_seed(cell.seed, "pruning"))
        training = Training(model, train, task, settings, cell.seed, on_epoch, cache)
        before = train_and_prune(criterion, amount, training, test)
    left = report(model, image).prunable
    reached = accuracy(model, test)
    seconds = time.perf_counter() - started
    threads = study.measure.deploy_threads
    costs = {} if threads is None else asdict(measure(model, dense, test.images[:1], threads))
    result = Result(
        accuracy=reached, accuracy_before_pruning=before, parameters=parameters,
        parameters_left=left.nonzeros + (0 if criterion.removes_channels or not amount else basis_parameters),
        basis_parameters=basis_parameters, spatial_layers=spatial_layers, seconds=seconds,
        macs=macs, macs_left=left.macs_dense if criterion.removes_channels else None, lr=settings.lr, **costs,
    )  # fmt: skip
    return Record(cell, result, curve=tuple(training.curve))


def train_and_prune(criterion: Criterion, amount: float, training: Training, test: Split) -> float | None:
    """Train, prune and fine-tune a network in the order that the criterion's stage says.

    Returns the accuracy on `test` before pruning, if the network is pruned between training and fine-tuning.
    """
    if criterion.stage != "after training":
        criterion.prune(training.model, amount, training)
        if criterion.stage == "at initialisation":
            training.train()
        return None
    training.train()
    before = accuracy(training.model, test)
    criterion.prune(training.model, amount, training)
    training.finetune()
    return before


def epochs_of(cell: Cell, study: Study) -> int:
    """Number of epochs that a cell takes."""
    criterion = criteria.load(cell.criterion)
    finetunings = 1 if criterion.stage == "after training" else criterion.finetunings
    return criterion.trainings * study.training.epochs + finetunings * study.training.finetune_epochs


@contextmanager
def _seeded(seed: int, device: str) -> Iterator[None]:
    """Random numbers from `seed`, and the random state restored afterwards; no warnings of layer collapse.

    A study compares criteria as they are, with the layers that they empty.
    """
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore", LayerCollapseWarning)
        torch.manual_seed(seed)
        yield


def _amount(cell: Cell, criterion: Criterion, parameters: int, basis_parameters: int) -> float:
    """The share of channels to remove, or the number of entries to prune, which pays for the bases."""
    if criterion.removes_channels or cell.criterion == DENSE:
        return cell.sparsity
    kept = round((1 - cell.sparsity) * parameters)
    if kept - basis_parameters < 1:
        found = f"{cell}: {kept} of {parameters} at sparsity {cell.sparsity:g}, {basis_parameters} of them in bases"
        raise StudyError(
            "A run must keep at least one parameter.",
            found,
            "compare at a lower sparsity",
        )
    return parameters - kept + basis_parameters


def check_budgets(study: Study) -> None:
    """Raise StudyError for the first cell of a study whose budget is smaller than its bases, before anything runs."""
    task, data = task_of(study)
    task.check(data)
    model = task.network()
    parameters = sum(getattr(*target).numel() for target in prunable(model))
    for cell in Study.model_copy(study, update={"seeds": study.seeds[:1]}).cells():
        criterion, space = criteria.load(cell.criterion), SpaceSpec.parse(cell.space)
        network = copy.deepcopy(model)
        if space.kind == "interspace":
            _convert(network, cell, space, criterion)
        _amount(cell, criterion, parameters, report(network).prunable.basis_parameters)


def _convert(model: nn.Module, cell: Cell, space: SpaceSpec, criterion: Criterion) -> tuple[str, ...]:
    """Move layers to the interspace; returns the names of the convolutions that stay spatial.

    A group of layers stays spatial if its basis has more parameters than the sparsity leaves to the group. Where
    channels are removed, bases cost nothing.
    """
    converted: list[str] = []
    spatial: list[str] = []
    share = math.inf if criterion.removes_channels else 1 - cell.sparsity
    for members in groups_of(model, space.sharing):
        names = converted if basis_pays(members, share) else spatial
        names.extend(layer.module_name for layer in members)
    if converted:
        options = {name: getattr(space, name) for name in ("basis", "sharing", "constraint")}
        interspace(model, layers=converted, seed=cell.seed, **options)
    return tuple(spatial)
