"""Sensitivity of a study's networks: training as the study says, or a checkpoint; what is written and suggested."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from ip_plugin import cli, errors, methods, report, save
from ip_plugin.compare import sensitivity
from ip_plugin.compare.config import Study
from ip_plugin.methods import Sensitivity, prune

QUICK: dict[str, Any] = {"data": {"train_images": 100}, "training": {"epochs": 1, "batch_size": 25}, "seeds": (3, 4)}
FEW = {"sparsities": [0.9], "images": 50}


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Files of the networks that are measured from now on."""
    files: list[Path] = []
    measure = methods.sensitivity

    def saved(model: nn.Module, *arguments: Any, **options: Any) -> Sensitivity:
        files.append(tmp_path / f"{len(files)}.ip")
        save(model, files[-1])
        return measure(model, *arguments, **options)

    monkeypatch.setattr(methods, "sensitivity", saved)
    return files


@pytest.mark.parametrize("accuracy", [False, True])
def test_networks_are_trained_as_the_study_says_and_nothing_else_changes(accuracy: bool) -> None:
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    study = Study(**QUICK)
    results = sensitivity.sensitivities(study, accuracy=accuracy, **FEW)
    assert list(results) == ["spatial", "interspace"]
    assert [result.basis_parameters for result in results.values()] == [0, 81]
    assert all(result.measure == ("accuracy" if accuracy else "loss") for result in results.values())
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), random_state)
    again = sensitivity.sensitivities(study.changed(spaces="IP"), accuracy=accuracy, **FEW)
    assert again == {"interspace": results["interspace"]}
    other = sensitivity.sensitivities(study.changed({"training.lr": 0.01}, spaces="IP"), accuracy=accuracy, **FEW)
    assert other["interspace"].curves != again["interspace"].curves


def test_a_checkpoint_is_measured_as_the_network_that_was_saved(networks: list[Path]) -> None:
    study = Study(**QUICK)
    trained = sensitivity.sensitivities(study, **FEW)
    for space, file in zip(trained, list(networks), strict=True):
        assert sensitivity.sensitivities(study, checkpoint=file, **FEW) == {space: trained[space]}


def made_up(*curves: list[tuple[int, float]], basis: int = 0) -> Sensitivity:
    layers = methods.layer_sensitivity
    points = {str(2 * i): layers.Curve(c[0][0], tuple(layers.Point(*p) for p in c)) for i, c in enumerate(curves)}
    return Sensitivity("loss", points, basis)


MADE_UP = {
    "spatial": made_up([(40, 0.1), (4, 3.0)], [(10, 0.1), (1, 3.0)]),
    "interspace": made_up([(40, 0.2), (4, 0.5)], [(10, 0.2), (1, 2.5)], basis=9),
}


def test_what_is_written_is_what_was_measured_and_prune_takes_what_is_suggested(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    sensitivity.write(MADE_UP, (0.5, 0.9), folder)
    names = {"sensitivity.csv", "sensitivity.png", "sensitivity.svg", "suggested.json"}
    assert {path.name for path in folder.iterdir()} == names
    frame = pd.read_csv(folder / "sensitivity.csv", dtype={"layer": str})
    assert list(frame) == ["space", "layer", "parameters", "sparsity", "kept", "loss"]
    assert frame.to_dict("list") == sensitivity.frame(MADE_UP).to_dict("list")
    assert len(frame) == 8 and list(frame["space"].unique()) == list(MADE_UP)
    suggested = json.loads((folder / "suggested.json").read_text())
    # In the interspace 5 entries are left at 0.9, fewer than the basis has.
    assert {space: list(totals) for space, totals in suggested.items()} == {
        "spatial": ["0.5", "0.9"], "interspace": ["0.5"]
    }  # fmt: skip
    network = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))
    assert report(prune(network, sparsity=suggested["interspace"]["0.5"])).prunable.nonzeros == 25 - 9


def test_the_picture_and_the_table_have_every_space() -> None:
    axes = sensitivity.plot(MADE_UP).axes
    assert [place.get_title() for place in axes if place.lines] == list(MADE_UP)
    assert axes[0].get_ylim() == axes[1].get_ylim()
    shown = sensitivity.table(MADE_UP, (0.5, 0.9))
    headers = [column.header for column in shown.columns]
    assert headers == ["layer", "spatial\n0.5", "interspace\n0.5", "spatial\n0.9"]
    assert list(shown.columns[0].cells) == ["0", "2"]
    assert list(shown.columns[2].cells) == [f"{MADE_UP['interspace'].suggest(0.5)[name]:.3f}" for name in ("0", "2")]


def test_what_cannot_be_measured_is_refused_and_the_threads_are_as_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = tmp_path / "other.ip"
    save(nn.Linear(3, 3), file)
    threads = torch.get_num_threads()
    with pytest.raises(errors.CheckpointError):
        sensitivity.sensitivities(Study(**QUICK), checkpoint=file)
    with pytest.raises(errors.AmountError, match="90"):
        sensitivity.sensitivities(Study(**QUICK), sparsities=[90])
    assert torch.get_num_threads() == threads
    with pytest.raises(errors.StudyError, match="other.ip"):
        sensitivity.write(MADE_UP, (0.5,), file / "folder")


def test_the_command_measures_writes_and_shows(networks: list[Path], tmp_path: Path) -> None:
    quick = ["--set", "training.epochs=1", "--set", "data.train_images=100", "--images", "50", "--sparsities", "90"]
    folder = tmp_path / "out"
    ended = CliRunner().invoke(cli.app, ["sensitivity", *quick, "--totals", "80%", "-o", str(folder)])
    assert ended.exit_code == 0, ended.output
    study = Study(training={"epochs": 1}, data={"train_images": 100})
    results = sensitivity.sensitivities(study, **FEW)
    assert (folder / "sensitivity.csv").read_text() == sensitivity.frame(results).to_csv(index=False)
    assert json.loads((folder / "suggested.json").read_text()) == sensitivity.suggestions(results, [0.8])
    assert "sensitivity.png" in ended.output and "interspace" in ended.output
    again = CliRunner().invoke(
        cli.app, ["sensitivity", *quick, "--accuracy", "--checkpoint", str(networks[1]), "-o", str(folder)]
    )
    assert again.exit_code == 0, again.output
    frame = pd.read_csv(folder / "sensitivity.csv")
    assert set(frame["space"]) == {"interspace"} and frame["accuracy"].between(0, 100).all()


def test_the_command_refuses_before_it_trains(
    refused: Callable[..., str], networks: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert "'file/out' must be a folder that can be written to" in refused("sensitivity", "-o", "file/out")
    assert "`sparsities` must be fractions" in refused("sensitivity", "--sparsities", "0.5,x")
    assert "`sparsities` must be fractions" in refused("sensitivity", "--totals", "0.5,x")
    assert "use 'epochs'" in refused("sensitivity", "--set", "training.epoch=3")
    assert "--checkpoint" in refused("sensitivity", "--checkpoint", "none.ip")
    assert networks == []
