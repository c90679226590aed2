"""ip-plugin compare: what it runs, keeps and shows."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from ip_plugin import cli, interspace, masks, report
from ip_plugin.adapters import torch_prune
from ip_plugin.compare import config, criteria
from ip_plugin.compare.analysis import Analysis
from ip_plugin.compare.cell import Result, epochs_of, execute
from ip_plugin.compare.config import Cell, Settings, Study
from ip_plugin.compare.engines import EngineError
from ip_plugin.compare.engines.local import one_by_one
from ip_plugin.compare.report import accuracy_table, image, plot, remarks
from ip_plugin.compare.store import COLUMNS, Results, from_row, to_row
from ip_plugin.compare.study import compare
from ip_plugin.compare.tasks import TASKS
from ip_plugin.errors import StudyError

#: Criteria as they are: some leave layers almost empty.
pytestmark = pytest.mark.filterwarnings("ignore::ip_plugin.errors.LayerCollapseWarning")

QUICK = Settings(epochs=2, finetune_epochs=1)
SMALL = Study(settings=QUICK, sparsities=(0.9,), seeds=(0, 1))
COMMAND = [sys.executable, "-m", "ip_plugin", "compare", "--epochs", "2", "--finetune-epochs", "1", "--seeds", "0,1"]


def silent() -> Console:
    return Console(file=io.StringIO(), width=120)


def made_up(cell: Cell, settings: Settings = QUICK, epoch_done: Callable[[], None] = lambda: None) -> Result:
    """SP has accuracies of 80, 81, ...; IP is 1, 2, ... above it."""
    for _ in range(epochs_of(cell, settings)):
        epoch_done()
    accuracy = 80.0 + cell.seed + (1 + cell.seed if cell.space == "interspace" else 0) - 10 * (cell.sparsity == 0.98)
    basis = 81 if cell.space == "interspace" else 0
    return Result(cell, accuracy, None, 1000, 100, basis, (), 0.5)


# Cells


@pytest.mark.parametrize("sharing", ["layer", "model"])
@pytest.mark.parametrize(
    ("criterion", "sparsity"),
    [("torch:random", 0.0), ("torch:random", 0.95), ("torch:l1", 0.5), ("torch:l1_init", 0.95)],
)
def test_both_spaces_keep_equally_many_parameters(criterion: str, sparsity: float, sharing: Any) -> None:
    settings = replace(QUICK, epochs=1, sharing=sharing, train_images=200)
    spatial, inter = (execute(Cell(criterion, sparsity, space, 0), settings) for space in config.SPACES)
    total = sum(p.numel() for n, p in TASKS["digits"].network().named_parameters() if p.ndim > 1)
    assert spatial.parameters == inter.parameters == total == 56224
    assert spatial.parameters_left == inter.parameters_left == round((1 - sparsity) * total)
    assert spatial.basis_parameters == 0
    layers = {"layer": 2 if sparsity == 0.95 else 3, "model": 1}[sharing]
    assert inter.basis_parameters == 81 * layers
    # At 95 % the 288 coefficients of the first layer keep 14 values, and its basis has 81 numbers.
    assert inter.spatial_layers == (("0",) if layers == 2 else ())


def test_both_spaces_start_from_the_same_weights_and_batches() -> None:
    # With the standard basis, which does not move, an unpruned interspace network is the plain one, in every digit.
    settings = replace(QUICK, basis="standard", basis_lr=0.0)
    spatial, inter = (execute(Cell("torch:l1", 0.0, space, 3), settings) for space in config.SPACES)
    assert inter.accuracy_before_pruning == spatial.accuracy_before_pruning
    assert inter.basis_parameters == 81


def test_equal_runs_give_equal_results_and_leave_the_random_state() -> None:
    cell = Cell("torch:random", 0.9, "interspace", 5)
    state = torch.get_rng_state()
    first = execute(cell, QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert replace(execute(cell, QUICK), seconds=0) == replace(first, seconds=0)
    assert execute(cell._replace(seed=6), QUICK).accuracy != first.accuracy


def test_training_learns_and_pruning_is_measured() -> None:
    result = execute(Cell("torch:l1", 0.5, "spatial", 0), Settings(epochs=6, finetune_epochs=2))
    assert result.accuracy > 90 and result.accuracy_before_pruning is not None and result.accuracy_before_pruning > 90
    chance = execute(Cell("torch:random", 0.999, "spatial", 0), QUICK)
    assert chance.accuracy < 40 and chance.accuracy_before_pruning is None


def test_a_sparsity_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(StudyError, match="keep at least one parameter"):
        execute(Cell("torch:random", 0.999999, "interspace", 0), QUICK)


def test_progress_counts_every_epoch() -> None:
    for criterion, expected in (("torch:random", 2), ("torch:l1", 3)):
        cell, done = Cell(criterion, 0.9, "spatial", 0), []
        execute(cell, QUICK, lambda done=done: done.append(1))
        assert len(done) == epochs_of(cell, QUICK) == expected


# Config


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Study(criteria=("torch:l2",)), "'torch:l2'\n.*use one of .*torch:l1"),
        (lambda: Study(criteria=("snip",)), "'snip'"),
        (lambda: Study(criteria=("jax:l1",)), "'jax:l1'"),
        (lambda: Study(criteria=()), "`criteria` must have at least one value"),
        (lambda: Study(sparsities=(0.9, 1.0)), "1.0"),
        (lambda: Study(sparsities=(-0.1,)), "-0.1"),
        (lambda: Study(sparsities=(float("nan"),)), "nan"),
        (lambda: Study(spaces=("fourier",)), "'fourier'"),  # type: ignore[arg-type]
        (lambda: Study(seeds=(0, 0)), "every value once"),
        (lambda: Study(seeds=(-1,)), "-1"),
        (lambda: Settings(epochs=0), "`epochs`"),
        (lambda: Settings(lr=0.0), "`lr`"),
        (lambda: Settings(basis="wavelet"), "'wavelet'"),  # type: ignore[arg-type]
        (lambda: Settings(sharing="stage"), "'stage'"),  # type: ignore[arg-type]
        (lambda: Settings(task="mnist"), "'mnist'"),
        (lambda: Settings(device="cuda:77"), "device.*\n.*'cuda:77'"),
        (lambda: Settings(device="abacus"), "'abacus'"),
    ],
)
def test_studies_that_make_no_sense_are_refused(make: Callable[[], object], text: str) -> None:
    with pytest.raises(StudyError, match=text):
        make()


def test_the_grid_is_whole_and_pairs_run_one_after_the_other() -> None:
    cells = Study().cells()
    assert len(cells) == len(set(cells)) == 2 * 3 * 2 * 5
    for spatial, inter in zip(cells[::2], cells[1::2], strict=True):
        assert inter == spatial._replace(space="interspace") and spatial.space == "spatial"


def test_criteria_prune_in_either_space() -> None:
    batch = torch.randn(8, 1, 8, 8), torch.arange(8)
    context: Any = SimpleNamespace(batches=lambda count: [batch], loss=nn.functional.cross_entropy)
    for name, criterion in criteria.available().items():
        for convert in (False, True):
            if criterion.stage == "while training":  # see test_builtin_criteria.py, test_channel_criteria.py
                continue
            model = TASKS["digits"].network()
            model = interspace(model) if convert else model
            criterion.prune(model, 0.5 if criterion.removes_channels else 50000, context)
            if criterion.removes_channels:
                assert [module.out_channels for module in model if isinstance(module, nn.Conv2d)] == [16, 32, 32], name
                assert all(p.grad is None for p in model.parameters())
            else:
                assert report(model).prunable.nonzeros == 6224, name


@pytest.mark.parametrize("name", ["tp:magnitude", "tp:random"])
def test_both_spaces_keep_equally_many_channels(name: str) -> None:
    pytest.importorskip("torch_pruning")
    results = [execute(Cell(name, 0.5, space, 0), replace(QUICK, epochs=1)) for space in config.SPACES]
    # 16, 32 and 32 channels of 3x3 kernels on 8x8 and 4x4 positions, and a linear layer.
    assert [result.parameters_left for result in results] == [144 + 4608 + 9216 + 320] * 2
    assert [result.macs for result in results] == [64 * (288 + 18432) + 16 * 36864 + 640] * 2
    assert [result.macs_left for result in results] == [64 * (144 + 4608) + 16 * 9216 + 320] * 2
    assert [result.basis_parameters for result in results] == [0, 81]


def test_multiply_adds_are_shown_where_channels_are_removed(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    study = replace(SMALL, criteria=("tp:magnitude", "torch:l1"))

    def made(cell: Cell, *rest: Any) -> Result:
        return replace(made_up(cell, *rest), **({"macs": 200, "macs_left": 31} if cell.criterion[:2] == "tp" else {}))

    out = io.StringIO()
    compare(study, tmp_path, Console(file=out, width=150), engine=one_by_one(made))
    last = [accuracy_table(Analysis(grid, {})).headers[-1] for grid in (study, SMALL)]
    assert last == ["MACs left", "parameters left"]
    assert re.search(r"tp:magnitude .* 15.5%", out.getvalue())
    assert re.search(r"torch:l1 .* –", out.getvalue())
    assert "sparsity is the share of the channels that are removed" in (tmp_path / "report.html").read_text()


# Results


def test_results_are_read_back_as_they_were(tmp_path: Path) -> None:
    first = made_up(Cell("torch:l1", 0.95, "interspace", 0))
    second = replace(
        first, cell=first.cell._replace(seed=1), accuracy=1 / 3, accuracy_before_pruning=0.1, spatial_layers=("a", "b"),
        macs=200, macs_left=31,
    )  # fmt: skip
    with Results.open(tmp_path / "new" / "folder", QUICK) as results:
        results.add(first)
        results.add(second)
    with Results.open(tmp_path / "new" / "folder", QUICK) as results:
        assert results.rows == {first.cell: first, second.cell: second}
    assert [from_row(json.loads(json.dumps(to_row(result)))) for result in (first, second)] == [first, second]
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [".lock", "results.csv", "study.json"]


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "other files": (lambda f: (f / "thesis.tex").write_text("x"), "no study.json, but thesis.tex"),
    "other settings": (lambda f: open_and_close(f, replace(QUICK, epochs=3)), "epochs is 3 there and 2 here"),
    "other versions": (
        lambda f: (f / "study.json").write_text(json.dumps({"settings": vars(QUICK), "versions": {"torch": "1.0"}})),
        "torch is '1.0' there",
    ),
    "a broken study.json": (lambda f: (f / "study.json").write_text("{"), "study.json that cannot be read"),
    "a list": (lambda f: (f / "study.json").write_text("[]"), "study.json that cannot be read"),
    "a broken results.csv": (
        lambda f: (open_and_close(f, QUICK), (f / "results.csv").write_text(",".join(COLUMNS) + "\ntorch:l1,0.9\n")),
        "results.csv, whose line 2 cannot be read",
    ),
    "an unknown space": (
        lambda f: (
            open_and_close(f, QUICK),
            (f / "results.csv").write_text(",".join(COLUMNS) + "\nx,0,y,0,0,,0,0,0,,0\n"),
        ),
        "line 2 cannot be read .space 'y'",
    ),
}


def open_and_close(folder: Path, settings: Settings) -> None:
    with Results.open(folder, settings):
        pass


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_of_something_else_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    make, text = FOREIGN[name]
    make(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(StudyError, match=text):
        compare(SMALL, tmp_path, silent(), engine=one_by_one(made_up))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name in before} == before


def test_a_file_and_a_folder_in_use_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StudyError, match="a file"):
        compare(SMALL, tmp_path / "file", silent(), engine=one_by_one(made_up))
    open_and_close(tmp_path / "used", QUICK)
    with FileLock(tmp_path / "used" / ".lock"), pytest.raises(StudyError, match="another process"):
        compare(SMALL, tmp_path / "used", silent(), engine=one_by_one(made_up))


# Studies


def test_a_study_goes_on_where_it_was_and_grows(tmp_path: Path) -> None:
    executed: list[Cell] = []

    def counting(cell: Cell, settings: Settings, epoch_done: Callable[[], None]) -> Result:
        if len(executed) == 5:
            raise KeyboardInterrupt
        executed.append(cell)
        return made_up(cell, settings, epoch_done)

    with pytest.raises(KeyboardInterrupt):
        compare(SMALL, tmp_path, silent(), engine=one_by_one(counting))
    assert len(read(tmp_path)) == 5
    finished = list(executed)
    executed.clear()
    console = silent()
    noted = one_by_one(lambda cell, *rest: (executed.append(cell), made_up(cell, *rest))[1])
    assert compare(SMALL, tmp_path, console, engine=noted) == {}
    assert executed == SMALL.cells()[5:] and finished == SMALL.cells()[:5]
    assert "5 of 8 runs are in" in console.file.getvalue()  # type: ignore[attr-defined]
    # More seeds and another criterion: only what is new is run.
    executed.clear()
    more = replace(SMALL, seeds=(0, 1, 2), criteria=("torch:l1",))
    compare(more, tmp_path, silent(), engine=noted)
    assert {cell.seed for cell in executed} == {2} and len(executed) == 2
    assert len(read(tmp_path)) == 10


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_cell_that_fails_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    bad = SMALL.cells()[3]

    def failing(cell: Cell, settings: Settings, epoch_done: Callable[[], None]) -> Result:
        if cell == bad:
            raise RuntimeError("out of [memory]")
        return made_up(cell, settings, epoch_done)

    console = silent()
    failures = compare(SMALL, tmp_path, console, engine=one_by_one(failing))
    assert list(failures) == [bad] and len(read(tmp_path)) == 7
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"failed: {bad}: RuntimeError: out of [memory]" in " ".join(text.split())
    assert (tmp_path / "report.html").exists()
    assert compare(SMALL, tmp_path, silent(), engine=one_by_one(made_up)) == {} and len(read(tmp_path)) == 8


def test_the_table_by_hand() -> None:
    study = Study(settings=QUICK, criteria=("torch:l1",), sparsities=(0.9, 0.98), seeds=(0, 1, 2))
    analysis = Analysis(study, {cell: made_up(cell) for cell in study.cells()})
    table = accuracy_table(analysis)
    assert table.headers == ["criterion", "sparsity", "SP %", "IP %", "IP − SP", "parameters left"]
    # SP 80, 81, 82; IP 81, 83, 85; differences 1, 2, 3.
    assert table.rows == [
        ["torch:l1", "0.9", "81.0 ± 1.0", "83.0 ± 2.0", "+2.0 ± 1.0", "100"],
        ["torch:l1", "0.98", "71.0 ± 1.0", "73.0 ± 2.0", "+2.0 ± 1.0", "100"],
    ]
    assert "below ordinary pruning in 0 of 2 lines." in remarks(analysis)[0]


def test_a_loss_is_said() -> None:
    study = Study(settings=QUICK, criteria=("torch:l1",), sparsities=(0.9,), seeds=(0, 1))
    results = {cell: made_up(cell) for cell in study.cells()}
    for cell in results:
        if cell.space == "interspace":
            results[cell] = replace(results[cell], accuracy=70.0 + cell.seed, spatial_layers=("0",))
    analysis = Analysis(study, results)
    assert accuracy_table(analysis).rows[0][4] == "−10.0 ± 0.0"
    first, second = remarks(analysis)
    assert "below ordinary pruning in 1 of 1 lines: torch:l1 at 0.9" in first
    assert "0 stayed spatial" in second


def test_half_a_study_and_one_space_are_shown() -> None:
    study = Study(settings=QUICK, criteria=("torch:l1",), sparsities=(0.9,), seeds=(0,))
    nothing = Analysis(study, {})
    assert accuracy_table(nothing).rows == [["torch:l1", "0.9", "–", "–", "–", "–"]]
    alone = replace(study, spaces=("interspace",))
    analysis = Analysis(alone, {cell: made_up(cell) for cell in alone.cells()})
    assert accuracy_table(analysis).rows == [["torch:l1", "0.9", "81.0 ± 0.0", "100"]]
    assert len(accuracy_table(analysis).headers) == 4
    for analysis in (nothing, Analysis(alone, {})):
        assert image(plot(analysis), "png").startswith(b"\x89PNG")


def test_the_page_stands_alone_and_equal_results_give_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        compare(SMALL, tmp_path / name, silent(), command="ip-plugin compare <x>", engine=one_by_one(made_up))
    for file in ("results.csv", "accuracy.png", "accuracy.svg", "report.html", "study.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    html = (tmp_path / "a" / "report.html").read_text()
    assert "ip-plugin compare &lt;x&gt;" in html and "<svg" in html and "+1.5 ± 0.7" in html
    assert not re.search(r"""(src|href)=["'](?!#)|@import|url\((?!#)""", html)


# The command


def run_command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=240, **options)


def test_killed_half_way_and_started_again_it_loses_no_finished_run(tmp_path: Path) -> None:
    study = replace(SMALL, criteria=("torch:random",), settings=replace(QUICK, train_images=300))
    grid = ["--criteria", "torch:random", "--sparsities", "0.9", "--train-images", "300"]
    arguments = [*grid, "--output", str(tmp_path / "killed")]
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "results.csv").exists() or len(read(tmp_path / "killed")) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = read(tmp_path / "killed")
    assert 2 <= len(before) < 4
    again = run_command(*arguments)
    assert again.returncode == 0, again.stderr
    assert f"{len(before)} of 4 runs are in" in again.stdout
    assert compare(study, tmp_path / "whole", silent()) == {}
    killed, expected = read(tmp_path / "killed"), read(tmp_path / "whole")
    assert killed[: len(before)] == before
    for row in (*killed, *expected):
        del row["seconds"]
    assert killed == expected
    assert (tmp_path / "killed" / "accuracy.png").read_bytes() == (tmp_path / "whole" / "accuracy.png").read_bytes()


def test_mistakes_are_messages_and_status_2(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for arguments, text in (
        (["--output", str(tmp_path)], "no study.json, but notes.txt"),
        (["--criteria", "torch:l7"], "'torch:l7'"),
        (["--sparsities", "0.9,many"], "'0.9,many'"),
        (["--sparsities", "90"], "fractions of at least 0 and below 1"),
        (["--device", "cuda:99"], "'cuda:99'"),
    ):
        assert text in refused("compare", *arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_mistake_leaves_no_traceback(tmp_path: Path) -> None:
    run = run_command("--criteria", "torch:l7", cwd=tmp_path)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())


def test_an_engine_that_fails_leaves_no_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: Callable[..., str]
) -> None:
    def broken(*arguments: object) -> Any:
        raise EngineError("out of order")

    monkeypatch.setattr(cli, "local", broken)
    assert refused("compare", "--output", str(tmp_path / "out")) == "error: out of order"


def test_criteria_and_version_are_listed() -> None:
    listed = CliRunner().invoke(cli.app, ["criteria"])
    assert "torch:l1" in listed.output and "global magnitude, after training" in listed.output
    version = CliRunner().invoke(cli.app, ["--version"])
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", version.output)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    script = """
import sys
sys.modules["matplotlib"] = None
import importlib.util, ip_plugin.__main__ as entry
find = importlib.util.find_spec
entry.find_spec = lambda name: None if name == "matplotlib" else find(name)
entry.main()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 1 and "matplotlib not installed; run: pip install 'ip-plugin[compare]'" in run.stderr


def test_magnitude_pruning_of_the_study_is_the_adapters() -> None:
    model, reference = (TASKS["digits"].network() for _ in range(2))
    reference.load_state_dict(model.state_dict())
    criteria.load("torch:l1").prune(model, 1000)
    pairs = [(m, "weight") for m in reference.modules() if hasattr(m, "weight") and m.weight.ndim > 1]
    torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=1000)
    assert all(torch.equal(mask, masks(reference)[name]) for name, mask in masks(model).items())
