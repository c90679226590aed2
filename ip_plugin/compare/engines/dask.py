"""The engine of several machines: cells as tasks of a Dask cluster.

A worker that dies loses no cell: the scheduler gives it to another one. Dask is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from queue import Queue
from typing import Any
from uuid import uuid4

from ip_plugin.errors import StudyError

from ..config import Cell, Study
from ..record import Epoch, Record, versions
from . import EngineError, Records, Watcher, attempt_elsewhere


@dataclass(frozen=True)
class Dask:
    """Runs cells by Dask's distributed scheduler.

    Attributes:
        scheduler: its address, as ``tcp://host:8786``; None starts a cluster on this machine.
        jobs: workers of the cluster on this machine.
        timeout: seconds to wait for the scheduler's answer.

    Raises:
        StudyError: distributed is not installed.
    """

    scheduler: str | None = None
    jobs: int = 1
    timeout: float = 10

    def __post_init__(self) -> None:
        try:
            import distributed  # noqa: F401
        except ImportError as error:
            remedy = 'run: pip install "ip-plugin[dask]"'
            raise StudyError("The engine dask must have distributed.", str(error), remedy) from error

    def __call__(self, cells: Sequence[Cell], study: Study, watcher: Watcher) -> Records:
        """Run cells, see `ip_plugin.compare.engines.Engine`."""
        import distributed

        dask: Any = distributed  # has few annotations
        if not cells:
            return
        topic = f"ip-plugin-{uuid4().hex}"
        news: Queue[tuple[str, Any]] = Queue()
        with ExitStack() as stack:
            try:
                address = self.scheduler or stack.enter_context(
                    dask.LocalCluster(
                        n_workers=self.jobs,
                        threads_per_worker=1,
                        dashboard_address=None,
                        silence_logs=50,
                        memory_limit=0,
                    )
                )
                client = stack.enter_context(dask.Client(address, timeout=self.timeout, set_as_default=False))
            except (OSError, TimeoutError) as error:
                raise EngineError(f"The Dask scheduler at {self.scheduler} does not answer: {error}") from error
            client.subscribe_topic(topic, lambda event: news.put(("event", event[1])))
            text, made_with = study.model_dump_json(), versions()
            futures = {}
            for number, cell in enumerate(cells):
                future = client.submit(
                    _task, tuple(cell), text, made_with, topic, key=f"{cell} {topic}", priority=-number, pure=False
                )
                futures[future.key] = future, cell
                future.add_done_callback(lambda future: news.put(("end", future.key)))
            stack.callback(lambda: client.cancel([future for future, _ in futures.values()], force=True))
            while futures:
                kind, content = news.get()
                if kind == "event":
                    cell, epoch = Cell(*content["cell"]), content["epoch"]
                    if epoch is None:
                        watcher.on_begin(cell)
                    else:
                        watcher.on_epoch(cell, Epoch(**epoch))
                    continue
                future, cell = futures.pop(content)
                if future.status == "finished":
                    yield future.result()
                elif future.status == "error":
                    yield Record(cell, traceback=f"{type(future.exception()).__name__}: {future.exception()}")
                else:  # the connection to the scheduler is lost
                    raise EngineError(f"Dask gave the cell {cell} up ({future.status}). What has finished is kept.")


def _task(cell: tuple[Any, ...], text: str, made_with: dict[str, str], topic: str) -> Record:
    """One cell, in a worker."""
    from distributed import get_worker

    def tell(epoch: Epoch | None) -> None:
        get_worker().log_event(topic, {"cell": cell, "epoch": None if epoch is None else vars(epoch)})

    tell(None)
    return attempt_elsewhere(Cell(*cell), text, made_with, tell)
