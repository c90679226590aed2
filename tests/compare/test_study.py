"""A whole study: what is run, in Python and by the command, and what is told while it runs."""

from __future__ import annotations

import io
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from records import SMALL, MadeUp, made_up, rows, timeless
from rich.console import Console
from typer.testing import CliRunner

from ip_plugin import cli
from ip_plugin.compare import Callback, Cell, Record, Results, config, run, terminal
from ip_plugin.compare import study as studies
from ip_plugin.compare.callbacks import Progress
from ip_plugin.compare.engines import EngineError
from ip_plugin.errors import StudyError

COMMAND = [sys.executable, "-m", "ip_plugin", "compare", "--output"]
OPTIONS = [
    "--criteria", "torch:random,torch:l1", "--sparsities", "50,90", "--seeds", "0..1", "--train-images", "100",
    "--epochs", "1", "--finetune-epochs", "1",
]  # fmt: skip


class Noted(Callback):
    def __init__(self) -> None:
        self.said: list[tuple[str, object]] = []

    def on_study(self, results: Results, cells: list[Cell]) -> None:
        self.said.append(("study", len(cells)))

    def on_begin(self, cell: Cell) -> None:
        self.said.append(("begin", cell))

    def on_epoch(self, cell: Cell, epoch: Any) -> None:
        self.said.append(("epoch", epoch.epoch))

    def on_cell(self, results: Results, record: Record) -> None:
        assert results.records[record.cell] is not None
        self.said.append(("cell", record.cell))

    def on_seed(self, results: Results, seed: int) -> None:
        self.said.append(("seed", seed))


# In Python


def test_a_study_goes_on_where_it_was_and_grows(tmp_path: Path) -> None:
    cells = SMALL.cells()
    first = MadeUp(stops_at=cells[5])
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, tmp_path, engine=first)
    assert first.ran == cells[:5] == list(Results.read(tmp_path).records)
    second = MadeUp()
    assert len(run(SMALL, tmp_path, engine=second).frame()) == len(cells)
    assert second.ran == cells[5:]
    third = MadeUp()
    more = SMALL.changed(seeds=(0, 1, 2), criteria=("torch:l1",))
    results = run(more, tmp_path, engine=third)
    assert {cell.seed for cell in third.ran} == {2} and len(third.ran) == 6
    assert len(results.frame()) == 18 and len(Results.read(tmp_path).frame()) == 26


def test_a_failed_cell_keeps_its_traceback_and_is_run_again_on_request(tmp_path: Path) -> None:
    bad = SMALL.cells()[3]
    results = run(SMALL, tmp_path, engine=MadeUp(fails=[bad]))
    assert results.failures == {bad: "Traceback\nRuntimeError: out of [memory]"} == Results.read(tmp_path).failures
    assert len(results.frame()) == 19
    again = MadeUp()
    assert run(SMALL, tmp_path, engine=again).failures.keys() == {bad} and again.ran == []
    assert run(SMALL, tmp_path, engine=again, retry_failed=True).failures == {} and again.ran == [bad]


def test_callbacks_are_told_in_order(tmp_path: Path) -> None:
    noted = Noted()
    study = SMALL.changed(criteria="torch:l1", sparsities=0.9, spaces="SP")
    run(study, tmp_path, engine=MadeUp(), callbacks=[noted])
    dense, pruned = study.cells()[:2]
    assert noted.said[:9] == [
        ("study", 4), ("begin", dense), ("epoch", 1), ("epoch", 2), ("cell", dense), ("begin", pruned), ("epoch", 1),
        ("epoch", 2), ("cell", pruned),
    ]  # fmt: skip
    assert noted.said[9] == ("seed", 0) and noted.said[-1] == ("seed", 1)


def test_an_error_of_a_callback_ends_the_study_and_keeps_what_has_finished(tmp_path: Path) -> None:
    class Broken(Callback):
        def on_cell(self, results: Results, record: Record) -> None:
            raise RuntimeError("no connection")

    with pytest.raises(RuntimeError, match="no connection"):
        run(SMALL, tmp_path, engine=MadeUp(), callbacks=[Broken()])
    assert len(Results.read(tmp_path).records) == 1


def test_curves_go_to_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(SMALL.changed({"measure.tensorboard": True}, seeds=0), tmp_path, engine=MadeUp())
    folder = tmp_path / "tensorboard" / "torch-l1" / "0.9" / "interspace" / "seed 0"
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == [1.0, 0.5]
    assert events.Scalars("test accuracy")[0].value == 81.0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sparsities": (0.9, 0.999999)}, "keep at least one parameter.\nFound: torch:random at 0.999999, spatial"),
        ({"training.device": "cuda:77"}, "`device`.*\nFound: 'cuda:77'"),
        ({"training.device": "abacus"}, "'abacus'"),
        ({"data.source": "nowhere.npz"}, "nowhere.npz"),
        ({"measure.deploy_threads": 100000}, "a number from 1 to"),
    ],
)
def test_what_cannot_run_is_found_before_anything_does(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    engine = MadeUp()
    with pytest.raises(StudyError, match=text):
        run(SMALL.changed(changes), tmp_path / "out", engine=engine)
    assert not (tmp_path / "out").exists() and engine.ran == []


def test_jobs_are_cores_where_cells_may_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "_cores", lambda: range(8))
    assert studies.jobs_of(None, SMALL) == 8
    assert studies.jobs_of(None, SMALL.changed({"training.threads": 3})) == 2
    assert studies.jobs_of(3, SMALL) == 3
    for alone in ({"training.device": "cuda"}, {"measure.deploy_threads": 1}):
        assert studies.jobs_of(None, SMALL.changed(alone)) == 1
    with pytest.raises(StudyError, match="nothing else running.\nFound: 2 jobs"):
        studies.jobs_of(2, SMALL.changed({"measure.deploy_threads": 1}))
    for engine in ("dask", "nni"):
        with pytest.raises(StudyError, match=f"nothing else running.\nFound: the engine {engine}"):
            studies.engine_of(engine, None, SMALL.changed({"measure.deploy_threads": 1}))
    with pytest.raises(StudyError, match="'ray'"):
        studies.engine_of("ray", None, SMALL)


def test_the_package_loads_nothing_until_it_is_used() -> None:
    script = "import sys, ip_plugin.compare; print({'pandas', 'pydantic', 'nni', 'distributed'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"


# The command


def told(*arguments: str) -> tuple[int, str]:
    """Exit status and output of the command, in this process."""
    done = CliRunner().invoke(cli.app, ["compare", *arguments])
    return done.exit_code, done.output


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    """What the command runs cells by."""
    made = MadeUp()
    monkeypatch.setattr(terminal, "engine_of", lambda *arguments, **options: made)
    monkeypatch.setattr(Results, "report", lambda self, *arguments, **options: (self.folder / "report.html").touch())
    return made


def test_the_command_gives_what_python_gives(reference: Results, tmp_path: Path) -> None:
    status, output = told("--output", str(tmp_path), "--jobs", "1", *OPTIONS)
    results = Results.read(tmp_path)
    assert status == 0 and results.study == reference.study and rows(results).equals(rows(reference))
    assert list(map(timeless, results.records.values())) == list(map(timeless, reference.records.values()))
    lines = [line for line in output.splitlines() if re.match(r"\d+/20 ", line)]
    assert len(lines) == 20 and lines[-1].startswith("20/20 ") and "0 s left; best " in lines[-1]
    assert f"{tmp_path / 'report.html'}" in output and (tmp_path / "report.html").exists()


def test_killed_at_a_random_moment_and_started_again_it_loses_the_cell_in_flight_alone(
    reference: Results, tmp_path: Path
) -> None:
    script = "import sys; from records import SMALL; from ip_plugin.compare import run; run(SMALL, sys.argv[1], jobs=1)"
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    chance = random.Random(time.time_ns())
    wanted = chance.randint(1, 15)
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path], env=os.environ | {"PYTHONPATH": path})
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("cells/*.json"))) < wanted:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3 * chance.random())
    process.kill()
    process.wait()
    assert len(Results.read(tmp_path).records) >= wanted
    noted = Noted()
    kept = len(Results.read(tmp_path).records)
    results = run(SMALL, tmp_path, jobs=1, callbacks=[noted])
    assert noted.said[0] == ("study", 20 - kept)
    assert rows(results).equals(rows(reference))


def test_it_stops_on_ctrl_c_with_a_report(tmp_path: Path, engine: MadeUp) -> None:
    engine.stops_at = SMALL.cells()[13]
    status, output = told("--output", str(tmp_path), *OPTIONS)
    assert status == 130 and "the same command goes on from there" in " ".join(output.split())
    assert (tmp_path / "report.html").exists() and len(Results.read(tmp_path).records) == 13


def test_the_report_is_there_after_the_first_seed(tmp_path: Path, engine: MadeUp) -> None:
    seen: list[tuple[Path, bool]] = []
    report = tmp_path / "report.html"
    run(SMALL, tmp_path, engine=engine, callbacks=[terminal.Report("x"), Seen(report, seen)])
    assert seen == [(report, False)] * 10 + [(report, True)] * 10


class Seen(Callback):
    def __init__(self, path: Path, seen: list[tuple[Path, bool]]) -> None:
        self.path, self.seen = path, seen

    def on_begin(self, cell: Cell) -> None:
        self.seen.append((self.path, self.path.exists()))


def test_failures_are_shown_and_status_1(tmp_path: Path, engine: MadeUp) -> None:
    bad = SMALL.cells()[3]
    engine.fails = [bad]
    status, output = told("--output", str(tmp_path), *OPTIONS)
    assert status == 1 and f"failed: {bad}: RuntimeError: out of [memory]" in output and "--retry-failed" in output
    engine.fails, engine.ran = [], []
    assert told("--output", str(tmp_path), *OPTIONS)[0] == 1 and engine.ran == []
    assert told("--output", str(tmp_path), "--retry-failed", *OPTIONS)[0] == 0 and engine.ran == [bad]


def test_a_file_describes_a_study_and_options_replace_its_values(
    tmp_path: Path, engine: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told("--write-config", "study.toml")[0] == 0
    assert config.read(Path("study.toml")) == config.Config()
    assert told("study.toml", "--set", "training.label_smoothing=0.1", "--set", "name=mine", *OPTIONS)[0] == 0
    study = Results.read("mine").study
    assert study == SMALL.changed({"training.label_smoothing": 0.1, "name": "mine"})
    assert json.loads(Path("mine/study.json").read_text())["study"]["training"]["threads"] == 1


def test_a_dry_run_says_what_it_would_do(tmp_path: Path) -> None:
    status, output = told("--output", str(tmp_path / "out"), "--dry-run", "--jobs", "2", *OPTIONS)
    assert status == 0 and not (tmp_path / "out").exists()
    assert re.search(r"20 runs, 0 of them .*about \d+ s with local, 2 at once", output.replace("\n", " "))
    run(SMALL, tmp_path / "half", engine=half)
    _, output = told("--output", str(tmp_path / "half"), "--dry-run", "--jobs", "1", *OPTIONS)
    # Ten cells took 1.5 s each for two epochs; the other ten have fourteen epochs.
    assert re.search(r"20 runs, 10 of them .*about 10 s", output.replace("\n", " "))


def half(cells: list[Cell], *arguments: object) -> Iterator[Record]:
    yield from map(made_up, cells[:10])


def test_a_bar_is_shown_on_a_terminal(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=150)
    progress = Progress(console)
    run(SMALL, tmp_path, engine=MadeUp(), callbacks=[progress])
    progress.close()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "20/20" in text and "100%" in text and "best 82.0 %" in text


def test_folders_are_reported_together(tmp_path: Path) -> None:
    for seed in (0, 1):
        run(SMALL.changed(seeds=seed), tmp_path / str(seed), engine=MadeUp())
    folders = [str(tmp_path / "0"), str(tmp_path / "1")]
    done = CliRunner().invoke(cli.app, ["report", *folders, "--output", str(tmp_path / "both")])
    assert done.exit_code == 0 and "2 seeds" in done.output and (tmp_path / "both" / "report.html").exists()
    assert not (tmp_path / "0" / "report.html").exists()


def test_mistakes_are_messages_and_status_2(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "study.toml").write_text("[training]\nepoch = 3\n")
    for arguments, text in (
        (["--output", str(tmp_path)], "no study.json, but notes.txt"),
        (["--output", "notes.txt"], "must be one that can be written to. Found: Not a directory"),
        (["--output", "notes.txt/below"], "Found: Not a directory"),
        (["study.toml"], "'epoch' (study.toml, line 2) What to do: use 'epochs'"),
        (["other.toml"], "No such file"),
        (["--criteria", "torch:l7"], "'torch:l7'"),
        (["--sparsities", "0.9,many"], "'0.9,many'"),
        (["--sparsities", "100"], "fractions of at least 0 and below 1"),
        (["--sparsities", "0.999999"], "keep at least one parameter"),
        (["--device", "cuda:99"], "'cuda:99'"),
        (["--engine", "dusk"], "use 'dask'"),
        (["--jobs", "0"], "`jobs` must be greater than or equal to 1"),
        (["--set", "training.lr"], "name=value"),
        (["--nni-port", "0", "--engine", "nni"], "`nni_port`"),
        (["--write-config", "study.toml"], "there is 'study.toml' already"),
    ):
        assert text in refused("compare", *arguments), arguments
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "study.toml"]


def test_an_engine_that_fails_leaves_no_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: Callable[..., str]
) -> None:
    def broken(*arguments: object) -> Any:
        raise EngineError("out of order")

    monkeypatch.setattr(terminal, "engine_of", lambda *arguments, **options: broken)
    assert refused("compare", "--output", str(tmp_path / "out")) == "error: out of order"


def test_criteria_and_version_are_listed() -> None:
    listed = CliRunner().invoke(cli.app, ["criteria"])
    assert "torch:l1" in listed.output and "global magnitude, after training" in listed.output
    version = CliRunner().invoke(cli.app, ["--version"])
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", version.output)


def test_criteria_that_crash_are_named_with_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from ip_plugin.compare import criteria

    (tmp_path / "crashing_adapter.py").write_text("x = 1\nraise RuntimeError('no licence')\n")
    (tmp_path / "wrong_adapter.py").write_text("CRITERIA = {'number': 3}\n")
    monkeypatch.syspath_prepend(tmp_path)
    real = criteria.hosts()
    values = {"crashing": "crashing_adapter", "wrong": "wrong_adapter"}
    more = {name: EntryPoint(name, value, "ip_plugin.adapters") for name, value in values.items()}
    monkeypatch.setattr(criteria, "hosts", lambda: real | more)
    listed = CliRunner().invoke(cli.app, ["criteria"])
    assert listed.exit_code == 0 and "torch:l1" in listed.output
    assert re.search(r"crashing: RuntimeError: no licence \(.*crashing_adapter.py, line 2\)", listed.output), (
        listed.output
    )
    assert "wrong:number: a int in wrong_adapter, not a Criterion" in listed.output


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    script = """
import sys
sys.modules["matplotlib"] = None
import importlib.util, ip_plugin.__main__ as entry
find = importlib.util.find_spec
entry.find_spec = lambda name: None if name == "matplotlib" else find(name)
entry.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and "matplotlib not installed; run: pip install 'ip-plugin[compare]'" in done.stderr
