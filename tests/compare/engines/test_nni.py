"""A study as an NNI experiment: the results of the local engine, and nothing left behind."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("nni")
import nni
import psutil

from ip_plugin.cli import app
from ip_plugin.compare.cell import Result, epochs_of, execute
from ip_plugin.compare.config import Cell, Settings, Study
from ip_plugin.compare.engines import EngineError, nni_experiment, nni_trial
from ip_plugin.compare.engines import nni as nni_engine
from ip_plugin.compare.engines.nni import NniEngine, follow
from ip_plugin.compare.store import Results, to_row, versions
from ip_plugin.compare.study import compare
from ip_plugin.errors import StudyError

ROOT = Path(__file__).parents[3]
QUICK = Settings(epochs=2, finetune_epochs=1)
CELL = Cell("torch:l1", 0.9, "interspace", 0)
IMPOSSIBLE = 0.999999  # leaves not even one parameter


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Trials take over the number of threads, and two of them share the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell that starts the tests in the background lets them, and what they start, ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def text_of(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def rows_of(folder: Path) -> dict[Cell, Result]:
    """What a folder holds, without times."""
    settings = json.loads((folder / "study.json").read_text())["settings"]
    with Results.open(folder, Settings(**settings)) as results:
        return {cell: replace(result, seconds=0) for cell, result in results.rows.items()}


def marked(mark: str) -> list[int]:
    """The processes that were started, by whatever way, by the one whose environment has a mark."""
    processes = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process.pid)
        except psutil.Error:
            continue
    return processes


def start(folder: Path, *command: object) -> subprocess.Popen[str]:
    """Start a process that has a folder for its temporary files, and as its mark."""
    (folder / "temporary").mkdir()
    environment = os.environ | {"TEST_MARK": str(folder), "TMPDIR": str(folder / "temporary"), "OMP_NUM_THREADS": "1"}
    environment["http_proxy"] = "http://127.0.0.1:9"  # as in many laboratories; not for what is on this machine
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, stdout=subprocess.PIPE, text=True)


# Whole experiments


def test_both_engines_give_the_same_rows_and_the_same_failures(tmp_path: Path) -> None:
    study = Study(
        settings=QUICK, criteria=("torch:l1",), sparsities=(0.9, IMPOSSIBLE), spaces=("interspace",), seeds=(0,)
    )
    here = compare(study, tmp_path / "here", silent())
    addresses: list[str] = []

    def look(address: str) -> None:
        addresses.append(address)
        host, port = re.fullmatch(r"http://([\d.]+):(\d+)/\w+/", address).groups()  # type: ignore[union-attr]
        assert host == "127.0.0.1" and int(port) != occupied.getsockname()[1]
        assert b"Neural Network Intelligence" in urllib.request.urlopen(address).read()
        assert b"RUNNING" in urllib.request.urlopen(f"{address}api/v1/nni/check-status").read()
        for elsewhere in ("127.0.0.2", socket.gethostbyname(socket.gethostname())):  # loopback is 127.0.0.1 alone
            with socket.socket() as probe:
                assert elsewhere == "127.0.0.1" or probe.connect_ex((elsewhere, int(port))) != 0

    console, environment = silent(), dict(os.environ)
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        first, nni_experiment.FIRST_PORT = nni_experiment.FIRST_PORT, occupied.getsockname()[1]
        try:
            there = compare(study, tmp_path / "nni", console, engine=NniEngine(concurrency=2, announce=look))
        finally:
            nni_experiment.FIRST_PORT = first
    assert len(addresses) == 1 and dict(os.environ) == environment
    assert rows_of(tmp_path / "nni") == rows_of(tmp_path / "here") and len(rows_of(tmp_path / "nni")) == 1
    assert set(there) == set(here) and {cell.sparsity for cell in there} == {IMPOSSIBLE}
    for cell, error in there.items():
        assert isinstance(error, EngineError) and str(here[cell]) in str(error)
        assert f"failed: {cell}: EngineError: StudyError: A run must keep at least one parameter." in text_of(console)
    assert sorted(p.name for p in (tmp_path / "nni").iterdir()) == sorted(p.name for p in (tmp_path / "here").iterdir())
    # What is there already is not run again, and nothing is started for it.
    assert compare(replace(study, sparsities=(0.9,)), tmp_path / "nni", silent(), engine=NniEngine(announce=look)) == {}
    assert len(addresses) == 1


def test_a_trial_that_dies_before_it_says_anything_is_reported(tmp_path: Path) -> None:
    (tmp_path / "nni.yml").write_text(
        "trialCommand: echo no such interpreter >&2; exit 3\nexperimentWorkingDirectory: kept\n"
    )
    study = Study(settings=QUICK, criteria=("torch:random",), sparsities=(0.9,), spaces=("spatial",), seeds=(0,))
    failures = compare(study, tmp_path / "out", silent(), engine=NniEngine(tmp_path / "nni.yml"))
    (error,) = failures.values()
    assert "The trial ended as FAILED; its last words: no such interpreter" in str(error)
    assert list((tmp_path / "kept").glob("*/db/nni.sqlite"))  # the user's own folder for it


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_it_leaves_no_process_and_loses_no_finished_cell(number: signal.Signals, tmp_path: Path) -> None:
    settings = replace(QUICK, train_images=300)
    study = Study(settings=settings, criteria=("torch:random",), sparsities=(0.9,), seeds=(0,))
    command = ("-m", "ip_plugin", "compare", "--epochs", 2, "--finetune-epochs", 1, "--criteria", "torch:random")
    command += ("--train-images", 300)
    command += ("--sparsities", 0.9, "--seeds", 0, "--engine", "nni", "--nni-concurrency", 1)
    process = start(tmp_path, *command, "--output", tmp_path / "out")
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "results.csv").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    assert len(marked(str(tmp_path))) >= 3  # itself, NNI's manager, its tuner; trials
    process.send_signal(number)
    output, _ = process.communicate(timeout=90)
    if number == signal.SIGINT:
        assert process.returncode == 130 and "stopped; what has finished is in" in output
    else:  # the manager notices that it is alone
        while marked(str(tmp_path)) and time.monotonic() < deadline + 60:
            time.sleep(0.2)
    assert marked(str(tmp_path)) == []
    assert list((tmp_path / "temporary").glob("ip-plugin-nni-*")) == []
    before = rows_of(tmp_path / "out")
    assert len(before) == 1
    # The other engine goes on.
    assert compare(study, tmp_path / "out", silent()) == {}
    after = rows_of(tmp_path / "out")
    assert list(after.items())[: len(before)] == list(before.items())
    compare(study, tmp_path / "whole", silent())
    assert after == rows_of(tmp_path / "whole") and set(after) == set(study.cells())


def test_a_port_in_use_is_an_error_that_says_so(tmp_path: Path) -> None:
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        port = occupied.getsockname()[1]
        engine = NniEngine(port=port)
        with pytest.raises(EngineError, match=rf"Port {port} .* in use by another process.*--nni-port"):
            compare(Study(settings=QUICK), tmp_path, silent(), engine=engine)
    assert rows_of(tmp_path) == {}


def test_the_example_is_an_experiment(tmp_path: Path) -> None:
    space = json.loads((ROOT / "examples" / "nni_experiment" / "search_space.json").read_text())
    assert space["space"]["_value"] == ["spatial", "interspace"]
    space["sparsity"]["_value"], space["criterion"]["_value"] = [0.98], ["magnitude"]
    (tmp_path / "space.json").write_text(json.dumps(space))
    options = ("--epochs", 1, "--finetune-epochs", 1, "--search-space", tmp_path / "space.json")
    process = start(tmp_path, ROOT / "examples" / "nni_experiment" / "run.py", *options, "--output", tmp_path / "out")
    assert process.stdout is not None
    address = process.stdout.readline().split(": ")[1].strip()
    assert b"Neural Network Intelligence" in urllib.request.urlopen(address).read()
    reports: dict[str, set[str]] = {}
    while process.poll() is None:
        try:
            answer = urllib.request.urlopen(f"{address}api/v1/nni/metric-data").read()
        except OSError:
            break  # over
        for metric in json.loads(answer):
            reports.setdefault(metric["trialJobId"], set()).add(f"{metric['type']} {metric['sequence']}")
        time.sleep(0.3)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    assert marked(str(tmp_path)) == []
    assert len(reports) == 2 and all({"PERIODICAL 0", "PERIODICAL 1"} <= seen for seen in reports.values())
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    cells = {(row["space"], row["criterion"]) for row in rows}
    assert cells == {("spatial", "magnitude"), ("interspace", "magnitude")} and len(rows) == 2
    assert {(row["sparsity"], row["parameters_left"], row["epochs"]) for row in rows} == {("0.98", "1124", "1")}
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [{name: str(value) for name, value in row.items()} for row in written] == rows
    assert all(f"{row['accuracy']:.1f} %" in output for row in written)


def test_a_trial_of_the_example_runs_by_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(ROOT / "examples" / "nni_experiment" / "trial.py")
    monkeypatch.setattr(sys, "argv", [script, "--epochs", "1", "--finetune-epochs", "0", "--space", "interspace"])
    with pytest.warns(RuntimeWarning, match="without runtime"):
        runpy.run_path(script, run_name="__main__")
    assert re.search(r"interspace, magnitude at 0.95: [\d.]+ %, 2811 parameters left\n$", capsys.readouterr().out)


# Trials


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, Any]]:
    """What a trial reports that runs in this process, as NNI passes it on."""
    said: list[tuple[str, Any]] = []

    def note(name: str, data: Any) -> None:
        said.append((name, json.loads(json.dumps(data))))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nni, "get_next_parameter", lambda: json.loads(json.dumps(CELL._asdict())))
    for name in ("intermediate", "final"):
        monkeypatch.setattr(nni, f"report_{name}_result", partial(note, name))
    return said


def settings_of(**changes: Any) -> str:
    given = {"settings": vars(replace(QUICK, sharing="layer")), "versions": versions(), "threads": 1}
    return json.dumps(given | changes)


def test_a_trial_reports_every_epoch_and_the_whole_result(
    reports: list[tuple[str, Any]], told: None, tmp_path: Path
) -> None:
    (tmp_path / nni_trial.SETTINGS).write_text(settings_of())
    nni_trial.main()
    names = [name for name, _ in reports]
    assert names == ["intermediate"] * (1 + epochs_of(CELL, QUICK)) + ["final"]
    assert [data["default"] for _, data in reports[:-1]] == [0, 1, 2, 3]
    assert all(Cell(**{name: data[name] for name in Cell._fields}) == CELL for _, data in reports)
    began, epochs = [], []
    experiment = Told(("DONE", {"trial": ("SUCCEEDED", [data for _, data in reports])}))
    ((cell, result),) = follow(experiment, [CELL], began.append, lambda: epochs.append(1))
    assert cell == CELL
    assert isinstance(result, Result) and reports[-1][1]["default"] == result.accuracy
    assert replace(result, seconds=0) == replace(execute(CELL, replace(QUICK, sharing="layer")), seconds=0)
    assert began == [CELL] and len(epochs) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (settings_of(versions={"torch": "1.0"}), "StudyError: A trial must have the versions of the study"),
        (settings_of(settings={"device": "cuda:99"}), "StudyError: `device`"),
        ("{", "JSONDecodeError"),
    ],
)
def test_a_trial_that_cannot_run_says_why(
    text: str, expected: str, reports: list[tuple[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / nni_trial.SETTINGS).write_text(text)
    with pytest.raises(ValueError) as caught:
        nni_trial.main()
    assert reports[-1][0] == "intermediate" and reports[-1][1]["error"].startswith(expected)
    assert reports[-1][1]["error"] == f"{type(caught.value).__name__}: {caught.value}"


# Following an experiment


class Told:
    """An experiment that goes through states that are told."""

    def __init__(self, *states: tuple[str, dict[str, tuple[str, list[Any]]]]) -> None:
        self.states = list(states)

    def answer(self, path: str) -> bytes:
        if path != "check-status":
            return b""  # nothing in the error stream
        status, self.trials = self.states[0]
        if len(self.states) > 1:
            del self.states[0]
        return json.dumps({"status": status, "errors": ["tuner crashed"] * (status == "ERROR")}).encode()

    def list_trial_jobs(self) -> list[Any]:
        # As NNI does it, every trial under the parameters of another.
        return [SimpleNamespace(trialJobId=name, status=s, logPath="/log") for name, (s, _) in self.trials.items()]

    def get_job_metrics(self, name: str) -> dict[str, list[Any]]:
        return {name: [SimpleNamespace(data=data) for data in self.trials[name][1]]}


def watch(experiment: Told, cells: list[Cell]) -> Iterator[tuple[Cell, Any]]:
    return follow(experiment, cells, lambda cell: None, lambda: None, poll_seconds=0, grace_seconds=0)


def final(cell: Cell) -> dict[str, Any]:
    result = Result(cell, 90.0 + cell.seed, None, 1000, 100, 0, ("a", "b"), 1.5)
    return json.loads(json.dumps({"default": result.accuracy, **to_row(result)}))  # type: ignore[no-any-return]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nni_engine, "request", lambda experiment, path: experiment.answer(path))


def test_a_result_belongs_to_the_cell_that_the_trial_names(told: None) -> None:
    cells = [CELL._replace(seed=seed) for seed in range(2)]
    began = [cell._asdict() for cell in cells]
    states = [
        ("RUNNING", {"x": ("RUNNING", [began[1]]), "y": ("WAITING", [])}),
        ("RUNNING", {"x": ("RUNNING", [began[1], final(cells[1])]), "y": ("RUNNING", [3.0, {"x": 1}, began[0]])}),
        ("RUNNING", {"x": ("SUCCEEDED", [began[1], final(cells[1])]), "y": ("RUNNING", [began[0], final(cells[0])])}),
    ]
    outcomes = list(watch(Told(*states), cells))
    assert [(cell.seed, result.cell.seed, result.accuracy) for cell, result in outcomes] == [(1, 1, 91.0), (0, 0, 90.0)]
    assert outcomes[0][1].spatial_layers == ("a", "b")


def test_every_cell_is_accounted_for(told: None) -> None:
    cells = [CELL._replace(seed=seed) for seed in range(5)]
    began = [cell._asdict() for cell in cells]
    trials = {
        "a": ("SUCCEEDED", [began[0]]),
        "b": ("FAILED", [began[1], {**began[1], "error": "RuntimeError: out of memory"}]),
        "c": ("USER_CANCELED", [began[2]]),
        "d": ("FAILED", []),
    }
    outcomes = dict(watch(Told(("NO_MORE_TRIAL", trials), ("DONE", trials)), cells))
    assert list(outcomes) == cells and all(isinstance(error, EngineError) for error in outcomes.values())
    texts = [
        "ended as SUCCEEDED",
        "RuntimeError: out of memory",
        "ended as USER_CANCELED",
        "ended as FAILED",
        "No trial",
    ]
    assert all(text in str(outcomes[cell]) for cell, text in zip(cells, texts, strict=True))


def test_an_experiment_that_breaks_off_keeps_what_has_finished(told: None) -> None:
    outcomes = watch(Told(("ERROR", {"x": ("RUNNING", [CELL._asdict(), final(CELL)])})), [CELL, CELL._replace(seed=1)])
    assert next(outcomes)[1].accuracy == 90.0
    with pytest.raises(EngineError, match="status ERROR: tuner crashed"):
        next(outcomes)


def test_a_manager_that_does_not_answer_is_an_error(told: None) -> None:
    experiment = Told(("RUNNING", {}))
    experiment.list_trial_jobs = lambda: (_ for _ in ()).throw(ConnectionError("refused"))  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="manager of the NNI experiment does not answer: refused"):
        next(watch(experiment, [CELL]))


def test_while_nni_starts_ctrl_c_waits() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt):
        with nni_experiment.interrupts_delayed():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            reached = True
    assert reached and signal.getsignal(signal.SIGINT) is signal.default_int_handler


# What a user can get wrong

MISTAKES: dict[str, tuple[str, str]] = {
    "a tuner": ("tuner: {name: Random}\nmaxTrialNumber: 3", "sets tuner, max_trial_number"),
    "other code": ("trialCodeDirectory: /", "sets trial_code_directory"),
    "other code of a service": (
        "trainingService: {platform: local, trialCodeDirectory: /}",
        "sets trial_code_directory",
    ),
    "an unknown key": ("trialConcurency: 2", "does not have field"),
    "an unknown service": ("trainingService: {platform: moon}", "correct the file"),
    "half a service": ("trainingService: {platform: remote}", "machine_list is not set"),
    "a wrong type": ("trialConcurrency: many", "trial_concurrency"),
    "no YAML": ("{", "mistake.yml"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_configurations_that_make_no_sense_are_refused(name: str, tmp_path: Path) -> None:
    text, expected = MISTAKES[name]
    (tmp_path / "mistake.yml").write_text(text)
    with pytest.raises(StudyError, match=expected):
        NniEngine(tmp_path / "mistake.yml")
    NniEngine()  # NNI itself would load nothing any more


def test_a_configuration_that_is_not_there_and_a_wrong_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="nowhere.yml"):
        NniEngine(tmp_path / "nowhere.yml")
    with pytest.raises(StudyError, match="0 trials at once"):
        NniEngine(concurrency=0)


def test_without_nni_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nni", None)
    with pytest.raises(StudyError, match=r'pip install "ip-plugin\[nni\]"'):
        NniEngine()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--engine", "ray"], "'ray' is neither local nor nni"),
        (["--nni-port", "8081"], "need --engine nni"),
        (["--engine", "nni", "--nni-port", "0"], "--nni-port"),
    ],
)
def test_the_command_refuses_engines_that_it_does_not_know(arguments: list[str], expected: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compare", "--output", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2 and expected in result.output
    assert not (tmp_path / "out").exists()


def test_the_engine_imports_nni_only_when_it_is_used() -> None:
    script = "import sys, ip_plugin.cli, ip_plugin.compare.engines.nni_trial; print('nni' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"
