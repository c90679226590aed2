"""ip-plugin compare --engine dask: cells as tasks of a Dask cluster."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from records import SMALL, rows

pytest.importorskip("distributed")
import distributed

from ip_plugin.compare import Callback, Cell, Dask, Epoch, Results, run
from ip_plugin.compare.engines import EngineError
from ip_plugin.errors import StudyError


class Killer(Callback):
    """Kills a worker of a cluster at the first epoch that is told."""

    def __init__(self, cluster: distributed.LocalCluster) -> None:
        self.cluster = cluster
        self.killed = 0

    def on_epoch(self, cell: Cell, epoch: Epoch) -> None:
        if not self.killed:
            self.killed = self.cluster.workers[0].process.process.pid
            self.cluster.workers[0].process.process.kill()


def test_with_a_worker_that_is_killed_the_rows_are_those_of_one_process(reference: Results, tmp_path: Path) -> None:
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, dashboard_address=None, silence_logs=50
    ) as cluster:
        killer = Killer(cluster)
        results = run(SMALL, tmp_path, engine=Dask(cluster.scheduler_address), callbacks=[killer])
    assert killer.killed and results.failures == {}
    assert rows(results).equals(rows(reference))


def test_a_scheduler_that_is_not_there_is_an_error() -> None:
    with pytest.raises(EngineError, match="127.0.0.1:9 does not answer"):
        next(Dask("tcp://127.0.0.1:9", timeout=1)(SMALL.cells(), SMALL, Callback()))


def test_without_distributed_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(StudyError, match=r'pip install "ip-plugin\[dask\]"'):
        Dask()


def test_a_scheduler_has_its_own_workers(tmp_path: Path) -> None:
    from ip_plugin.compare.study import engine_of

    with pytest.raises(StudyError, match="leave out --jobs"):
        engine_of("dask", 2, SMALL, "tcp://127.0.0.1:9")
