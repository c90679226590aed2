"""ip-plugin compare --jobs: several runs at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch

from ip_plugin.compare.cell import execute
from ip_plugin.compare.config import Cell, Settings
from ip_plugin.compare.engines import EngineError
from ip_plugin.compare.engines.processes import Processes

SETTINGS = Settings(epochs=1, finetune_epochs=1, train_images=300)
CELLS = [Cell("torch:l1", 0.9, space, seed) for seed in (0, 1) for space in ("spatial", "interspace")]  # type: ignore[arg-type]
BAD = Cell("torch:l1", 0.999999, "spatial", 0)  # keeps nothing


def test_results_are_those_of_one_process_and_failures_are_told() -> None:
    began: list[Cell] = []
    epochs: list[int] = []
    cells = [*CELLS[:2], BAD, *CELLS[2:]]
    outcomes = dict(Processes(2)(cells, SETTINGS, began.append, lambda: epochs.append(1)))
    assert began == cells and outcomes.keys() == set(cells)
    assert len(epochs) == 2 * 4
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        for cell in CELLS:
            result = outcomes[cell]
            assert not isinstance(result, Exception)
            assert replace(result, seconds=0) == replace(execute(cell, SETTINGS), seconds=0)
    finally:
        torch.set_num_threads(threads)
    failure = outcomes[BAD]
    assert isinstance(failure, EngineError) and "StudyError: A run must keep at least one" in str(failure)
    assert active_children() == []


def test_a_process_that_is_killed_fails_its_run_and_no_other() -> None:
    outcomes: dict[Cell, object] = {}
    epochs: list[int] = []

    def kill_after_the_third_epoch() -> None:  # the first of the second cell
        epochs.append(1)
        if len(epochs) == 3:
            (child,) = active_children()
            child.kill()
            child.join()

    for cell, outcome in Processes(1)(CELLS[:3], SETTINGS, lambda cell: None, kill_after_the_third_epoch):
        outcomes[cell] = outcome
    failure = outcomes[CELLS[1]]
    assert isinstance(failure, EngineError) and "exit code -9" in str(failure)
    assert [isinstance(outcomes[cell], Exception) for cell in CELLS[:3]] == [False, True, False]


def test_what_is_not_asked_for_any_more_is_stopped() -> None:
    cells = Processes(2)(CELLS, SETTINGS, lambda cell: None, lambda: None)
    next(cells)
    assert len(active_children()) == 2
    cells.close()
    assert active_children() == []


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_an_interrupt_leaves_no_process_and_what_has_finished(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ip_plugin", "compare", "--jobs", "2", "--epochs", "2", "--train-images", "300"]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "results.csv").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to all of them
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from there" in " ".join(output.split())
    assert "Traceback" not in errors
    assert len((tmp_path / "results.csv").read_text().splitlines()) >= 2
    deadline = time.monotonic() + 10  # multiprocessing's tracker ends by itself
    while [p for p in Path("/proc").glob("[0-9]*") if session_of(p) == process.pid]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def session_of(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[3])
    except OSError:  # it has gone
        return -1


def test_options_that_do_not_go_together_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    for arguments, text in (
        (["--jobs", "0"], "--jobs"),
        (["--jobs", "2", "--engine", "nni"], "for --engine nni it is --nni-concurrency"),
    ):
        assert text in refused("compare", *arguments)
    assert list(tmp_path.iterdir()) == []
