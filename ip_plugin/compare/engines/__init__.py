"""Engines run the cells of a study: on this machine (`local`), on a Dask cluster (`dask`), by NNI (`nni`)."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Generator, Sequence
from functools import lru_cache
from typing import Protocol, TypeAlias

import torch

from ip_plugin.errors import StudyError

from .. import cell as cells
from ..config import Cell, Study
from ..record import Epoch, Record, versions
from ..training import OnEpoch, TrainingCache

#: The record of each cell as it ends.
Records: TypeAlias = Generator[Record, None, None]


class EngineError(RuntimeError):
    """An engine could not start, or broke off."""


class Watcher(Protocol):
    """What an engine tells while cells run."""

    def on_begin(self, cell: Cell) -> object:
        """A cell begins."""

    def on_epoch(self, cell: Cell, epoch: Epoch) -> object:
        """An epoch of a cell has ended."""


class Engine(Protocol):
    """Runs cells."""

    def __call__(self, cells: Sequence[Cell], study: Study, watcher: Watcher) -> Records:
        """Run cells.

        Args:
            cells, study: which cells, and their study.
            watcher: is told when cells begin, and of their epochs.

        Yields:
            The record of each cell as it ends; that of one that fails has the traceback. Closing the generator stops
            the rest.

        Raises:
            EngineError: the engine could not start, or broke off; what was yielded before is valid.
        """


def attempt(cell: Cell, study: Study, on_epoch: OnEpoch, cache: TrainingCache | None = None) -> Record:
    """The record of a cell, run here with the study's number of threads; with a traceback if it fails."""
    threads = torch.get_num_threads()
    torch.set_num_threads(study.training.threads)
    try:
        return cells.execute(cell, study, on_epoch, cache)
    except Exception:
        return Record(cell, traceback=traceback.format_exc())
    finally:
        torch.set_num_threads(threads)


#: Cells take torch's random state: two of them must not run in threads of one process.
_ONE = threading.Lock()


@lru_cache(maxsize=1)
def _study(text: str) -> tuple[Study, TrainingCache]:
    return Study.model_validate_json(text), TrainingCache()


def attempt_elsewhere(cell: Cell, text: str, made_with: dict[str, str], on_epoch: OnEpoch) -> Record:
    """As `attempt`, in a process to which the study came as JSON.

    Args:
        cell: which cell.
        text: the study.
        made_with: versions of where the study is; here they must be the same.
        on_epoch: called after each epoch.
    """
    with _ONE:
        try:
            if versions() != made_with:
                rule = "Every process must have the versions of the study."
                raise StudyError(rule, f"{versions()} instead of {made_with}", "install the same versions everywhere")
            study, cache = _study(text)
        except Exception:
            return Record(cell, traceback=traceback.format_exc())
        return attempt(cell, study, on_epoch, cache)
