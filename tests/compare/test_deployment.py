"""ip-plugin compare --deploy: bytes and latency of the network of every cell."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from records import result_of
from torch import nn

pytest.importorskip("numba")

from ip_plugin import interspace, report
from ip_plugin.compare import Cell, Study, criteria, deployment
from ip_plugin.compare.deployment import check_threads, latencies, saved
from ip_plugin.compare.models import NETWORKS
from ip_plugin.errors import StudyError
from ip_plugin.sparse import SparseNetwork

#: Criteria as they are: some leave layers almost empty.
pytestmark = pytest.mark.filterwarnings("ignore::ip_plugin.errors.LayerCollapseWarning")

QUICK = Study(training={"epochs": 1, "finetune_epochs": 1}, data={"train_images": 200})
DEPLOYED = QUICK.changed({"measure.deploy_threads": 1})


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is timed, and with how many threads; the times are made up."""
    observed: dict[str, Any] = {}

    def side_by_side(calls: Mapping[str, Callable[[], object]], **options: int) -> dict[str, list[float]]:
        observed.update(calls, threads=torch.get_num_threads(), options=options)
        return {"latency_ms": [0.001, 0.009, 0.002], "dense_latency_ms": [0.004, 0.003, 0.008]}

    monkeypatch.setattr(deployment, "side_by_side", side_by_side)
    return observed


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("space", QUICK.spaces)
def test_the_pruned_network_is_run_sparse_and_the_dense_one_by_torch(
    space: str, threads: int, timed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import numba

    if threads > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("numba has one thread here")
    model, dense = NETWORKS["convnet"](1, 10).eval(), NETWORKS["convnet"](1, 10).eval()
    if space == "interspace":
        interspace(model)
    criteria.load("torch:l1").prune(model, 50000, None)  # type: ignore[arg-type]
    image = torch.randn(1, 1, 8, 8)
    expected = model(image).detach()
    before = torch.get_num_threads()
    measured = latencies(model, dense, image, threads)
    assert torch.get_num_threads() == before and timed["threads"] == threads
    assert measured == {"latency_ms": 2.0, "dense_latency_ms": 4.0}
    assert isinstance(timed["latency_ms"].func, SparseNetwork) and timed["dense_latency_ms"].func is dense
    torch.testing.assert_close(timed["latency_ms"](), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(timed["dense_latency_ms"](), dense(image))
    stored = report(model).everything.bytes_sparse
    assert stored < len(saved(model)) < stored + 4000  # the header


@pytest.mark.parametrize("criterion", ["torch:l1", "ip:rigl", "tp:l1", "tp:ticket", "nni:l1_norm"])
@pytest.mark.parametrize("space", QUICK.spaces)
def test_the_network_of_any_criterion_is_measured_and_nothing_else_changes(
    criterion: str, space: Any, timed: dict[str, Any]
) -> None:
    for host in {"tp": ["torch_pruning"], "nni": ["nni", "torch_pruning"]}.get(criterion.partition(":")[0], []):
        pytest.importorskip(host)
    cell = Cell(criterion, 0.5, space, 0)
    state = torch.get_rng_state()
    result = result_of(cell, DEPLOYED)
    assert torch.equal(torch.get_rng_state(), state)
    plain = result_of(cell, QUICK)
    costs = ("latency_ms", "dense_latency_ms")
    assert plain.latency_ms is None and None not in (result.file_bytes, result.latency_ms)
    assert replace(result, **{name: getattr(plain, name) for name in costs}) == plain
    channels = [layer.out_channels for layer in timed["dense_latency_ms"].func if isinstance(layer, nn.Conv2d)]
    assert channels == [32, 64, 64]
    assert timed["latency_ms"]().shape == (1, 10)
    # Of 56,224 parameters a half is left, of channels a quarter: values of 4 bytes, positions and the header besides.
    share = 0.25 if criteria.load(criterion).removes_channels else 0.5
    assert 0.9 * share < (result.file_bytes or 0) / (4 * 56224) < share + 0.12


def test_a_failure_leaves_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*calls: Any, **options: Any) -> Any:
        raise RuntimeError("out of time")

    monkeypatch.setattr(deployment, "side_by_side", broken)
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="out of time"):
        latencies(NETWORKS["convnet"](1, 10).eval(), NETWORKS["convnet"](1, 10).eval(), torch.randn(1, 1, 8, 8), 1)
    assert torch.get_num_threads() == before


# What is refused


@pytest.mark.parametrize("threads", [0, -1, 100000])
def test_numbers_of_threads_that_there_are_not(threads: int) -> None:
    with pytest.raises(StudyError, match=f"a number from 1 to .*\nFound: {threads}\n.*NUMBA_NUM_THREADS"):
        check_threads(threads)


def test_mistakes_are_messages_and_nothing_is_made(tmp_path: Path, refused: Callable[..., str]) -> None:
    for arguments, text in (
        (["--deploy-threads", "1", "--jobs", "2"], "Found: 2 jobs at once What to do: leave out --jobs"),
        (["--deploy-threads", "1", "--engine", "nni"], "Found: the engine nni"),
        (["--deploy-threads", "0"], "`deploy_threads` must be greater than or equal to 1"),
    ):
        assert text in refused("compare", *arguments)
    script = "import sys; sys.modules['numba'] = None; from ip_plugin.__main__ import main; main()"
    command = [sys.executable, "-c", script, "compare", "--deploy-threads", "1"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert run.returncode == 2 and "What to do: run: pip install 'ip-plugin[sparse]'" in " ".join(run.stderr.split())
    assert list(tmp_path.iterdir()) == []
