"""The engine of this machine: one cell after the other in this process, or several processes."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Queue
from typing import IO

from ..config import Cell, Study
from ..record import Epoch, Record, versions
from ..training import TrainingCache
from . import Records, Watcher, attempt, attempt_elsewhere


@dataclass(frozen=True)
class Local:
    """Runs `jobs` cells at once, each with the study's number of threads.

    One job runs in this process. The processes of several are started by name, not forked: nothing of this process
    runs in them a second time. One that is killed fails its cell, and another takes its place.
    """

    jobs: int = 1

    def __call__(self, cells: Sequence[Cell], study: Study, watcher: Watcher) -> Records:
        """Run cells, see `ip_plugin.compare.engines.Engine`."""
        if self.jobs > 1 and len(cells) > 1:
            yield from _pool(cells, study, watcher, self.jobs)
            return
        cache = TrainingCache()
        for cell in cells:
            watcher.on_begin(cell)

            def on_epoch(epoch: Epoch, cell: Cell = cell) -> None:
                watcher.on_epoch(cell, epoch)

            yield attempt(cell, study, on_epoch, cache)


def _pool(cells: Sequence[Cell], study: Study, watcher: Watcher, jobs: int) -> Records:
    waiting = list(cells)
    said: Queue[tuple[_Worker, Epoch | Record | None]] = Queue()
    workers: list[_Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                workers.append(_Worker(study, said))
                workers[-1].begin(waiting.pop(0), watcher)
            worker, message = said.get()
            if worker not in workers:  # it was stopped
                continue
            if isinstance(message, Epoch):
                watcher.on_epoch(worker.cell, message)
                continue
            if message is None:
                code = worker.process.wait()
                message = Record(worker.cell, traceback=f"The process of this cell ended with exit code {code}.")
            elif waiting:
                # Cells of one seed in one space begin with the same training, which this worker remembers.
                alike = (n for n, cell in enumerate(waiting) if cell[2:] == worker.cell[2:])
                worker.begin(waiting.pop(next(alike, 0)), watcher)
                yield message
                continue
            workers.remove(worker)
            worker.stop()
            yield message
    finally:
        for worker in workers:
            worker.stop()


_SCRIPT = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from ip_plugin.compare.engines.local import work
work()
"""


class _Worker:
    """A process that runs one cell after the other; what it says arrives in a queue, at its end None."""

    def __init__(self, study: Study, said: Queue[tuple[_Worker, Epoch | Record | None]]) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", _SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._said = said
        self._send(sys.path)
        self._send((study.model_dump_json(), versions()))
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def _stdin(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin

    def _send(self, message: object) -> None:
        with suppress(BrokenPipeError):  # it is dead, which `_listen` tells
            pickle.dump(message, self._stdin)
            self._stdin.flush()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        message: Epoch | Record | None
        while True:
            try:
                message = pickle.load(self.process.stdout)
            except (EOFError, pickle.UnpicklingError, ValueError):
                message = None
            self._said.put((self, message))
            if message is None:
                return

    def begin(self, cell: Cell, watcher: Watcher) -> None:
        self.cell = cell
        watcher.on_begin(cell)
        self._send(cell)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):
            self._stdin.close()


def work() -> None:
    """Run the cells that arrive on the standard input; write each epoch and record to the standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starting process stops this one
    heard, said = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed goes to the error stream

    def say(message: Epoch | Record) -> None:
        pickle.dump(message, said)
        said.flush()

    with suppress(EOFError, BrokenPipeError):  # the starting process has ended
        text, made_with = pickle.load(heard)
        while True:
            say(attempt_elsewhere(pickle.load(heard), text, made_with, say))
