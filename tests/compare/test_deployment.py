"""ip-plugin compare --deploy: bytes and latency of the network of every cell."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

pytest.importorskip("numba")

from ip_plugin import interspace, report
from ip_plugin.compare import config, criteria, deployment
from ip_plugin.compare.analysis import Analysis
from ip_plugin.compare.cell import Result, execute
from ip_plugin.compare.config import Cell, Settings, Study
from ip_plugin.compare.deployment import Deployment, measure
from ip_plugin.compare.engines.local import one_by_one
from ip_plugin.compare.engines.processes import Processes
from ip_plugin.compare.models import NETWORKS
from ip_plugin.compare.report import deployment_table, remarks, tables
from ip_plugin.compare.store import COLUMNS, Results
from ip_plugin.compare.study import compare
from ip_plugin.errors import StudyError
from ip_plugin.sparse import SparseNetwork

#: Criteria as they are: some leave layers almost empty.
pytestmark = pytest.mark.filterwarnings("ignore::ip_plugin.errors.LayerCollapseWarning")

QUICK = Settings(epochs=1, finetune_epochs=1, train_images=200)
DEPLOYED = replace(QUICK, deploy_threads=1)
STUDY = Study(settings=DEPLOYED, criteria=("torch:l1",), sparsities=(0.9, 0.98), seeds=(0, 1, 2))


def made_up(cell: Cell, settings: Settings = DEPLOYED, epoch_done: Callable[[], None] = lambda: None) -> Result:
    """IP has larger files and is slower than SP; at 98 % it is slower than the dense network."""
    inter = cell.space == "interspace"
    latency = 0.25 + 0.125 * inter + 0.25 * (inter and cell.sparsity == 0.98)
    cost = None if settings.deploy_threads is None else Deployment(1000 * (2 + inter + cell.seed), latency, 0.5)
    return Result(cell, 90.0 + cell.seed, None, 1000, 100, 0, (), 0.5, deployment=cost)


def silent() -> Console:
    return Console(file=io.StringIO(), width=80)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is timed, and with how many threads; the times are made up."""
    observed: dict[str, Any] = {}

    def side_by_side(calls: Mapping[str, Callable[[], object]], **options: int) -> dict[str, list[float]]:
        observed.update(calls, threads=torch.get_num_threads(), options=options)
        return {"pruned": [0.001, 0.009, 0.002], "dense": [0.004, 0.003, 0.008]}

    monkeypatch.setattr(deployment, "side_by_side", side_by_side)
    return observed


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("space", config.SPACES)
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
    measured = measure(model, dense, image, threads)
    assert torch.get_num_threads() == before and timed["threads"] == threads
    assert (measured.latency, measured.dense_latency) == (2.0, 4.0)
    assert isinstance(timed["pruned"].func, SparseNetwork) and timed["dense"].func is dense
    torch.testing.assert_close(timed["pruned"](), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(timed["dense"](), dense(image))
    stored = report(model).everything.bytes_sparse
    assert stored < measured.file_bytes < stored + 4000  # the header


@pytest.mark.parametrize("criterion", ["torch:l1", "ip:rigl", "tp:l1", "tp:ticket", "nni:l1_norm"])
@pytest.mark.parametrize("space", config.SPACES)
def test_the_network_of_any_criterion_is_measured_and_nothing_else_changes(
    criterion: str, space: Any, timed: dict[str, Any]
) -> None:
    for host in {"tp": ["torch_pruning"], "nni": ["nni", "torch_pruning"]}.get(criterion.partition(":")[0], []):
        pytest.importorskip(host)
    cell = Cell(criterion, 0.5, space, 0)
    state = torch.get_rng_state()
    result = execute(cell, DEPLOYED)
    assert torch.equal(torch.get_rng_state(), state)
    plain = execute(cell, QUICK)
    assert plain.deployment is None and result.deployment is not None
    assert replace(result, seconds=0, deployment=None) == replace(plain, seconds=0)
    channels = [layer.out_channels for layer in timed["dense"].func if isinstance(layer, nn.Conv2d)]
    assert channels == [32, 64, 64]
    assert timed["pruned"]().shape == (1, 10)
    # Of 56,224 parameters a half is left, of channels a quarter: values of 4 bytes, positions and the header besides.
    share = 0.25 if result.macs_left else 0.5
    assert 0.9 * share < result.deployment.file_bytes / (4 * 56224) < share + 0.12


def test_a_failure_leaves_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*calls: Any, **options: Any) -> Any:
        raise RuntimeError("out of time")

    monkeypatch.setattr(deployment, "side_by_side", broken)
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="out of time"):
        measure(NETWORKS["convnet"](1, 10).eval(), NETWORKS["convnet"](1, 10).eval(), torch.randn(1, 1, 8, 8), 1)
    assert torch.get_num_threads() == before


# Results


def test_deployments_are_read_back_and_files_without_them_load(tmp_path: Path) -> None:
    cell = Cell("torch:l1", 0.95, "interspace", 0)
    first = replace(made_up(cell), deployment=Deployment(12345, 1 / 3, 2e-5))
    with Results.open(tmp_path / "new", DEPLOYED) as results:
        results.add(first)
    with Results.open(tmp_path / "new", DEPLOYED) as results:
        assert results.rows == {cell: first}
    # As they were written before there was anything to measure.
    old = tmp_path / "old"
    with Results.open(old, QUICK) as results:
        results.add(replace(first, deployment=None))
    with (old / "results.csv").open(newline="") as file:
        rows = [row[: COLUMNS.index("file_bytes")] for row in csv.reader(file)]
    (old / "results.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    study = json.loads((old / "study.json").read_text())
    del study["settings"]["deploy_threads"]
    (old / "study.json").write_text(json.dumps(study))
    with Results.open(old, QUICK) as results:
        assert results.rows == {cell: replace(first, deployment=None)}
    with pytest.raises(StudyError, match="deploy_threads is None there and 1 here"):
        Results.open(old, DEPLOYED).__enter__()


def test_a_line_with_half_of_a_deployment_is_refused(tmp_path: Path) -> None:
    with Results.open(tmp_path, DEPLOYED) as results:
        results.add(made_up(Cell("torch:l1", 0.95, "spatial", 0)))
    path = tmp_path / "results.csv"
    path.write_text(path.read_text().replace(",0.25,0.5\n", ",0.25,\n"))
    with pytest.raises(StudyError, match="line 2 cannot be read"):
        Results.open(tmp_path, DEPLOYED).__enter__()


# What is shown


def test_the_table_by_hand() -> None:
    results = {cell: made_up(cell) for cell in STUDY.cells()}
    analysis = Analysis(STUDY, results)
    table = deployment_table(analysis)
    assert len(table.headers) == len(table.rows[0])
    # Files of 2,000, 3,000 and 4,000 bytes; in the interspace 1,000 more.
    assert table.rows == [
        ["torch:l1", "0.9", "SP", "3.0 ± 1.0", "250 ± 0", "500 ± 0", "2.00 ± 0.00"],
        ["torch:l1", "0.9", "IP", "4.0 ± 1.0", "375 ± 0", "500 ± 0", "1.33 ± 0.00"],
        ["torch:l1", "0.98", "SP", "3.0 ± 1.0", "250 ± 0", "500 ± 0", "2.00 ± 0.00"],
        ["torch:l1", "0.98", "IP", "4.0 ± 1.0", "625 ± 0", "500 ± 0", "0.80 ± 0.00"],
    ]
    assert "slower in 1 of 4 lines: torch:l1 at 0.98, interspace." in remarks(analysis)[-1]
    some = {cell: result for cell, result in results.items() if cell.space == "spatial" and cell.seed == 1}
    assert [row[2:4] for row in deployment_table(Analysis(STUDY, some)).rows] == [["SP", "3.0 ± 0.0"]] * 2
    nothing = Analysis(STUDY, {})
    assert len(tables(nothing)) == 1 and remarks(nothing) == []


def test_it_is_shown_and_only_where_they_were_asked_for(tmp_path: Path) -> None:
    console = silent()
    assert compare(STUDY, tmp_path / "a", console, engine=one_by_one(made_up)) == {}
    text, page = console.file.getvalue(), (tmp_path / "a" / "report.html").read_text()  # type: ignore[attr-defined]
    assert "latency of one image on the CPU with 1 thread" in text and "1.33 ± 0.00" in text
    assert "<h2>Deployed: " in page and "1.33 ± 0.00" in page and "with 1 thread<" in page
    console = silent()
    plain = replace(STUDY, settings=QUICK)
    assert compare(plain, tmp_path / "b", console, engine=one_by_one(made_up)) == {}
    text, page = console.file.getvalue(), (tmp_path / "b" / "report.html").read_text()  # type: ignore[attr-defined]
    assert "atency" not in text and "Deployed" not in page and "atencies" not in page


# What is refused


def test_latencies_are_not_measured_beside_other_runs() -> None:
    began: list[Cell] = []
    with pytest.raises(StudyError, match="nothing else running.\nFound: 2 jobs"):
        next(Processes(2)(STUDY.cells(), DEPLOYED, began.append, lambda: None))
    assert began == []


def test_nni_is_refused() -> None:
    pytest.importorskip("nni")
    from ip_plugin.compare.engines.nni import NniEngine

    with pytest.raises(StudyError, match="nothing else running.\nFound: the engine nni"):
        next(NniEngine()(STUDY.cells(), DEPLOYED, lambda cell: None, lambda: None))


@pytest.mark.parametrize("threads", [0, -1, 100000])
def test_numbers_of_threads_that_there_are_not(threads: int) -> None:
    with pytest.raises(StudyError, match=f"a number from 1 to .*\nFound: {threads}\n.*NUMBA_NUM_THREADS"):
        Settings(deploy_threads=threads)


def test_mistakes_are_messages_and_nothing_is_made(tmp_path: Path, refused: Callable[..., str]) -> None:
    for arguments, text in (
        (["--deploy", "--jobs", "2"], "Found: --jobs 2 What to do: leave out --jobs and --engine with"),
        (["--deploy", "--engine", "nni"], "Found: --engine nni"),
        (["--deploy-threads", "1"], "--deploy-threads: is an option of --deploy"),
    ):
        assert text in refused("compare", *arguments)
    script = "import sys; sys.modules['numba'] = None; from ip_plugin.__main__ import main; main()"
    command = [sys.executable, "-c", script, "compare", "--deploy"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert run.returncode == 2 and "What to do: run: pip install 'ip-plugin[sparse]'" in " ".join(run.stderr.split())
    assert list(tmp_path.iterdir()) == []
