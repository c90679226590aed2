"""What ``ip-plugin compare`` does with a study on a terminal: run it, and show and report what has finished."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from . import report
from .callbacks import Callback, Progress, duration
from .config import Config
from .engines.local import Local
from .store import Results
from .study import check, engine_of, estimate, jobs_of, run

if TYPE_CHECKING:
    from rich.console import Console


class Report(Callback):
    """Writes the report again after every seed, unless that would take more than a twentieth of the time."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._next = 0.0

    def on_seed(self, results: Results, seed: int) -> None:  # noqa: ARG002
        """Write the report."""
        if results.missing and time.monotonic() >= self._next:
            began = time.monotonic()
            results.report(command=self._command)
            self._next = time.monotonic() + 20 * (time.monotonic() - began)


def run_and_show(
    described: Config, console: Console, command: str = "", *, retry_failed: bool = False, dry_run: bool = False
) -> int:
    """Run a study, and show what it says; returns the exit status: 1 if cells failed, 130 if it was stopped.

    Args:
        described: the study, and how it is run.
        console: where progress and tables are printed.
        command: how the study was started, for the report.
        retry_failed: also run the cells that failed before.
        dry_run: only say what would be run, and about how long it takes.

    Raises:
        StudyError, EngineError: as those of `ip_plugin.compare.run`.
    """
    how = described.run
    study = described.study()
    folder = Path(how.output or study.name)
    nni = {"config": how.nni_config and Path(how.nni_config), "port": how.nni_port} if how.engine == "nni" else {}
    engine = engine_of(how.engine, how.jobs, study, how.scheduler, **nni)
    if dry_run:
        check(study)
        known = Results.read(folder) if (folder / "study.json").exists() else Results(study, {}, folder)
        known.study = study
        cells = known.missing + (list(known.failures) if retry_failed else [])
        jobs = engine.jobs if isinstance(engine, Local) else jobs_of(how.jobs, study)
        seconds = estimate(study, cells, jobs, known)
        console.print(f"{len(study.cells())} runs, {len(study.cells()) - len(cells)} of them in {folder} already")
        console.print(f"about {duration(seconds)} with {how.engine}, {jobs} at once; nothing was run", highlight=False)
        return 0
    progress = Progress(console)
    stopped = False
    try:
        results = run(study, folder, engine=engine, callbacks=[progress, Report(command)], retry_failed=retry_failed)
    except KeyboardInterrupt:
        stopped = True
    finally:
        progress.close()
    if stopped:
        if not (folder / "study.json").exists():
            return 130
        results = Results.read(folder)
        results.study = study
    results.report(command=command)
    show(results, console)
    if stopped:
        console.print(f"stopped; what has finished is in {folder}, and the same command goes on from there")
        return 130
    return 1 if results.failures else 0


def show(results: Results, console: Console, folder: Path | None = None) -> None:
    """Print what the results say, which cells failed, and where everything is."""
    report.show(results.analysis(), console)
    for cell, text in results.failures.items():
        lines = text.strip().splitlines() or ["no reason"]  # the last lines of a StudyError: rule, Found, What to do
        reason = next((line.removeprefix("Found: ") for line in lines[-3:] if line.startswith("Found: ")), lines[-1])
        console.print(f"failed: {cell}: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
    if results.failures:
        console.print("Their tracebacks are in cells/; --retry-failed runs them again.")
    console.print(f"\nThe report is {Path(folder or results.folder) / 'report.html'}", highlight=False, soft_wrap=True)
