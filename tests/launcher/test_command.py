"""`ip-plugin run`: the script's arguments, output, errors and exit status are its own."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from ip_plugin import errors, load
from ip_plugin.launcher.command import main
from ip_plugin.launcher.side_by_side import compare_script, read_metric

SCRIPT = """
import argparse, sys, torch
from torch import nn
from torch.nn.utils.prune import L1Unstructured, global_unstructured
parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--end", default="")
args = parser.parse_args()
torch.manual_seed(args.seed)
class Net(nn.Sequential):
    pass
model = Net(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, y = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
for step in range(4):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    if step == 1 and args.end != "unpruned":
        global_unstructured([(model[0], "weight"), (model[3], "weight")], L1Unstructured, amount=0.5)
torch.save(model.state_dict(), f"state{args.seed}.pt")
print("loss:", nn.functional.cross_entropy(model(x), y).item(), type(model).__module__, sys.argv[1:])
if args.end == "text":
    sys.exit("so long")
if args.end == "error":
    raise RuntimeError("broken")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ip_plugin", "run", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_script_with_its_arguments_and_output_folder(folder: Path) -> None:
    done = run(folder, "--basis", "dct", "--output", "out", "script.py", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("loss:")
    assert done.stdout.endswith("__main__ ['--seed', '3']\n")
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert "Net: 1 layers converted (dct basis), 1 bases with 81 numbers added" in lines[0]
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    model.load_state_dict(torch.load(folder / "state3.pt"))
    x = torch.randn(2, 1, 8, 8)
    outputs = model(x)
    totals = json.loads((folder / "out" / "report.json").read_text())["prunable"]
    assert (totals["parameters"], totals["nonzeros"]) == (468, 234)
    torch.testing.assert_close(load(model, folder / "out" / "model.safetensors")(x), outputs)


def test_the_control_run_prints_what_the_script_prints_alone(folder: Path) -> None:
    alone = subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True, text=True)
    control = run(folder, "--space", "spatial", "-m", "script")
    assert control.stdout == alone.stdout
    assert "at the end: 50.00%" in control.stderr


@pytest.mark.parametrize(
    ("end", "status", "stderr"),
    [("text", 1, "so long"), ("error", 1, "RuntimeError: broken"), ("unpruned", 0, "nothing was pruned")],
)
def test_how_it_ends(folder: Path, end: str, status: int, stderr: str) -> None:
    done = run(folder, "script.py", "--end", end)
    assert done.returncode == status
    assert stderr in done.stderr
    if end == "error":
        frames = [line for line in done.stderr.splitlines() if line.startswith("  File")]
        assert len(frames) == 1
        assert "script.py" in frames[0]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((), "required: SCRIPT"),
        (("nothing.py",), "no file 'nothing.py'"),
        (("--fast", "script.py"), "unrecognized arguments: --fast"),
        (("--from", "never", "script.py"), "'never'"),
        (("--compare", "--seeds", "0,1", "script.py"), "2 seeds"),
        (("--compare", "--seeds", "one", "script.py"), "'one'"),
        (("--output", "script.py/out", "script.py"), "script.py/out"),
    ],
)
def test_bad_input_is_a_line_that_says_so(
    folder: Path, arguments: tuple[str, ...], match: str, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    assert match in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("-m", "ip_plugin", "run", "script.py"), "switched on already"),
        (("--compare", "--metric", "accuracy ([0-9.]+)", "script.py"), "0 matches of"),
    ],
    ids=["nested", "no metric"],
)
def test_runs_that_cannot_work_say_so(folder: Path, arguments: tuple[str, ...], match: str) -> None:
    done = run(folder, *arguments)
    assert done.returncode == 2
    assert match in done.stderr
    assert "Traceback" not in done.stderr


def test_side_by_side(folder: Path) -> None:
    done = run(folder, "--compare", "--metric", "loss: ([0-9.]+)", "--seed-option=--seed", "--seeds", "1", "script.py")
    assert done.returncode == 0, done.stderr
    (row,) = [line.split() for line in done.stdout.splitlines() if line.startswith("│")]
    spatial, interspace, difference = (float(row[i]) for i in (3, 5, 7))
    assert row[1] == "1"
    assert difference == pytest.approx(interspace - spatial, abs=1e-4)
    assert difference != 0
    assert "nothing can be said about chance" in done.stdout


def test_the_interval_over_seeds(monkeypatch: Any) -> None:
    def fake(call: list[str], **_: Any) -> Any:
        seed, switched = int(call[-1]), "interspace" in call
        return subprocess.CompletedProcess(call, 0, f"accuracy {0.5 + 0.01 * seed * switched}\n", "")

    monkeypatch.setattr(subprocess, "run", fake)
    out = io.StringIO()
    Console(file=out, width=150).print(compare_script([], ["s.py"], r"accuracy ([0-9.]+)", (1, 2, 3), "--seed"))
    # Differences 0.01, 0.02, 0.03: mean 0.02, standard error 0.01 / sqrt(3), and t = 4.3027 for two degrees of freedom.
    assert "+0.02, 95 % interval [-0.004841, +0.04484] over 3 seeds" in out.getvalue()


def test_metrics(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"test": {"accuracy": 0.5}}))
    assert read_metric("", f"{path}:test.accuracy") == 0.5


@pytest.mark.parametrize(
    ("metric", "match"),
    [
        (r"accuracy: ([0-9.]+)", "0 matches"),
        ("accuracy: (", "missing \\)"),
        ("(accuracy): (none)", "TypeError"),
        ("accuracy: (none)", "ValueError"),
        ("nothing.json:accuracy", "FileNotFoundError"),
    ],
)
def test_a_metric_that_is_not_there(metric: str, match: str) -> None:
    with pytest.raises(errors.StudyError, match=match):
        read_metric("accuracy: none", metric)


def test_an_interrupt_ends_it_as_it_ends_python(folder: Path) -> None:
    (folder / "endless.py").write_text(
        "import atexit, os, signal\natexit.register(print, 'goodbye')\nprint('hello')\n"
        "os.kill(os.getpid(), signal.SIGINT)"
    )
    alone = subprocess.run([sys.executable, "endless.py"], cwd=folder, capture_output=True, text=True)
    done = run(folder, "endless.py")
    assert done.returncode == alone.returncode == -signal.SIGINT
    assert done.stdout == alone.stdout == "hello\ngoodbye\n"
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"


def test_two_processes_of_torchrun(folder: Path) -> None:
    (folder / "distributed.py").write_text(DISTRIBUTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done: Any = subprocess.run(
        [*command, "-m", "ip_plugin", "run", "distributed.py"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("True") == 2  # the processes may write into each other's lines
    assert done.stderr.count("1 layers converted") == 1


DISTRIBUTED = """
import torch, torch.distributed as dist
from torch import nn
from torch.nn.utils import prune
dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torch.manual_seed(dist.get_rank())
for step in range(3):
    optimizer.zero_grad()
    model(torch.randn(2, 1, 8, 8)).square().sum().backward()
    optimizer.step()
    if step == 0:
        prune.l1_unstructured(model.module[0], "weight", amount=0.5)
sums = [None, None]
dist.all_gather_object(sums, [p.sum().item() for p in model.parameters()])
print("equal", sums[0] == sums[1] and len(sums[0]) == 5)
dist.destroy_process_group()
"""
