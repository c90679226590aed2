"""`ip-plugin inspect` and `ip-plugin bake` read a compact file without the model."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_workers import small
from safetensors.torch import load_file
from torch.nn.utils import prune as host
from typer.testing import CliRunner

from ip_plugin import bake, cli, interspace, prunable, report, save
from ip_plugin.adapters import torch_prune
from ip_plugin.checkpoint.inspection import inspect


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = interspace(small(), basis="orthonormal", sharing="model")
    torch_prune.global_unstructured(prunable(model), torch_prune.L1Unstructured, amount=0.8)
    model[0].parametrizations.weight.original.data[0, 0] = 0  # a kept zero is not counted
    save(model, tmp_path / "model")
    save(model, tmp_path / "resumable", resumable=True)
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["model", "resumable"])
def test_a_file_shows_what_the_report_shows(name: str, file: Path) -> None:
    model = interspace(small(), basis="orthonormal", sharing="model")
    torch_prune.global_unstructured(prunable(model), torch_prune.L1Unstructured, amount=0.8)
    model[0].parametrizations.weight.original.data[0, 0] = 0
    expected, found = report(model), inspect(file.with_name(name))
    lines = {line.name.removesuffix(".weight"): line for line in found.lines if line.name.endswith("weight")}
    for row in expected.rows:
        line = lines[row.layer]
        assert (line.shape, line.entries, line.nonzeros) == (row.shape, row.parameters, row.nonzeros)
        assert line.masked and (line.basis == 0) == (row.space == "interspace")
        if name == "model":
            assert line.nbytes + 4 * row.basis_parameters == row.bytes_sparse
    assert found.bases == (324,) and found.nbytes == file.with_name(name).stat().st_size
    assert found.nbytes_dense == expected.everything.bytes_dense
    if name == "model":
        assert found.nbytes - found.header == expected.everything.bytes_sparse
        assert lines["2"].positions == "gaps4"


def test_the_command_prints_it(file: Path) -> None:
    run = CliRunner().invoke(cli.app, ["inspect", str(file)])
    assert run.exit_code == 0
    rows = {
        line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:-1]]
        for line in run.stdout.splitlines()
        if "│" in line
    }
    assert rows["2.weight"][:3] == ["8x8x3x3", "float32", "576"]
    assert rows["2.weight"][6:] == ["gaps4", "yes", "0"]
    assert rows["6.weight"][6:] == [inspected_positions(file), "yes", ""]
    assert rows["1 bases"][5] == "324" and rows["file"][5] == f"{file.stat().st_size:,}"
    assert "8 vectors and scalars" in rows and "bytes if stored densely" in run.stdout


def inspected_positions(file: Path) -> str:
    return next(line.positions for line in inspect(file).lines if line.name == "6.weight")


def test_a_bad_file_is_an_error_of_one_message(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_bytes(file.read_bytes()[:-1])
    for command in (["inspect", str(file)], ["bake", str(file), "--model", "checkpoint_workers:small", "-o", "out"]):
        monkeypatch.setattr(sys, "argv", ["ip-plugin", *command])
        with pytest.raises(SystemExit) as caught:
            cli.run()
        captured = capsys.readouterr()
        assert caught.value.code == 2 and captured.out == ""
        assert re.match(r"error: A compact file must be complete", captured.err)
    assert CliRunner().invoke(cli.app, ["inspect", str(file) + "x"]).exit_code == 2


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt"])
def test_the_command_bakes(name: str, file: Path, tmp_path: Path) -> None:
    command = ["bake", str(file), "--model", "checkpoint_workers:small", "-o", str(tmp_path / name)]
    run = CliRunner().invoke(cli.app, command)
    assert run.exit_code == 0, run.output
    out = tmp_path / name
    state = load_file(out) if name.endswith("safetensors") else torch.load(out, weights_only=True)
    model = interspace(small(), basis="orthonormal", sharing="model")
    torch_prune.global_unstructured(prunable(model), torch_prune.L1Unstructured, amount=0.8)
    model[0].parametrizations.weight.original.data[0, 0] = 0
    expected = bake(model).state_dict()
    assert set(state) == set(expected) and all(torch.equal(state[key], expected[key]) for key in expected)
    small().load_state_dict(state)


@pytest.mark.parametrize(
    ("model", "text"),
    [("nowhere:small", "No module named"), ("checkpoint_workers:large", "no attribute"), (":x", "Empty module name"),
     ("builtins:list", "gives a list, not a module")],
)  # fmt: skip
def test_a_model_that_is_none_is_a_usage_error(model: str, text: str, file: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(cli.app, ["bake", str(file), "--model", model, "-o", str(tmp_path / "out")])
    assert run.exit_code == 2 and text in re.sub(r"[\s│]+", " ", run.output)
    assert not (tmp_path / "out").exists()


def test_masks_of_the_host_are_masks_of_ours(tmp_path: Path) -> None:
    model = small()
    host.l1_unstructured(model[2], "weight", amount=500)
    save(model, tmp_path / "model")
    (line,) = (line for line in inspect(tmp_path / "model").lines if line.masked)
    assert (line.name, line.nonzeros, line.entries) == ("2.weight", 76, 576)


def test_a_folder_that_is_not_there_is_a_usage_error(file: Path, tmp_path: Path) -> None:
    command = ["bake", str(file), "--model", "checkpoint_workers:small", "-o", str(tmp_path / "none" / "out")]
    run = CliRunner().invoke(cli.app, command)
    assert run.exit_code == 2 and "there is no folder" in run.output
