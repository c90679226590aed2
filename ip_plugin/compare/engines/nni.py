"""The engine that runs cells as an NNI experiment: one trial for each cell, on any of NNI's training services.

NNI 3.0 is imported when it is used. Its table of trials mixes up the parameters of trials that start at the same time,
so trials name the cell that they run in everything that they report.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ip_plugin.errors import StudyError

from ..config import Cell, Study
from ..record import Epoch, Record, versions
from . import EngineError, Records, Watcher, nni_trial
from .nni_experiment import portal, request, running

_ENDED = ("SUCCEEDED", "FAILED", "USER_CANCELED", "SYS_CANCELED", "EARLY_STOPPED")
_AGAIN = "Run the same command again: what has finished is kept."
#: Options of an experiment that the study sets.
_RESERVED = (
    "search_space", "search_space_file", "tuner", "assessor", "advisor", "trial_code_directory", "max_trial_number",
    "use_annotation",
)  # fmt: skip


@dataclass(frozen=True)
class NniEngine:
    """The engine that runs cells as the trials of an NNI experiment; results are those of the engine `local`.

    Attributes:
        config: file with the configuration of an NNI experiment (YAML), for its training service and limits; None is
            the local one. Search space, tuner, trial code and number of trials are the study's. A ``trialCommand``
            (where Python has another path) must run the module `ip_plugin.compare.engines.nni_trial`.
        port: of NNI's web portal; None is the first free one from 8080.
        concurrency: number of trials that run at once; None is what `config` says, or 1.
        name: of the experiment, in NNI's portal.
        announce: called with the address of the portal.

    Raises:
        StudyError: NNI is not installed, or cannot use the configuration.
    """

    config: Path | None = None
    port: int | None = None
    concurrency: int | None = None
    name: str | None = None
    announce: Callable[[str], None] = field(default=lambda _: None)

    def __post_init__(self) -> None:
        try:
            import nni  # noqa: F401
        except ImportError as error:
            remedy = 'run: pip install "ip-plugin[nni]"'
            raise StudyError("The engine nni must have NNI.", str(error), remedy) from error
        self._configured(["?"], Path.cwd())

    def __call__(self, cells: Sequence[Cell], study: Study, watcher: Watcher) -> Records:
        """Run cells, see `ip_plugin.compare.engines.Engine`."""
        if study.measure.keep:
            rule = "An NNI experiment must keep no files of runs: its trials report numbers."
            raise StudyError(rule, f"measure.keep is {study.measure.keep}", "leave it out, or use --engine dask")
        if not cells:
            return
        with tempfile.TemporaryDirectory(prefix="ip-plugin-trial-", ignore_cleanup_errors=True) as code:
            given = {"study": study.model_dump_json(), "versions": versions(), "path": sys.path, "folder": os.getcwd()}
            Path(code, nni_trial.STUDY).write_text(json.dumps(given), encoding="utf-8")
            config = self._configured([cell._asdict() for cell in cells], Path(code))
            with running(config, port=self.port) as experiment:
                self.announce(portal(experiment))
                yield from follow(experiment, cells, watcher)

    def _configured(self, choices: Sequence[object], code: Path) -> Any:
        """The experiment's configuration, checked."""
        from nni.experiment.config import AlgorithmConfig, ExperimentConfig
        from nni.experiment.config.utils import is_missing

        config = ExperimentConfig("local") if self.config is None else _load(self.config)
        config.search_space = {"combine_params": {"_type": "choice", "_value": list(choices)}}
        config.tuner = AlgorithmConfig(name="BatchTuner")
        config.max_trial_number = len(choices)
        config.trial_code_directory = code
        config.experiment_name = config.experiment_name or self.name
        if config.trial_command is None:
            config.trial_command = f"{shlex.quote(sys.executable)} -m {nni_trial.__name__}"
        if self.concurrency is not None:
            config.trial_concurrency = self.concurrency
        elif is_missing(config.trial_concurrency):
            config.trial_concurrency = 1
        try:
            config.validate()
        except Exception as error:
            found = str(error) or f"{type(error).__name__}, {config.trial_concurrency} trials at once"
            raise _refused(found) from error
        return config


def _load(path: Path) -> Any:
    """The user's configuration, which must not set what the study sets."""
    from nni.experiment.config import ExperimentConfig
    from nni.experiment.config.utils import is_missing, unset_base_path

    try:
        config = ExperimentConfig.load(path)
        if is_missing(config.training_service):
            config.training_service = ExperimentConfig("local").training_service
        services = config.training_service if isinstance(config.training_service, list) else [config.training_service]
        given = [name for name in _RESERVED if getattr(config, name) != getattr(ExperimentConfig(), name)]
        codes = [getattr(service, "trial_code_directory", None) for service in services]
        given += ["trial_code_directory"] * any(code is not None and not is_missing(code) for code in codes)
    except Exception as error:
        raise _refused(f"{str(path)!r}: {type(error).__name__}: {error}") from error
    finally:
        unset_base_path()  # after a file that it cannot load NNI does not, and then loads no other
    if given:
        rule = (
            "The configuration of an experiment must not set what the study sets: search space, tuner, trial code and "
            "number of trials."
        )
        raise StudyError(rule, f"{str(path)!r} sets {', '.join(given)}", "remove these lines from the file")
    return config


def _refused(found: str) -> StudyError:
    rule = "The engine nni must have a configuration that NNI accepts."
    return StudyError(rule, found, "correct the file of --nni-config, or --jobs")


@dataclass
class _Trial:
    """What is known of a trial, from its reports."""

    cell: Cell | None = None
    reports: int = 0  # how many have been read
    ended: float | None = None  # when it was first seen to have ended

    def read(self, reports: Sequence[dict[str, Any]], watcher: Watcher) -> Record | None:
        """Read the reports that are new; returns the record, if it is among them."""
        for report in reports[self.reports :]:
            self.reports += 1
            if self.cell is None:
                self.cell = Cell(**{name: report[name] for name in Cell._fields})
                watcher.on_begin(self.cell)
            if "record" in report:
                return Record.from_json(report["record"])
            if "epoch" in report:
                watcher.on_epoch(self.cell, Epoch(**report["epoch"]))
        return None

    def is_over(self, status: str, grace_seconds: float) -> bool:
        """Whether no more reports will arrive. The end of a trial may be known before its result."""
        if status not in _ENDED:
            return False
        self.ended = self.ended or time.monotonic()
        return status != "SUCCEEDED" or time.monotonic() - self.ended > grace_seconds


def follow(
    experiment: Any, cells: Sequence[Cell], watcher: Watcher, poll_seconds: float = 0.5, grace_seconds: float = 10.0
) -> Records:
    """Yield the record of each cell when its trial in a running `nni.experiment.Experiment` has ended.

    Args:
        cells, watcher: see `ip_plugin.compare.engines.Engine`.
        poll_seconds: time between two looks at the experiment.
        grace_seconds: time for the result of a trial that has succeeded to arrive.
    """
    waiting = dict.fromkeys(cells)
    trials: dict[str, _Trial] = {}
    done: set[str] = set()
    unnamed: list[str] = []  # failures of trials that never said which cell they ran
    while waiting:
        state, jobs, reports = _look(experiment, done)
        for job in jobs:
            trial = trials.setdefault(job.trialJobId, _Trial())
            record = trial.read(reports[job.trialJobId], watcher)
            if record is None and not trial.is_over(job.status, grace_seconds):
                continue
            done.add(job.trialJobId)
            if record is None and trial.cell is None:
                unnamed.append(_failure(experiment, job))
            elif trial.cell in waiting:
                del waiting[trial.cell]
                yield record or Record(trial.cell, traceback=_failure(experiment, job))
        if state["status"] in ("ERROR", "STOPPING", "STOPPED"):
            reasons = "; ".join(state["errors"]) or "it gave no reason"
            raise EngineError(f"The NNI experiment broke off with status {state['status']}: {reasons}. {_AGAIN}")
        if state["status"] == "DONE" and all(job.trialJobId in done for job in jobs):
            break
        time.sleep(poll_seconds)
    for cell in waiting:
        yield Record(cell, traceback=unnamed.pop(0) if unnamed else "No trial ran this cell.")


def _look(experiment: Any, done: set[str]) -> tuple[dict[str, Any], list[Any], dict[str, list[dict[str, Any]]]]:
    """The state of an experiment, its trials that are not done, and what each of them has reported of its cell."""
    try:
        state = json.loads(request(experiment, "check-status"))
        jobs = [job for job in experiment.list_trial_jobs() if job.trialJobId not in done]
        names = [job.trialJobId for job in jobs]
        data = {name: [metric.data for metric in experiment.get_job_metrics(name).get(name, [])] for name in names}
    except OSError as error:
        raise EngineError(f"The manager of the NNI experiment does not answer: {error}. {_AGAIN}") from error
    keys = set(Cell._fields)
    return state, jobs, {name: [d for d in data[name] if isinstance(d, dict) and keys <= set(d)] for name in names}


def _failure(experiment: Any, job: Any) -> str:
    """Why a trial has no record: the end of its error stream."""
    try:
        lines = request(experiment, f"trial-file/{job.trialJobId}/stderr").decode(errors="replace").strip().splitlines()
    except OSError:  # only some training services have it
        lines = []
    last = " / ".join(line.strip() for line in lines[-3:])
    return f"The trial ended as {job.status}; {f'its last words: {last}' if last else f'its files: {job.logPath}'}."
