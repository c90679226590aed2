"""ip-plugin compare --jobs: several runs at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from records import SMALL, rows, timeless

from ip_plugin.compare import Callback, Cell, Epoch, Results, run
from ip_plugin.compare.engines.local import Local

STUDY = SMALL.changed(sparsities=0.9)
CELLS = [Cell("torch:l1", 0.9, space, seed) for seed in (0, 1) for space in ("spatial", "interspace")]

CRASHING = """
from ip_plugin.adapters import Criterion


def prune(model, count):
    print("what a criterion prints does not disturb")
    raise RuntimeError("no licence")


crash = Criterion.simple("crashes", "at initialisation", prune)
"""


class Watched(Callback):
    """Notes what is told, and kills the worker of the second cell after its first epoch, if it is to."""

    def __init__(self, kills: bool = False) -> None:
        self.began: list[Cell] = []
        self.epochs: list[Epoch] = []
        self.kills = kills

    def on_begin(self, cell: Cell) -> None:
        self.began.append(cell)

    def on_epoch(self, cell: Cell, epoch: Epoch) -> None:
        self.epochs.append(epoch)
        if self.kills and cell == CELLS[1]:
            self.kills = False
            workers()[-1].kill()  # they are listed as they were started, and the first one may have ended


def workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "engines.local" in " ".join(child.cmdline())]


def test_several_jobs_give_the_rows_of_one(reference: Results, tmp_path: Path) -> None:
    results = run(SMALL, tmp_path, jobs=2)
    assert rows(results).equals(rows(reference)) and results.failures == {}
    assert {cell: timeless(r) for cell, r in results.records.items()} == {
        cell: timeless(r) for cell, r in reference.records.items()
    }
    assert workers() == []


def test_a_cell_that_fails_keeps_its_traceback_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crashing.py").write_text(CRASHING)
    monkeypatch.syspath_prepend(tmp_path)
    study = STUDY.changed(criteria="crashing:crash,torch:l1", seeds=0, spaces="SP")
    results = run(study, tmp_path / "out", jobs=2)
    ((cell, text),) = results.failures.items()
    assert cell.criterion == "crashing:crash" and len(results.frame()) == 2
    assert "crashing.py" in text and "RuntimeError: no licence" in text


def test_a_killed_process_fails_its_cell_and_what_is_not_asked_for_any_more_is_stopped() -> None:
    watched = Watched(kills=True)
    others = [Cell("torch:l1", 0.9, "spatial", seed) for seed in range(2, 12)]  # not all of them end before the death
    running = Local(2)([*CELLS, *others], STUDY, watched)
    records = {}
    while CELLS[1] not in records:  # other cells may end before the death is noticed
        record = next(running)
        records[record.cell] = record
    assert watched.began[:2] == CELLS[:2] and "exit code -9" in str(records[CELLS[1]].traceback)
    assert [record.status for record in records.values()].count("failed") == 1
    assert workers() != []
    running.close()
    assert workers() == []


def test_a_study_has_its_number_of_threads_here_and_leaves_that_of_the_process() -> None:
    threads = torch.get_num_threads()
    seen: list[int] = []

    class Threads(Callback):
        def on_epoch(self, cell: Cell, epoch: Epoch) -> None:
            seen.append(torch.get_num_threads())

    study = STUDY.changed({"training.threads": 2})
    (record,) = Local(1)(CELLS[:1], study, Threads())
    assert seen == [2, 2] and torch.get_num_threads() == threads and record.status == "done"


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_an_interrupt_leaves_no_process_and_what_has_finished(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ip_plugin", "compare", "--jobs", "2", "--epochs", "1", "--train-images", "100"]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "results.csv").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to all of them
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from there" in " ".join(output.split())
    assert "Traceback" not in errors
    assert len((tmp_path / "results.csv").read_text().splitlines()) >= 2 and (tmp_path / "report.html").exists()
    deadline = time.monotonic() + 10
    while [p for p in Path("/proc").glob("[0-9]*") if session_of(p) == process.pid]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def session_of(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[3])
    except OSError:  # it has gone
        return -1
