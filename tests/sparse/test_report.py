"""`ip_plugin.report` of sparse networks: the figures of the model, and how each layer is run."""

from __future__ import annotations

import csv
import io
import json
from contextlib import nullcontext
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("numba")

from ip_plugin import interspace, report
from ip_plugin.core.tensor_ref import TensorRef
from ip_plugin.errors import SparseFallbackWarning
from ip_plugin.methods import apply_masks, magnitude, select
from ip_plugin.reporting.measure import Row
from ip_plugin.sparse import SparseNetwork, prepare

SPACES = pytest.mark.parametrize("space", ["spatial", "interspace"])
X = torch.randn(2, 3, 12, 12)


def network() -> nn.Module:
    """Convolutions that can run sparse, one whose padding cannot, one of another dimension, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3, 2, groups=2),
        nn.Flatten(2), nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(92, 2),
    )  # fmt: skip


def pruned(model: nn.Module, space: str, sparsity: float = 0.85) -> nn.Module:
    if space == "interspace":
        interspace(model, basis="orthonormal", sharing="model")
    return apply_masks(model, select(magnitude(model), sparsity=sparsity, scope="layer")).eval()


def shared(row: Row) -> dict[str, object]:
    """The columns that are equal for a sparse network and its model."""
    others = ("bytes_sparse", "runs", "milliseconds")
    return {name: value for name, value in asdict(row).items() if name not in others}


@SPACES
@pytest.mark.parametrize("images", [X, X[:1, :, :, :10]])
def test_layers_that_do_not_run_sparse_are_reported_as_dense(space: str, images: Tensor) -> None:
    model = pruned(nn.Sequential(*network()[:-2]), space)
    made = prepare(model, X, deterministic=True)
    expected, actual = report(model, images), report(made, images)
    grouped = "direct" if space == "spatial" else "fused"
    assert [(row.layer, row.runs) for row in actual.rows] == [
        ("0", "fused"), ("3", "dense"), ("4", "fused"), ("5", grouped), ("7", "dense"),
    ]  # fmt: skip
    sparse = [0, 2, 3]
    assert [shared(actual.rows[n]) for n in sparse] == [shared(expected.rows[n]) for n in sparse]
    assert [row.macs_dense for row in actual.rows] == [row.macs_dense for row in expected.rows]
    by_name = {run.layer: run.bytes for run in made.runs(images)}
    assert [actual.rows[n].bytes_sparse for n in sparse] == [by_name[actual.rows[n].layer] for n in sparse]
    assert [actual.rows[n].bytes_sparse for n in (1, 4)] == [4 * 576, 4 * 48]


@SPACES
def test_the_report_of_a_network_that_runs_sparse_as_a_whole_is_that_of_the_model(space: str) -> None:
    convolutions = (nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False))
    model = pruned(nn.Sequential(*convolutions), space)
    made = prepare(model, X, deterministic=True)
    expected, actual = report(model, X), report(made, X)
    for one, other in zip((*expected.rows, expected.prunable), (*actual.rows, actual.prunable), strict=True):
        assert shared(one) == shared(other)
    assert actual.everything.parameters == expected.everything.parameters
    assert actual.everything.nonzeros == expected.everything.nonzeros
    without = report(made)
    assert [row.runs for row in without.rows] == [row.runs for row in actual.rows]
    assert without.prunable.macs_dense is None and without.prunable.nonzeros == actual.prunable.nonzeros


def test_text_csv_and_json_say_how_layers_run() -> None:
    made = prepare(pruned(network(), "interspace"), X[:, :, :, :12], deterministic=True)
    actual = report(made, X)
    header, *lines = (line for line in str(actual).splitlines() if "│" in line or "┃" in line)
    assert "runs" in header and "as run" in header and "compact file" not in header
    assert [line.split("│")[3].strip() for line in lines][:6] == ["fused", "dense", "fused", "fused", "dense", "dense"]
    assert "ms" in header and all(row.milliseconds > 0 for row in actual.rows if row.runs != "dense")
    assert [row["runs"] for row in csv.DictReader(io.StringIO(actual.to_csv()))][:2] == ["fused", "dense"]
    assert [row["runs"] for row in json.loads(json.dumps(actual.to_dict()))["layers"]][:2] == ["fused", "dense"]
    plain = report(network(), X)
    assert all(row.runs is None for row in plain.rows) and "in a compact file" in str(plain)


class Twice(nn.Module):
    """A layer that is used three times, once in a way that cannot run sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.early = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(3, 8, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.early(x)
        return self.late(self.late(y)) + self.late(input=y[:, :, 1:]).mean()


@SPACES
def test_a_layer_that_is_used_more_than_once_is_one_row(space: str) -> None:
    model = pruned(Twice(), space)
    expected, actual = report(model, X), report(prepare(model, X, deterministic=True), X)
    assert {row.layer: row.runs for row in actual.rows} == {"early": "fused", "late": "fused, dense"}
    rows = {row.layer: row for row in expected.rows}
    for row in actual.rows:
        assert (row.parameters, row.nonzeros, row.macs_dense) == (
            rows[row.layer].parameters, rows[row.layer].nonzeros, rows[row.layer].macs_dense,
        )  # fmt: skip
    assert actual.prunable.parameters == 27 * 8 + 576


class Undecided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding_mode="reflect"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.inner(x) if x.sum() > -1e9 else x


@SPACES
def test_networks_that_run_layer_by_layer_keep_the_names_of_layers(space: str) -> None:
    model = pruned(Undecided(), space)
    with pytest.warns(SparseFallbackWarning):
        made = prepare(model, X, deterministic=True)
    actual = report(made, X)
    assert [(row.layer, row.runs) for row in actual.rows] == [
        ("a", "fused"),
        ("inner.0", "fused"),
        ("inner.1", "dense"),
    ]
    assert [row.macs_dense for row in actual.rows] == [row.macs_dense for row in report(model, X).rows]


def test_a_sparse_network_inside_of_another_model() -> None:
    made = prepare(pruned(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2)), "interspace"), X, deterministic=True)
    assert isinstance(made, SparseNetwork)
    whole = nn.Sequential(made, nn.Conv1d(8, 2, 5, bias=False))
    actual = report(whole, X)
    assert [(row.layer, row.space, row.runs) for row in actual.rows] == [
        ("0.0", "interspace", "fused"), ("1", "spatial", "dense"),
    ]  # fmt: skip
    assert actual.prunable.macs_dense == 2 * 100 * 216 + 2 * 96 * 80
    assert actual.everything.parameters == 216 + 8 + 80 + 81


class Odd(nn.Module):
    """Layers that a trace looks into, subclasses among them, and a weight that a function uses."""

    class Conv3d(nn.Conv3d):
        pass

    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * 2, self.bias)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep, self.fc, self.late = self.Conv3d(1, 2, 3), self.Linear(8, 4), nn.Linear(4, 3)
        self.attention, self.tied = nn.MultiheadAttention(4, 1), nn.Linear(4, 3)
        self.tied.weight = self.late.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x))
        tokens = self.fc(h.mean((2, 3))) + self.deep(h[:, None]).mean()
        tokens = self.attention(tokens, tokens, tokens)[0]
        return F.linear(tokens, self.late.weight) + self.tied(tokens)


@pytest.mark.contract
@SPACES
@pytest.mark.parametrize("traceable", [True, False])
def test_counts_of_a_sparse_network_are_those_of_its_model(traceable: bool, space: str) -> None:
    class Undecided(Odd):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > -1e9 else x

    model = pruned(Odd() if traceable else Undecided(), space)
    TensorRef(model.late).set_mask(torch.ones(3, 4, dtype=torch.bool))  # a mask acts on one of two tied layers only
    with nullcontext() if traceable else pytest.warns(SparseFallbackWarning):
        made = prepare(model, X, deterministic=True)
    for images in (None, X, X[:1, :, :8]):
        expected, actual = report(model, images), report(made, images)
        assert [shared(row) for row in actual.rows] == [shared(row) for row in expected.rows]
        for one, other in ((actual.prunable, expected.prunable), (actual.everything, expected.everything)):
            assert shared(one) == shared(other)
        assert actual.outside == expected.outside
        assert {row.layer: row.runs for row in actual.rows}["a"] == "fused"
    assert [row.macs_dense for row in actual.rows if row.layer in ("deep", "fc", "late")] == [6 * 6 * 10 * 54, 32, 24]
