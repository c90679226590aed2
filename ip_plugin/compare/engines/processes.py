"""The engine that runs several cells at once, each in a process of its own on this machine."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from ip_plugin.errors import TrialFailedError

from ..cell import EpochDone, Outcomes, Result, execute
from ..config import Run, Settings
from ..deployment import check_alone
from ..training import Memory

_CONTEXT = get_context("spawn")


@dataclass(frozen=True)
class Processes:
    """An engine of `jobs` processes that share the threads of this one.

    Results are those of one process with as many threads as each of them has.
    """

    jobs: int

    def __call__(
        self, runs: Sequence[Run], settings: Settings, began: Callable[[Run], None], epoch_done: EpochDone
    ) -> Outcomes:
        """Run cells, and yield each with its result or with what went wrong, as they finish.

        Raises:
            InvalidStudyError: latencies are to be measured, and there is more than one job.
        """
        if self.jobs > 1:
            check_alone(settings.deploy_threads, f"{self.jobs} jobs at once")
        threads = max(1, torch.get_num_threads() // self.jobs)
        waiting = deque(runs)
        workers: dict[Connection, _Worker] = {}
        try:
            while waiting or workers:
                while waiting and len(workers) < self.jobs:
                    worker = _Worker.start(settings, threads)
                    workers[worker.pipe] = worker
                    worker.give(waiting.popleft(), began)
                for pipe in wait(list(workers)):
                    assert isinstance(pipe, Connection)
                    worker = workers[pipe]
                    try:
                        said: Result | Exception | None = pipe.recv()
                    except EOFError:  # it is dead
                        worker.process.join()
                        said = TrialFailedError(f"a process that ended with exit code {worker.process.exitcode}")
                        del workers[pipe]
                    if said is None:
                        epoch_done()
                        continue
                    run = worker.run
                    if pipe in workers:
                        if waiting:
                            worker.give(waiting.popleft(), began)
                        else:
                            workers.pop(pipe).stop()
                    yield run, said
        finally:
            for worker in workers.values():
                worker.stop()


class _Worker:
    """A process that runs one cell after the other."""

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self.process, self.pipe = process, pipe

    @classmethod
    def start(cls, settings: Settings, threads: int) -> _Worker:
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_work, args=(theirs, settings, threads), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def give(self, run: Run, began: Callable[[Run], None]) -> None:
        self.run = run
        began(run)
        with suppress(BrokenPipeError):  # it is dead, which is noticed when it is read from
            self.pipe.send(run)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(pipe: Connection, settings: Settings, threads: int) -> None:
    """In the process: run what comes, and tell of every epoch (None) and of the end (a result, or an error)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that was started by the user stops this one
    torch.set_num_threads(threads)
    memory = Memory()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # nobody listens any more
        while True:
            run = pipe.recv()
            said: Result | Exception
            try:
                said = execute(run, settings, lambda: pipe.send(None), memory)
            except (BrokenPipeError, ConnectionResetError):
                return
            except Exception as error:
                said = TrialFailedError(f"{type(error).__name__}: {error}")
            pipe.send(said)
