"""What a study runs: its settings, and the grid of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Literal, NamedTuple, get_args

import torch

from ip_plugin.basis.bases import CONSTRAINTS, Constraint
from ip_plugin.errors import InvalidStudyError

from . import criteria as known_criteria
from . import deployment
from .tasks import TASKS

Space = Literal["spatial", "interspace"]
SPACES: tuple[Space, ...] = get_args(Space)


class Run(NamedTuple):
    """One cell of the grid."""

    criterion: str
    sparsity: float
    space: Space
    seed: int

    def __str__(self) -> str:
        return f"{self.criterion} at {self.sparsity:g}, {self.space}, seed {self.seed}"


@dataclass(frozen=True)
class Settings:
    """What two runs must have in common to be compared.

    Attributes:
        task: name of a task, see `ip_plugin.compare.tasks`.
        data: where the task's data lies; None for a task that brings its own.
        train_images: how many of the training images are used, the same ones in every run; None for all.
        basis, sharing, constraint: as `ip_plugin.interspace` takes them. On a network as small as the default one a
            basis for every layer costs a fifth of the budget at 98 % sparsity, so layers share one.
        epochs: of training.
        finetune_epochs: after pruning a trained network, with a quarter of the learning rate.
        batch_size, lr, weight_decay: of SGD with momentum 0.9 and a one-cycle schedule; bases have no weight decay.
        basis_lr: learning rate of the bases, as a multiple of `lr`.
        device: as torch names it.
        deploy_threads: measure bytes and latency of every pruned network, with so many threads of the CPU; None does
            not. Needs the extra ``sparse``, and an engine that runs one cell at a time.
    """

    task: str = "digits"
    data: str | None = None
    train_images: int | None = None
    basis: Literal["standard", "orthonormal", "dct"] = "orthonormal"
    sharing: Literal["layer", "model"] = "model"
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
        _require("task", self.task in TASKS, self.task, f"one of {', '.join(TASKS)}")
        bases = ("standard", "orthonormal", "dct")
        _require("basis", self.basis in bases, self.basis, f"one of {', '.join(bases)}")
        constraints = ", ".join(CONSTRAINTS)
        _require("constraint", self.constraint in CONSTRAINTS, self.constraint, f"one of {constraints}")
        _require("sharing", self.sharing in ("layer", "model"), self.sharing, "layer or model")
        TASKS[self.task].check(self.data)
        if self.train_images is not None:
            _require("train_images", self.train_images >= 1, self.train_images, "a number of at least 1")
        for name in ("epochs", "batch_size"):
            _require(name, getattr(self, name) >= 1, getattr(self, name), "a number of at least 1")
        for name in ("finetune_epochs", "weight_decay", "basis_lr"):
            _require(name, getattr(self, name) >= 0, getattr(self, name), "a number of at least 0")
        _require("lr", self.lr > 0, self.lr, "a number above 0")
        if self.deploy_threads is not None:
            deployment.check_threads(self.deploy_threads)
        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InvalidStudyError(
                "`device` must be a device that torch can use here.",
                f"{self.device!r}: {reason}",
                "use cpu, or install a build of torch for the device",
            ) from error


@dataclass(frozen=True)
class Study:
    """A grid of runs with common settings.

    Raises:
        InvalidStudyError: an axis is empty, holds something twice, or something unknown.

    >>> study = Study(sparsities=(0.9,), seeds=(0, 1))
    >>> len(study.runs()), str(study.runs()[0])
    (8, 'torch:random at 0.9, spatial, seed 0')
    """

    settings: Settings = field(default_factory=Settings)
    criteria: tuple[str, ...] = ("torch:random", "torch:l1")
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.98)
    spaces: tuple[Space, ...] = SPACES
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self)[1:]):
            axis: Sequence[object] = getattr(self, name)
            _require(name, len(axis) > 0, "nothing", "at least one value")
            _require(name, len(set(axis)) == len(axis), axis, "each value once")
        for criterion in self.criteria:
            known_criteria.load(criterion)
        for sparsity in self.sparsities:
            _require("sparsities", 0 <= sparsity < 1, sparsity, "fractions of at least 0 and below 1")
        for space in self.spaces:
            _require("spaces", space in SPACES, space, f"one of {', '.join(SPACES)}")
        for seed in self.seeds:
            _require("seeds", seed >= 0, seed, "numbers of at least 0")

    def runs(self) -> list[Run]:
        """Every cell of the grid: the two spaces of a pair one after the other, everything before the next seed."""
        cells = product(self.seeds, self.criteria, self.sparsities, self.spaces)
        return [Run(criterion, sparsity, space, seed) for seed, criterion, sparsity, space in cells]


def _require(name: str, holds: bool, found: object, expected: str) -> None:
    if not holds:
        raise InvalidStudyError(f"`{name}` must be {expected}.", f"{found!r}", f"change {name.replace('_', '-')}")
