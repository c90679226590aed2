"""A whole study: run the cells that are missing, keep their results, and show what they say."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import report
from .analysis import Analysis
from .cell import epochs_of
from .config import Cell, Study
from .engines import Engine
from .engines.local import local
from .store import Results


def compare(
    study: Study, folder: Path, console: Console, *, command: str = "", engine: Engine = local
) -> Mapping[Cell, Exception]:
    """Run a study in a folder and write ``results.csv``, ``accuracy.png``, ``accuracy.svg`` and ``report.html`` there.

    Cells whose results the folder holds are not run again. A cell that fails is reported, and the others go on.

    Args:
        study: what to run.
        folder: made if it does not exist.
        console: where progress, tables and remarks are printed.
        command: how the study was started, for the report.
        engine: runs the cells that are missing.

    Returns:
        The errors of the cells that failed.

    Raises:
        StudyError: the folder belongs to something else; nothing has changed.
        EngineError: the engine could not start, or broke off. What has finished is kept.
    """
    with Results.open(folder, study.settings) as results:
        failures = _run(study, results, console, engine)
        analysis = Analysis(study, results.rows)
        report.write(analysis, results.folder, command)
    report.show(analysis, console)
    for cell, failure in failures.items():
        console.print(f"failed: {cell}: {type(failure).__name__}: {failure}", style="red", markup=False)
    console.print(f"\nEverything is in {folder}: results.csv, accuracy.png, accuracy.svg, report.html")
    return failures


def _run(study: Study, results: Results, console: Console, engine: Engine) -> dict[Cell, Exception]:
    """Run the cells that are missing, and keep their results; returns the errors of those that failed."""
    failures: dict[Cell, Exception] = {}
    cells = study.cells()
    missing = [cell for cell in cells if cell not in results.rows]
    if len(missing) < len(cells):
        console.print(f"{len(cells) - len(missing)} of {len(cells)} runs are in {results.folder} already")
    epochs = {cell: epochs_of(cell, study.settings) for cell in cells}
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console,
    ) as progress:  # fmt: skip
        finished = sum(epochs[cell] for cell in cells if cell not in missing)
        bar = progress.add_task("", total=sum(epochs.values()), completed=finished)

        def began(cell: Cell) -> None:
            progress.update(bar, description=f"{cells.index(cell) + 1}/{len(cells)} {cell}")

        with closing(engine(missing, study.settings, began, lambda: progress.advance(bar))) as outcomes:
            for cell, outcome in outcomes:
                if isinstance(outcome, Exception):
                    failures[cell] = outcome
                else:
                    results.add(outcome)
    return failures
