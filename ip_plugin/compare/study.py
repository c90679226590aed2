"""A whole study: run what is missing, keep it, show it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ip_plugin.utils.atomic import write_whole

from . import report
from .cell import Engine, epochs_of, here
from .config import Run, Study
from .costs import costs
from .costs import remarks as cost_remarks
from .pairs import pairs
from .pairs import remarks as variety_remarks
from .store import Results


def compare(
    study: Study,
    folder: Path,
    console: Console,
    *,
    command: str = "",
    engine: Engine = here,
) -> Mapping[Run, Exception]:
    """Run a study in a folder and write ``results.csv``, ``accuracy.png``, ``accuracy.svg`` and ``report.html`` there.

    Runs that the folder holds already are not run again. A run that fails is reported, and the others go on.

    Args:
        study: what to run.
        folder: made if it is not there.
        console: where progress and the table go.
        command: how the study was started, for the report.
        engine: runs the cells that are missing.

    Returns:
        What failed.

    Raises:
        ForeignFolderError: the folder belongs to something else; nothing has changed.
        ExperimentError, PortInUseError: of the engine nni. What has finished is kept.
    """
    failures: dict[Run, Exception] = {}
    with Results.open(folder, study.settings) as results:
        runs = study.runs()
        missing = [run for run in runs if run not in results.rows]
        if len(missing) < len(runs):
            console.print(f"{len(runs) - len(missing)} of {len(runs)} runs are in {folder} already")
        with _progress(console) as progress:
            epochs = {run: epochs_of(run, study.settings) for run in runs}
            bar = progress.add_task(
                "", total=sum(epochs.values()), completed=sum(epochs[r] for r in runs if r not in missing)
            )

            def began(run: Run) -> None:
                progress.update(bar, description=f"{runs.index(run) + 1}/{len(runs)} {run}")

            cells = engine(missing, study.settings, began, lambda: progress.advance(bar))
            with closing(cells):
                for run, outcome in cells:
                    if isinstance(outcome, Exception):
                        failures[run] = outcome
                    else:
                        results.add(outcome)
        write(study, results, command)
    lines = report.summarize(study, results.rows)
    console.print(report.table(study, lines))
    found = pairs(study, results.rows)
    if found:
        console.print(report.variety_table(found))
    measured = costs(study, results.rows)
    if measured:
        console.print(report.cost_table(study, measured))
    for remark in (*report.remarks(lines), *variety_remarks(found), *cost_remarks(measured)):
        console.print(f"- {remark}")
    for run, failure in failures.items():
        console.print(f"failed: {run}: {type(failure).__name__}: {failure}", style="red", markup=False)
    console.print(f"\nEverything is in {folder}: results.csv, accuracy.png, accuracy.svg, report.html")
    return failures


def write(study: Study, results: Results, command: str) -> None:
    """Write the plot and the page of what a folder holds of a study."""
    lines = report.summarize(study, results.rows)
    figure = report.plot(study, lines)
    svg = report.image(figure, "svg")
    write_whole(results.folder / "accuracy.png", report.image(figure, "png"))
    write_whole(results.folder / "accuracy.svg", svg)
    found, measured = pairs(study, results.rows), costs(study, results.rows)
    page = report.page(study, lines, found, measured, svg.decode(), command)
    write_whole(results.folder / "report.html", page)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console,
    )  # fmt: skip
