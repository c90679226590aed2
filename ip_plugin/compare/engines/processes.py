"""The engine that runs several cells at once, each in a process of its own on this machine."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait

import torch

from ..cell import EpochDone, Result, execute
from ..config import Cell, Settings
from ..deployment import check_alone
from ..training import TrainingCache
from . import Began, EngineError, Outcomes

_CONTEXT = get_context("spawn")


@dataclass(frozen=True)
class Processes:
    """An engine of `jobs` processes that share the threads of this one.

    Results are those of one process with as many threads as each of them has.
    """

    jobs: int

    def __call__(self, cells: Sequence[Cell], settings: Settings, began: Began, epoch_done: EpochDone) -> Outcomes:
        """Run cells, see `ip_plugin.compare.engines.Engine`."""
        if self.jobs > 1:
            check_alone(settings.deploy_threads, f"{self.jobs} jobs at once")
        threads = max(1, torch.get_num_threads() // self.jobs)
        waiting = deque(cells)
        workers: dict[Connection, _Worker] = {}
        try:
            while waiting or workers:
                while waiting and len(workers) < self.jobs:
                    worker = _Worker(settings, threads)
                    workers[worker.pipe] = worker
                    worker.begin(waiting.popleft(), began)
                for pipe in wait(list(workers)):
                    assert isinstance(pipe, Connection)
                    worker = workers[pipe]
                    cell, outcome = worker.cell, worker.receive()
                    if outcome is None:
                        epoch_done()
                        continue
                    if waiting and worker.process.is_alive():
                        worker.begin(waiting.popleft(), began)
                    else:
                        workers.pop(pipe).stop()
                    yield cell, outcome
        finally:
            for worker in workers.values():
                worker.stop()


class _Worker:
    """A process that runs one cell after the other."""

    def __init__(self, settings: Settings, threads: int) -> None:
        self.pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_work, args=(theirs, settings, threads), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, cell: Cell, began: Began) -> None:
        self.cell = cell
        began(cell)
        with suppress(BrokenPipeError):  # the process is dead; `receive` will tell
            self.pipe.send(cell)

    def receive(self) -> Result | Exception | None:
        """The outcome of the cell, or None after an epoch."""
        try:
            message: Result | Exception | None = self.pipe.recv()
        except (EOFError, ConnectionResetError):  # it is dead
            self.process.join()
            return EngineError(f"The process of this cell ended with exit code {self.process.exitcode}.")
        return message

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(pipe: Connection, settings: Settings, threads: int) -> None:
    """Run the cells that arrive, in the process; send None after every epoch and the outcome at the end of a cell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starting process stops this one
    torch.set_num_threads(threads)
    cache = TrainingCache()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the starting process has ended
        while True:
            cell = pipe.recv()
            outcome: Result | Exception
            try:
                outcome = execute(cell, settings, lambda: pipe.send(None), cache)
            except (BrokenPipeError, ConnectionResetError):
                return
            except Exception as error:
                outcome = EngineError(f"{type(error).__name__}: {error}")
            pipe.send(outcome)
