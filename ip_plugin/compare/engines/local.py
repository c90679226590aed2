"""The engine that runs one cell after the other in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ..cell import EpochDone, Result, execute
from ..config import Cell, Settings
from ..training import TrainingCache
from . import Began, Engine, Outcomes


def one_by_one(execute: Callable[[Cell, Settings, EpochDone], Result]) -> Engine:
    """The engine that runs each cell by a function like `execute`."""

    def engine(cells: Sequence[Cell], settings: Settings, began: Began, epoch_done: EpochDone) -> Outcomes:
        for cell in cells:
            began(cell)
            outcome: Result | Exception
            try:
                outcome = execute(cell, settings, epoch_done)
            except Exception as error:
                outcome = error
            yield cell, outcome

    return engine


def local(cells: Sequence[Cell], settings: Settings, began: Began, epoch_done: EpochDone) -> Outcomes:
    """The engine of a study by default; trainings that cells have in common are done once."""
    return one_by_one(partial(execute, cache=TrainingCache()))(cells, settings, began, epoch_done)
