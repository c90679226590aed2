"""A study as an NNI experiment: the results of the local engine, and nothing left behind."""

from __future__ import annotations

import csv
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
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from records import SMALL, made_up, timeless
from typer.testing import CliRunner

pytest.importorskip("nni")
import nni
import psutil

from ip_plugin.cli import app
from ip_plugin.compare import Callback, Cell, Epoch, Record, Results, run
from ip_plugin.compare.cell import epochs_of, execute
from ip_plugin.compare.engines import EngineError, nni_experiment, nni_trial
from ip_plugin.compare.engines import nni as nni_engine
from ip_plugin.compare.engines.nni import NniEngine, follow
from ip_plugin.compare.record import versions
from ip_plugin.errors import StudyError

CRASHING = """
from ip_plugin.adapters import Criterion


def prune(model, count):
    raise RuntimeError("no licence")


crash = Criterion.simple("crashes", "at initialisation", prune)
"""
ROOT = Path(__file__).parents[3]
CELL = Cell("torch:l1", 0.9, "interspace", 0)
STUDY = SMALL.changed(criteria="torch:l1", sparsities=0.9, spaces="IP", seeds=0)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell that starts the tests in the background lets them, and what they start, ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def records_of(folder: Path) -> dict[Cell, Record]:
    """What a folder holds, without times."""
    return {cell: timeless(record) for cell, record in Results.read(folder).records.items()}


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


def test_both_engines_give_the_same_records_and_the_same_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crashing.py").write_text(CRASHING)
    monkeypatch.syspath_prepend(tmp_path)
    study = STUDY.changed(criteria="torch:l1,crashing:crash")
    here = run(study, tmp_path / "here", jobs=1)
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

    environment = dict(os.environ)
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        first, nni_experiment.FIRST_PORT = nni_experiment.FIRST_PORT, occupied.getsockname()[1]
        try:
            there = run(study, tmp_path / "nni", engine=NniEngine(concurrency=2, announce=look))
        finally:
            nni_experiment.FIRST_PORT = first
    assert len(addresses) == 1 and dict(os.environ) == environment
    assert (
        there.frame().drop(columns="seconds").equals(here.frame().drop(columns="seconds")) and len(there.frame()) == 2
    )
    done = [{c: timeless(r) for c, r in part.records.items() if r.result} for part in (there, here)]
    assert done[0] == done[1]
    ((cell, text),) = there.failures.items()
    assert cell.criterion == "crashing:crash" and "RuntimeError: no licence" in text
    assert sorted(p.name for p in (tmp_path / "nni").iterdir()) == sorted(p.name for p in (tmp_path / "here").iterdir())
    # What is there already is not run again, and nothing is started for it.
    run(study, tmp_path / "nni", engine=NniEngine(announce=look))
    assert len(addresses) == 1


def test_a_trial_that_dies_before_it_says_anything_is_reported(tmp_path: Path) -> None:
    (tmp_path / "nni.yml").write_text(
        "trialCommand: echo no such interpreter >&2; exit 3\nexperimentWorkingDirectory: kept\n"
    )
    results = run(STUDY, tmp_path / "out", engine=NniEngine(tmp_path / "nni.yml"))
    assert set(results.failures) == set(STUDY.cells())
    for error in results.failures.values():
        assert "The trial ended as FAILED; its last words: no such interpreter" in error
    assert list((tmp_path / "kept").glob("*/db/nni.sqlite"))  # the user's own folder for it


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_it_leaves_no_process_and_loses_no_finished_cell(number: signal.Signals, tmp_path: Path) -> None:
    command = ("-m", "ip_plugin", "compare", "--epochs", 1, "--finetune-epochs", 1, "--criteria", "torch:l1")
    command += ("--train-images", 100, "--spaces", "IP")
    command += ("--sparsities", 0.9, "--seeds", 0, "--engine", "nni", "--jobs", 1)
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
    before = records_of(tmp_path / "out")
    assert len(before) == 1
    # The other engine goes on.
    assert run(STUDY, tmp_path / "out", jobs=1).failures == {}
    after = records_of(tmp_path / "out")
    assert list(after.items())[: len(before)] == list(before.items())
    run(STUDY, tmp_path / "whole", jobs=1)
    assert after == records_of(tmp_path / "whole") and set(after) == set(STUDY.cells())


def test_a_port_in_use_is_an_error_that_says_so(tmp_path: Path) -> None:
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        port = occupied.getsockname()[1]
        engine = NniEngine(port=port)
        with pytest.raises(EngineError, match=rf"Port {port} .* in use by another process.*--nni-port"):
            run(STUDY, tmp_path, engine=engine)
    assert records_of(tmp_path) == {}


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
        lines = list(csv.DictReader(file))
    cells = {(row["space"], row["criterion"]) for row in lines}
    assert cells == {("spatial", "magnitude"), ("interspace", "magnitude")} and len(lines) == 2
    assert {(row["sparsity"], row["parameters_left"], row["epochs"]) for row in lines} == {("0.98", "1124", "1")}
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [{name: str(value) for name, value in row.items()} for row in written] == lines
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


class Watched(Callback):
    def __init__(self) -> None:
        self.began: list[Cell] = []
        self.epochs: list[Epoch] = []

    def on_begin(self, cell: Cell) -> None:
        self.began.append(cell)

    def on_epoch(self, cell: Cell, epoch: Epoch) -> None:
        self.epochs.append(epoch)


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


def study_of(changes: dict[str, Any] | None = None, made_with: dict[str, str] | None = None) -> str:
    study = STUDY.changed(changes).model_dump_json()
    return json.dumps({"study": study, "versions": made_with or versions(), "path": [], "folder": os.getcwd()})


def test_a_trial_reports_every_epoch_and_the_whole_result(
    reports: list[tuple[str, Any]], told: None, tmp_path: Path
) -> None:
    (tmp_path / nni_trial.STUDY).write_text(study_of())
    nni_trial.main()
    names = [name for name, _ in reports]
    assert names == ["intermediate"] * (1 + epochs_of(CELL, STUDY)) + ["final"]
    assert all(Cell(**{name: data[name] for name in Cell._fields}) == CELL for _, data in reports)
    experiment = Told(("DONE", {"trial": ("SUCCEEDED", [data for _, data in reports])}))
    watched = Watched()
    (record,) = follow(experiment, [CELL], watched)
    assert timeless(record) == timeless(execute(CELL, STUDY)) and watched.began == [CELL]
    assert record.result is not None and reports[-1][1]["default"] == record.result.accuracy
    curve = [data["default"] for _, data in reports[1:-1]]
    assert curve == [epoch.train_accuracy for epoch in record.curve] == [e.train_accuracy for e in watched.epochs]
    assert all(0 < accuracy < 100 for accuracy in curve)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (study_of(made_with={"torch": "1.0"}), "StudyError: Every process must have the versions of the study"),
        (study_of({"training.device": "cuda:99"}), "device"),
    ],
)
def test_a_trial_that_cannot_run_says_why(
    text: str, expected: str, reports: list[tuple[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / nni_trial.STUDY).write_text(text)
    with pytest.raises(SystemExit) as caught:
        nni_trial.main()
    assert expected in str(caught.value)
    assert reports[-1][0] == "final" and reports[-1][1]["record"]["traceback"] == str(caught.value)


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


def watch(experiment: Told, cells: list[Cell]) -> Iterator[Record]:
    return follow(experiment, cells, Callback(), poll_seconds=0, grace_seconds=0)


def final(cell: Cell) -> dict[str, Any]:
    record = made_up(cell, 90.0 + cell.seed)
    return json.loads(json.dumps({"default": 0.0, "record": record.to_json(), **cell._asdict()}))  # type: ignore[no-any-return]


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
    assert list(watch(Told(*states), cells)) == [made_up(cells[1], 91.0), made_up(cells[0], 90.0)]


def test_every_cell_is_accounted_for(told: None) -> None:
    cells = [CELL._replace(seed=seed) for seed in range(5)]
    began = [cell._asdict() for cell in cells]
    trials = {
        "a": ("SUCCEEDED", [began[0]]),
        "b": ("FAILED", [began[1], {**began[1], "record": Record(cells[1], traceback="out of memory").to_json()}]),
        "c": ("USER_CANCELED", [began[2]]),
        "d": ("FAILED", []),
    }
    records = list(watch(Told(("NO_MORE_TRIAL", trials), ("DONE", trials)), cells))
    assert [record.cell for record in records] == cells and all(record.status == "failed" for record in records)
    texts = [
        "ended as SUCCEEDED",
        "out of memory",
        "ended as USER_CANCELED",
        "ended as FAILED",
        "No trial",
    ]
    assert all(text in str(record.traceback) for record, text in zip(records, texts, strict=True))


def test_an_experiment_that_breaks_off_keeps_what_has_finished(told: None) -> None:
    outcomes = watch(Told(("ERROR", {"x": ("RUNNING", [CELL._asdict(), final(CELL)])})), [CELL, CELL._replace(seed=1)])
    assert next(outcomes) == made_up(CELL, 90.0)
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


def test_files_of_runs_are_refused() -> None:
    with pytest.raises(StudyError, match="must keep no files"):
        next(NniEngine()([CELL], STUDY.changed({"measure.keep": "masks"}), Callback()))


def test_without_nni_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nni", None)
    with pytest.raises(StudyError, match=r'pip install "ip-plugin\[nni\]"'):
        NniEngine()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--engine", "ray"], "'ray'"),
        (["--engine", "nni", "--nni-port", "0"], "`nni_port`"),
    ],
)
def test_the_command_refuses_engines_that_it_does_not_know(arguments: list[str], expected: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compare", "--output", str(tmp_path / "out"), *arguments])
    assert expected in (result.output + str(result.exception))
    assert not (tmp_path / "out").exists()


def test_the_engine_imports_nni_only_when_it_is_used() -> None:
    script = "import sys, ip_plugin.cli, ip_plugin.compare.engines.nni_trial; print('nni' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"
