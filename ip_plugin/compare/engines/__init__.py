"""Engines run the cells of a study: in this process (`local`), in several (`processes`), by NNI (`nni`)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Protocol, TypeAlias

from ..cell import EpochDone, Result
from ..config import Cell, Settings

Began: TypeAlias = Callable[[Cell], None]
#: Each cell with its result, or with the error with which it failed, as they finish.
Outcomes: TypeAlias = Generator[tuple[Cell, Result | Exception], None, None]


class EngineError(RuntimeError):
    """An engine could not start, or broke off; or a cell that ran in another process failed there."""


class Engine(Protocol):
    """Runs cells."""

    def __call__(self, cells: Sequence[Cell], settings: Settings, began: Began, epoch_done: EpochDone) -> Outcomes:
        """Run cells.

        Args:
            cells, settings: which cells, and the settings of their study.
            began: called when a cell begins.
            epoch_done: called after each epoch of each cell.

        Yields:
            Each cell with its result, or with the error with which it failed, as they finish. Closing the generator
            stops the rest.

        Raises:
            EngineError: the engine could not start, or broke off; what was yielded before is valid.
            StudyError: the settings ask for latencies, and cells may run at the same time.
        """
