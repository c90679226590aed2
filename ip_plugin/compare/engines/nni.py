"""Running a study's grid as an NNI experiment: one trial for each cell, on any of NNI's training services.

NNI 3.0 is imported when it is used. Its table of trials mixes up the parameters of trials that start at the same time:
here trials say themselves what they ran.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from ip_plugin.errors import ExperimentError, InvalidStudyError, TrialFailedError

from ..cell import Outcomes, Result
from ..config import Run, Settings
from ..deployment import check_alone
from ..store import versions
from . import nni_trial
from .nni_experiment import portal, running

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 10.0  # a trial's end may be known before its result
_ENDED = ("SUCCEEDED", "FAILED", "USER_CANCELED", "SYS_CANCELED", "EARLY_STOPPED")
_OURS = (
    "search_space", "search_space_file", "tuner", "assessor", "advisor", "trial_code_directory", "max_trial_number",
    "use_annotation",
)  # fmt: skip


@dataclass(frozen=True)
class NniEngine:
    """Runs cells of a grid as the trials of an NNI experiment. What it yields is what running them here would yield.

    Attributes:
        config: file with the configuration of an NNI experiment (YAML), for its training service and limits; None is
            the local one. Search space, tuner, trial code and number of trials are the study's. A ``trialCommand``
            (where Python has another path) must run the module `ip_plugin.compare.engines.nni_trial`.
        port: of NNI's web portal; None is the first free one from 8080.
        concurrency: how many trials run at once; None is what `config` says, or 1.
        announce: told the address of the portal.

    Raises:
        InvalidStudyError: NNI is not installed, or cannot use the configuration.
    """

    config: Path | None = None
    port: int | None = None
    concurrency: int | None = None
    announce: Callable[[str], None] = field(default=lambda _: None)

    def __post_init__(self) -> None:
        try:
            import nni  # noqa: F401
        except ImportError as error:
            raise InvalidStudyError(
                "The engine nni must have NNI.", str(error), 'run: pip install "ip-plugin[nni]"'
            ) from error
        self._configured(["?"], Path.cwd())

    def __call__(
        self, runs: Sequence[Run], settings: Settings, began: Callable[[Run], None], epoch_done: Callable[[], None]
    ) -> Outcomes:
        """Run cells, and yield each with its result or with what went wrong, as they finish.

        Args:
            runs: the cells.
            settings: of their study.
            began: called when a cell is begun.
            epoch_done: called after each epoch of each.

        Raises:
            ExperimentError: NNI could not start, or broke off.
            PortInUseError: the port asked for is in use.
            InvalidStudyError: latencies are to be measured.
        """
        check_alone(settings.deploy_threads, "the engine nni, whose trials may run together")
        if not runs:
            return
        with tempfile.TemporaryDirectory(prefix="ip-plugin-trial-", ignore_cleanup_errors=True) as code:
            data = None if settings.data is None else str(Path(settings.data).resolve())
            given = {
                "settings": asdict(replace(settings, data=data)),
                "versions": versions(),
                "threads": torch.get_num_threads(),
            }
            Path(code, nni_trial.SETTINGS).write_text(json.dumps(given), encoding="utf-8")
            with running(self._configured([run._asdict() for run in runs], Path(code)), port=self.port) as experiment:
                self.announce(portal(experiment))
                yield from _follow(experiment, runs, began, epoch_done)

    def _configured(self, cells: Sequence[object], code: Path) -> Any:
        """The experiment's configuration, checked."""
        from nni.experiment.config import AlgorithmConfig, ExperimentConfig
        from nni.experiment.config.utils import is_missing

        config = ExperimentConfig("local") if self.config is None else _load(self.config)
        config.search_space = {"combine_params": {"_type": "choice", "_value": list(cells)}}
        config.tuner = AlgorithmConfig(name="BatchTuner")
        config.max_trial_number = len(cells)
        config.trial_code_directory = code
        if config.trial_command is None:
            config.trial_command = f"{shlex.quote(sys.executable)} -m {nni_trial.__name__}"
        if self.concurrency is not None:
            config.trial_concurrency = self.concurrency
        elif is_missing(config.trial_concurrency):
            config.trial_concurrency = 1
        try:
            config.validate()
        except Exception as error:
            raise _refused(
                str(error) or f"{type(error).__name__}, {config.trial_concurrency} trials at once"
            ) from error
        return config


def _load(path: Path) -> Any:
    """The user's configuration, if it leaves the study alone."""
    from nni.experiment.config import ExperimentConfig
    from nni.experiment.config.utils import is_missing, unset_base_path

    try:
        config = ExperimentConfig.load(path)
        if is_missing(config.training_service):
            config.training_service = ExperimentConfig("local").training_service
        services = config.training_service if isinstance(config.training_service, list) else [config.training_service]
        given = [name for name in _OURS if getattr(config, name) != getattr(ExperimentConfig(), name)]
        codes = [getattr(each, "trial_code_directory", None) for each in services]
        given += ["trial_code_directory"] * any(code is not None and not is_missing(code) for code in codes)
    except Exception as error:
        raise _refused(f"{str(path)!r}: {type(error).__name__}: {error}") from error
    finally:
        unset_base_path()  # NNI leaves it behind when it cannot load a file, and then loads no other
    if given:
        raise InvalidStudyError(
            "A configuration for a study must leave to the study what is tried, and with which code.",
            f"{str(path)!r} sets {', '.join(given)}",
            "remove these lines from the file",
        )
    return config


def _refused(found: str) -> InvalidStudyError:
    rule = "The engine nni must have a configuration that NNI accepts."
    return InvalidStudyError(rule, found, "mend the file of --nni-config, or --nni-concurrency")


@dataclass
class _Trial:
    """What is known of a trial that has not ended for us."""

    run: Run | None = None
    reports: int = 0
    error: str | None = None
    ended: float | None = None


def _follow(
    experiment: Any, runs: Sequence[Run], began: Callable[[Run], None], epoch_done: Callable[[], None]
) -> Outcomes:
    """Yield each cell when its trial has ended."""
    waiting = dict.fromkeys(runs)
    trials: dict[str, _Trial] = {}
    done: set[str] = set()
    nameless: list[str] = []
    while waiting:
        state, jobs, reports = _look(experiment, done)
        for job in jobs:
            trial = trials.setdefault(job.trialJobId, _Trial())
            result = _heed(trial, reports[job.trialJobId], began, epoch_done)
            if result is None and not _is_over(trial, job.status):
                continue
            done.add(job.trialJobId)
            if result is None and trial.run is None:
                nameless.append(_failure(experiment, job, trial))
            elif trial.run in waiting:
                del waiting[trial.run]
                yield trial.run, result or TrialFailedError(_failure(experiment, job, trial))
        if state["status"] in ("ERROR", "STOPPING", "STOPPED"):
            raise ExperimentError(
                f"it broke off with status {state['status']}: {'; '.join(state['errors']) or 'no reason'}"
            )
        if state["status"] == "DONE" and all(job.trialJobId in done for job in jobs):
            break
        time.sleep(_POLL_SECONDS)
    for run in waiting:
        yield run, TrialFailedError(nameless.pop(0) if nameless else "no trial that ran it")


def _look(experiment: Any, done: set[str]) -> tuple[dict[str, Any], list[Any], dict[str, list[dict[str, Any]]]]:
    """The state of an experiment, its trials that are not done, and what each of them has reported of its cell."""
    try:
        state = json.loads(_read(experiment, "check-status"))
        jobs = [job for job in experiment.list_trial_jobs() if job.trialJobId not in done]
        names = [job.trialJobId for job in jobs]
        said = {name: [each.data for each in experiment.get_job_metrics(name).get(name, [])] for name in names}
    except OSError as error:
        raise ExperimentError(f"its manager does not answer: {error}") from error
    cells = set(Run._fields)
    return state, jobs, {n: [each for each in said[n] if isinstance(each, dict) and cells <= set(each)] for n in names}


def _heed(
    trial: _Trial, reports: Sequence[dict[str, Any]], began: Callable[[Run], None], epoch_done: Callable[[], None]
) -> Result | None:
    """Take in what a trial has reported since it was looked at last; its result, if that is there."""
    for report in reports[trial.reports :]:
        trial.reports += 1
        if trial.run is None:
            trial.run = Run(**{name: report[name] for name in Run._fields})
            began(trial.run)
        elif "error" in report:
            trial.error = report["error"]
        elif "accuracy" in report:
            values: dict[str, Any] = {each.name: report[each.name] for each in fields(Result) if each.name != "run"}
            values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
            return Result(trial.run, **values)
        else:
            epoch_done()
    return None


def _is_over(trial: _Trial, status: str) -> bool:
    """Whether nothing more will come of a trial. Its end may be known before its result."""
    if status not in _ENDED:
        return False
    trial.ended = trial.ended or time.monotonic()
    return status != "SUCCEEDED" or time.monotonic() - trial.ended > _GRACE_SECONDS


def _failure(experiment: Any, job: Any, trial: _Trial) -> str:
    """Why a trial has no result: what it said, or the end of what it wrote to its error stream."""
    if trial.error is not None:
        return trial.error
    try:
        lines = _read(experiment, f"trial-file/{job.trialJobId}/stderr").decode(errors="replace").strip().splitlines()
    except OSError:  # only some training services have it
        lines = []
    said = " / ".join(line.strip() for line in lines[-3:])
    return f"a trial that ended as {job.status}; {f'its last words: {said}' if said else f'its files: {job.logPath}'}"


def _read(experiment: Any, path: str) -> bytes:
    with urllib.request.urlopen(f"{portal(experiment)}api/v1/nni/{path}", timeout=20) as answer:
        content: bytes = answer.read()
    return content
