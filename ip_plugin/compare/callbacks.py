"""What can be done while a study runs: progress, logs for TensorBoard, and what a user brings."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .config import DENSE, Cell, Study
from .record import Epoch, Record

if TYPE_CHECKING:
    from rich.console import Console

    from .store import Results


class Callback:
    """Is told what happens in a study; the methods do nothing, and those that are needed are overridden.

    Each epoch and each result to MLflow::

        class MLflow(Callback):
            def on_epoch(self, cell, epoch):
                mlflow.log_metric(f"loss of {cell}", epoch.loss, step=epoch.epoch)

            def on_cell(self, results, record):
                if record.result is not None:
                    mlflow.log_metric(f"accuracy of {record.cell}", record.result.accuracy)

    They are called in the process that runs the study, whatever the engine. An exception in one ends the study; what
    has finished is kept.
    """

    def on_study(self, results: Results, cells: list[Cell]) -> object:
        """The study begins: `cells` will be run; `results` holds the others."""

    def on_begin(self, cell: Cell) -> object:
        """A cell begins."""

    def on_epoch(self, cell: Cell, epoch: Epoch) -> object:
        """An epoch of a cell has ended."""

    def on_cell(self, results: Results, record: Record) -> object:
        """A cell has ended, and its record is in `results` and on the disk."""

    def on_seed(self, results: Results, seed: int) -> object:
        """All cells of a seed have ended."""


class TensorBoard(Callback):
    """Writes the training curve and the result of each cell to a folder for TensorBoard.

    Args:
        folder: has a subfolder for each cell.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Callable[[str], SummaryWriter] = SummaryWriter
        self._folder = folder

    def on_cell(self, results: Results, record: Record) -> None:  # noqa: ARG002
        """Write the curve of a cell."""
        cell = record.cell
        path = Path(cell.criterion.replace(":", "-"), f"{cell.sparsity:g}", cell.space, f"seed {cell.seed}")
        with self._writer(str(self._folder / path)) as writer:
            for epoch in record.curve:
                for name in ("loss", "lr", "accuracy"):
                    if getattr(epoch, name) is not None:
                        writer.add_scalar(name, getattr(epoch, name), epoch.epoch)
            if record.result is not None:
                writer.add_scalar("test accuracy", record.result.accuracy, len(record.curve))


class Progress(Callback):
    """Shows progress over cells with the time left and the best so far: a bar on a terminal, else a line for each cell.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def on_study(self, results: Results, cells: list[Cell]) -> None:
        """Begin."""
        from rich import progress

        from .cell import epochs_of

        study = results.study
        self._epochs = {cell: epochs_of(cell, study) for cell in cells}
        self._done = dict.fromkeys(cells, 0)
        self._ended = 0
        self._began = time.monotonic()
        self._best: Record | None = None
        for record in results.records.values():
            self._compare(record)
        self._bar: progress.Progress | None = None
        if self._console.is_terminal and cells:
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TaskProgressColumn(),
                progress.TimeElapsedColumn(), console=self._console,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=sum(self._epochs.values()))
            self._bar.start()
        known = len(study.cells()) - len(cells)
        if known:
            self._console.print(f"{known} of {len(study.cells())} runs are in {results.folder} already")

    def close(self) -> None:
        """Remove the bar."""
        if getattr(self, "_bar", None) is not None:
            self._bar.stop()  # type: ignore[union-attr]

    def on_begin(self, cell: Cell) -> None:
        """A cell begins, perhaps again, as its worker was killed."""
        self._done[cell] = 0

    def on_epoch(self, cell: Cell, epoch: Epoch) -> None:  # noqa: ARG002
        """Move the bar."""
        self._done[cell] = min(self._epochs[cell], self._done[cell] + 1)
        self._show(str(cell))

    def on_cell(self, results: Results, record: Record) -> None:  # noqa: ARG002
        """Move the bar, or print a line."""
        cell = record.cell
        self._ended += 1
        self._done[cell] = self._epochs[cell]
        self._compare(record)
        if self._bar is None:
            outcome = "failed" if record.result is None else f"{record.result.accuracy:.1f} %"
            line = f"{self._ended}/{len(self._epochs)} {cell}: {outcome}; {self._left()}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._show(str(cell))

    def _left(self) -> str:
        """The time left, and the best result so far."""
        done, total = sum(self._done.values()), sum(self._epochs.values())
        seconds = (time.monotonic() - self._began) * (total - done) / max(1, done)
        best = self._best
        return f"{duration(seconds)} left" + (f"; best {_accuracy(best):.1f} %: {best.cell}" if best else "")

    def _compare(self, record: Record) -> None:
        """Keep the record of the most accurate network that is pruned."""
        if record.result is not None and record.cell.criterion != DENSE:
            self._best = record if self._best is None else max(self._best, record, key=_accuracy)

    def _show(self, text: str) -> None:
        if self._bar is not None:
            text = f"{self._ended}/{len(self._epochs)} {text}; {self._left()}"
            self._bar.update(self._task, completed=sum(self._done.values()), description=text)


def _accuracy(record: Record) -> float:
    assert record.result is not None
    return record.result.accuracy


def duration(seconds: float) -> str:
    """Seconds as a reader says it.

    >>> duration(42), duration(3725)
    ('42 s', '1:02 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"


def open_callbacks(study: Study, folder: Path) -> list[Callback]:
    """The callbacks that a study asks for itself."""
    return [TensorBoard(folder / "tensorboard")] if study.measure.tensorboard else []
