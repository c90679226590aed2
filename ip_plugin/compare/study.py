"""A whole study: check it, run the cells that are missing, and keep their records."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from ip_plugin.errors import StudyError

from .callbacks import Callback, open_callbacks
from .cell import check_budgets, epochs_of, execute
from .config import DENSE, Cell, Study
from .deployment import check_threads
from .engines import Engine
from .engines.dask import Dask
from .engines.local import Local
from .engines.nni import NniEngine
from .store import Results
from .tuning import with_rates


def run(
    study: Study,
    folder: str | os.PathLike[str] | None = None,
    *,
    engine: str | Engine = "local",
    jobs: int | None = None,
    callbacks: Sequence[Callback] = (),
    retry_failed: bool = False,
) -> Results:
    """Run a study in a folder.

    Cells whose records the folder holds are not run again. A cell that fails keeps its traceback, and the others go on.

    Args:
        study: what to run.
        folder: made if it does not exist; by default one with the name of the study.
        engine: ``"local"``, ``"dask"`` (a cluster on this machine), ``"nni"``, or an engine, such as
            ``Dask("tcp://host:8786")``.
        jobs: cells that run at once; by default one for each core on a CPU, and one where latencies are measured or
            the device is not the CPU.
        callbacks: are told what happens, see `Callback`.
        retry_failed: also run the cells that failed before.

    Returns:
        The results of the study.

    Raises:
        StudyError: the study cannot run as it is, or the folder belongs to something else; nothing has changed.
        EngineError: the engine could not start, or broke off. What has finished is kept.

    >>> import tempfile
    >>> from ip_plugin.compare import Study, run
    >>> quick = {"epochs": 1, "finetune_epochs": 0}
    >>> study = Study(criteria=("torch:l1",), sparsities=(0.9,), seeds=(0,), training=quick)
    >>> results = run(study, tempfile.mkdtemp(), jobs=1)
    >>> results.frame()[["criterion", "space", "parameters_left"]]
      criterion       space  parameters_left
    0     dense     spatial            56224
    1     dense  interspace            56224
    2  torch:l1     spatial             5622
    3  torch:l1  interspace             5622
    """
    runner = engine if not isinstance(engine, str) else engine_of(engine, jobs, study)
    check(study)
    with Results.open(Path(folder or study.name), study) as results:
        told = _Told([*callbacks, *open_callbacks(study, results.folder)])
        cells = results.missing + (list(results.failures) if retry_failed else [])
        left = {seed: sum(cell.seed == seed for cell in cells) for seed in study.seeds}
        told.on_study(results, cells)
        known = {record.cell.space: record.result.lr for record in results.records.values() if record.result}
        tuned = with_rates(study, {space: lr for space, lr in known.items() if lr}) if cells else study
        with closing(runner(cells, tuned, told)) as records:
            for record in records:
                results.add(record)
                told.on_cell(results, record)
                left[record.cell.seed] -= 1
                if not left[record.cell.seed]:
                    told.on_seed(results, record.cell.seed)
    return results


class _Told(Callback):
    """Several callbacks as one."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        for name in ("on_study", "on_begin", "on_epoch", "on_cell", "on_seed"):
            setattr(self, name, self._all([getattr(callback, name) for callback in callbacks]))

    @staticmethod
    def _all(methods: list[object]) -> object:
        def tell(*arguments: object) -> None:
            for method in methods:
                method(*arguments)  # type: ignore[operator]

        return tell


def jobs_of(jobs: int | None, study: Study) -> int:
    """The number of cells that run at once."""
    alone = study.training.device != "cpu" or study.measure.deploy_threads is not None
    if jobs is not None and jobs > 1 and study.measure.deploy_threads is not None:
        rule = "Latencies must be measured with nothing else running."
        raise StudyError(rule, f"{jobs} jobs at once", "leave out --jobs with --deploy-threads")
    return jobs or (1 if alone else max(1, len(_cores()) // study.training.threads))


def _cores() -> Sequence[int]:
    return list(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def engine_of(name: str, jobs: int | None, study: Study, scheduler: str | None = None, **nni: object) -> Engine:
    """An engine by its name."""
    if name != "local" and study.measure.deploy_threads is not None:
        rule = "Latencies must be measured with nothing else running."
        raise StudyError(rule, f"the engine {name}, whose cells may run together", "use --engine local")
    if name == "local":
        return Local(jobs_of(jobs, study))
    if name == "dask":
        if scheduler is not None and jobs is not None:
            raise StudyError("A Dask scheduler has its own workers.", f"{jobs} jobs", "leave out --jobs or --scheduler")
        return Dask(scheduler, jobs_of(jobs, study))
    if name == "nni":
        return NniEngine(concurrency=jobs, name=study.name, **nni)  # type: ignore[arg-type]
    raise StudyError("An engine must be local, dask or nni.", f"{name!r}", "use one of these names")


def check(study: Study) -> None:
    """Find what cannot run before anything does.

    Raises:
        StudyError: a budget is smaller than the bases, data or device are not there, or latencies cannot be measured.
    """
    if study.measure.deploy_threads is not None:
        check_threads(study.measure.deploy_threads)
    device = study.training.device
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        rule, found = "`device` must be a device that torch can use here.", str(error).splitlines()[0]
        remedy = "use cpu, or install a build of torch for the device"
        raise StudyError(rule, f"{device!r}: {found}", remedy) from error
    check_budgets(study)


def estimate(study: Study, cells: Sequence[Cell], jobs: int, known: Results | None = None) -> float:
    """Seconds that cells take: by the records of other cells, or by two epochs that are run here."""
    epochs = sum(epochs_of(cell, study) for cell in cells)
    done = [record for record in (known.records.values() if known else ()) if record.result and record.curve]
    if done:
        spent = sum(record.result.seconds for record in done if record.result)
        return spent / sum(len(record.curve) for record in done) * epochs / jobs
    short = study.changed({"training.epochs": 2, "training.finetune_epochs": 0, "tune.learning_rates": ()})
    record = execute(Cell(DENSE, 0.0, study.spaces[-1], study.seeds[0]), short)
    assert record.result is not None
    first, second = (epoch.seconds for epoch in record.curve)
    once = record.result.seconds - second  # data, conversion and test
    return ((second - first) * epochs + once * len(cells)) / jobs
