"""What a study runs: its settings, and the grid of its cells."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Literal, NamedTuple, get_args

import torch

from ip_plugin.basis.bases import CONSTRAINTS, Constraint
from ip_plugin.errors import StudyError

from . import criteria as known_criteria
from . import deployment
from .tasks import TASKS

Basis = Literal["standard", "orthonormal", "dct"]
Sharing = Literal["layer", "model"]
Space = Literal["spatial", "interspace"]
SPACES: tuple[Space, ...] = get_args(Space)


class Cell(NamedTuple):
    """One cell of a study's grid: a criterion at a sparsity, in a space, with a seed."""

    criterion: str
    sparsity: float
    space: Space
    seed: int

    def __str__(self) -> str:
        return f"{self.criterion} at {self.sparsity:g}, {self.space}, seed {self.seed}"


@dataclass(frozen=True)
class Settings:
    """What all cells of a study have in common.

    Attributes:
        task: name of a task, see `ip_plugin.compare.tasks`.
        data: path of the task's data; None for a task that brings its own.
        train_images: how many of the training images are used, the same ones in every cell; None for all.
        basis, sharing, constraint: arguments of `ip_plugin.interspace`. On a network as small as the default one a
            basis for every layer takes a fifth of the budget at 98 % sparsity, so layers share one.
        epochs: epochs of a training.
        finetune_epochs: epochs of a fine-tuning, which has a quarter of the learning rate.
        batch_size, lr, weight_decay: of SGD with momentum 0.9 and a one-cycle schedule; bases have no weight decay.
        basis_lr: learning rate of the bases, as a multiple of `lr`.
        device: a torch device.
        deploy_threads: number of CPU threads with which the latency of every pruned network is measured, besides the
            bytes of its file; None measures neither. Needs the extra ``sparse``, and an engine that runs one cell at a
            time.
    """

    task: str = "digits"
    data: str | None = None
    train_images: int | None = None
    basis: Basis = "orthonormal"
    sharing: Sharing = "model"
    constraint: Constraint = "unit"
    epochs: int = 16
    finetune_epochs: int = 8
    batch_size: int = 100
    lr: float = 0.15
    weight_decay: float = 5e-4
    basis_lr: float = 1.0
    device: str = "cpu"
    deploy_threads: int | None = None

    def __post_init__(self) -> None:
        choices = {"task": TASKS, "basis": get_args(Basis), "sharing": get_args(Sharing), "constraint": CONSTRAINTS}
        for name, known in choices.items():
            _require(name, getattr(self, name), getattr(self, name) in known, f"be one of {', '.join(known)}")
        TASKS[self.task].check(self.data)
        lowest = {"epochs": 1, "batch_size": 1, "finetune_epochs": 0, "weight_decay": 0, "basis_lr": 0}
        for name, least in lowest.items():
            _require(name, getattr(self, name), getattr(self, name) >= least, f"be a number of at least {least}")
        _require("lr", self.lr, self.lr > 0, "be a number above 0")
        if self.train_images is not None:
            _require("train_images", self.train_images, self.train_images >= 1, "be a number of at least 1")
        if self.deploy_threads is not None:
            deployment.check_threads(self.deploy_threads)
        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            rule, found = "`device` must be a device that torch can use here.", str(error).splitlines()[0]
            remedy = "use cpu, or install a build of torch for the device"
            raise StudyError(rule, f"{self.device!r}: {found}", remedy) from error


@dataclass(frozen=True)
class Study:
    """A grid of cells with common settings.

    Raises:
        StudyError: an axis is empty, has a value twice, or an unknown value.

    >>> study = Study(sparsities=(0.9,), seeds=(0, 1))
    >>> len(study.cells()), str(study.cells()[0])
    (8, 'torch:random at 0.9, spatial, seed 0')
    """

    settings: Settings = field(default_factory=Settings)
    criteria: tuple[str, ...] = ("torch:random", "torch:l1")
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.98)
    spaces: tuple[Space, ...] = SPACES
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def __post_init__(self) -> None:
        for name in ("criteria", "sparsities", "spaces", "seeds"):
            axis = getattr(self, name)
            _require(name, axis, len(axis) > 0, "have at least one value")
            _require(name, axis, len(set(axis)) == len(axis), "have every value once")
        for criterion in self.criteria:
            known_criteria.load(criterion)
        for sparsity in self.sparsities:
            _require("sparsities", sparsity, 0 <= sparsity < 1, "be fractions of at least 0 and below 1")
        for space in self.spaces:
            _require("spaces", space, space in SPACES, f"be one of {', '.join(SPACES)}")
        for seed in self.seeds:
            _require("seeds", seed, seed >= 0, "be numbers of at least 0")

    def cells(self) -> list[Cell]:
        """Every cell of the grid: all cells of one seed before those of the next, the spaces of a pair in turn."""
        cells = product(self.seeds, self.criteria, self.sparsities, self.spaces)
        return [Cell(criterion, sparsity, space, seed) for seed, criterion, sparsity, space in cells]


def _require(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise StudyError(f"`{name}` must {rule}.", f"{value!r}", f"change {name.replace('_', '-')}")
