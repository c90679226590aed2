"""The report: in either space, with masks of ours or of `torch.nn.utils.prune`, and baked."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kinds import KINDS, every_kind
from torch import nn
from torch.nn.utils import prune as host

from ip_plugin import bake, interspace, prunable, report, set_masks
from ip_plugin.adapters import torch_prune
from ip_plugin.errors import ArgumentError


def network() -> nn.Sequential:
    """16*1*9 + 16*16*9 coefficients, 4*16 of a 1x1 layer, 2*4 linear; biases 16+16+4+2; BatchNorm 32 and 33 buffers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


X = torch.zeros(2, 1, 8, 8)
PARAMETERS, OTHERS = 144 + 2304 + 64 + 8, 16 + 32 + 16 + 4 + 2


def test_a_plain_model_by_hand() -> None:
    found = report(network(), X)
    assert [row.layer for row in found.rows] == ["0", "2", "3", "6"]
    assert [row.space for row in found.rows] == ["spatial"] * 4
    assert [row.shape for row in found.rows] == [(16, 1, 3, 3), (16, 16, 3, 3), (4, 16, 1, 1), (2, 4)]
    assert [row.parameters for row in found.rows] == [144, 2304, 64, 8]
    # Two images; 6x6 positions after the first layer, 4x4 after the second and third.
    assert [row.macs_dense for row in found.rows] == [2 * 36 * 144, 2 * 16 * 2304, 2 * 16 * 64, 2 * 8]
    assert [row.macs_nonzero for row in found.rows] == [row.macs_dense for row in found.rows]
    assert (found.prunable.parameters, found.prunable.nonzeros) == (PARAMETERS, PARAMETERS)
    assert found.everything.parameters == PARAMETERS + OTHERS
    # The BatchNorm starts with 16 biases of zero.
    assert found.everything.nonzeros == PARAMETERS + OTHERS - 16
    # Buffers: running mean and variance, and a counter of 8 bytes.
    assert found.everything.bytes_dense == 4 * (PARAMETERS + OTHERS) + 4 * 32 + 8
    assert found.everything.basis_parameters == 0


def halves(shape: torch.Size) -> torch.Tensor:
    """A mask that keeps every other entry."""
    return (torch.arange(shape.numel()) % 2 == 0).view(shape)


def ours(model: nn.Module) -> None:
    set_masks(model, {"0": halves(torch.Size((16, 1, 3, 3))), "3": halves(torch.Size((4, 16, 1, 1)))})


def hosts(model: nn.Module) -> None:
    for index in (0, 2):
        where = prunable(model)[index]
        host.custom_from_mask(*where, mask=halves(getattr(*where).shape))


def both(model: nn.Module) -> None:
    ours(model)
    where = prunable(model)[2]
    mask = torch.ones(4, 16, 1, 1)
    mask[0] = 0
    host.custom_from_mask(*where, mask=mask)


@pytest.mark.parametrize("sharing", ["layer", "model"])
@pytest.mark.parametrize("space", ["spatial", "interspace"])
@pytest.mark.parametrize("prune", [ours, hosts, both])
def test_masks_are_counted(prune: Callable[[nn.Module], None], space: str, sharing: str) -> None:
    model = network()
    if space == "interspace":
        interspace(model, sharing=sharing)
    prune(model)
    found = report(model, X)
    pruned = 32 if prune is not both else 40
    assert [row.nonzeros for row in found.rows] == [72, 2304, 64 - pruned, 8]
    assert [row.macs_nonzero for row in found.rows][:3] == [2 * 36 * 72, 2 * 16 * 2304, 2 * 16 * (64 - pruned)]
    assert found.rows[0].sparsity == 0.5
    assert found.prunable.sparsity == pytest.approx((72 + pruned) / PARAMETERS)
    bases = {"spatial": 0, "interspace": 81 if sharing == "model" else 162}[space]
    assert found.everything.basis_parameters == bases
    assert found.everything.parameters == PARAMETERS + OTHERS + bases == sum(p.numel() for p in model.parameters())
    assert found.everything.nonzeros == PARAMETERS + OTHERS + bases - 16 - 72 - pruned
    assert found.everything.bytes_dense == 4 * (PARAMETERS + OTHERS) + 4 * 32 + 8
    # Baked: in the interspace with the standard basis zeros stay zeros; a spatial model has them as values.
    after = report(bake(model), X)
    assert [row.nonzeros for row in after.rows] == [row.nonzeros for row in found.rows]
    assert [row.space for row in after.rows] == ["spatial"] * 4
    assert after.everything.parameters == PARAMETERS + OTHERS


def test_a_shared_basis_is_counted_at_its_first_layer() -> None:
    rows = report(interspace(network(), sharing="model"), X).rows
    assert [(row.basis, row.basis_parameters) for row in rows] == [("0", 81), ("0", 0), ("", 0), ("", 0)]
    rows = report(interspace(network()), X).rows
    assert [(row.basis, row.basis_parameters) for row in rows] == [("0", 81), ("2", 81), ("", 0), ("", 0)]
    # N * N for each position and input channel (one, then 16).
    assert [row.macs_basis for row in rows] == [2 * 36 * 81 * 1, 2 * 16 * 81 * 16, 0, 0]


def test_pruned_biases_and_norms_are_counted_with_everything() -> None:
    for prune in (host, torch_prune):
        model = interspace(network())
        prune.l1_unstructured(model[2], "bias", amount=5)
        prune.l1_unstructured(model[1], "weight", amount=3)
        found = report(model)
        assert found.prunable.nonzeros == PARAMETERS
        assert found.everything.nonzeros == PARAMETERS + OTHERS + 162 - 16 - 5 - 3
        assert found.everything.parameters == PARAMETERS + OTHERS + 162
        assert found.everything.bytes_dense == 4 * (PARAMETERS + OTHERS) + 4 * 32 + 8


def test_zeros_in_values_count_as_zeros() -> None:
    model = network()
    model[6].weight.data[0, 1:] = 0
    assert report(model).rows[3].nonzeros == 5


@every_kind
def test_multiply_adds_of_every_kind_are_those_that_torch_counts(kind: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, x = KINDS[kind].ready()
    if "grouped" in kind or kind == "depthwise":
        expected = None  # torch does not divide by groups
    else:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        expected = counter.get_total_flops() // 2
    macs = report(interspace(model), x).prunable.macs_dense
    if expected is None:
        shapes = [x.shape[1:]]
        weights = [model[i].weight for i in (0, 2)]
        with torch.no_grad():
            shapes += [model[0](x).shape[1:], model[:3](x).shape[1:]]
        where = shapes[:2] if "transposed" in kind else shapes[1:]
        expected = sum(x.shape[0] * s[1:].numel() * w.numel() for s, w in zip(where, weights, strict=True))
        expected += x.shape[0] * model[4].weight.numel()
    assert macs == expected


def test_a_tied_weight_is_counted_once_and_its_multiply_adds_for_every_user() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    found = report(model, torch.zeros(3, 4))
    assert (found.prunable.parameters, found.everything.parameters, found.prunable.macs_dense) == (16, 16, 2 * 3 * 16)


def test_a_layer_that_runs_twice_counts_twice_and_one_that_does_not_run_counts_nothing() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.used(self.used(x))
            return out

    assert [row.macs_dense for row in report(Twice(), torch.zeros(1, 2, 4, 4)).rows] == [2 * 16 * 36, 0]


@pytest.mark.parametrize("example", [X, (X,), {"input": X}])
def test_example_inputs_are_tensors_tuples_or_keywords(example: object) -> None:
    assert report(network(), example).prunable.macs_dense == report(network(), X).prunable.macs_dense


def test_running_the_example_leaves_mode_statistics_and_gradients() -> None:
    model = interspace(network())
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report(model, torch.randn(4, 1, 8, 8))
    assert [module.training for module in model] == [True, False, True, True, True, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model[0]._forward_hooks


def test_bytes_in_a_compact_file_are_values_positions_and_basis_or_dense() -> None:
    model = interspace(network())
    mask = torch.zeros(16, 16, 3, 3, dtype=torch.bool)
    mask.view(-1)[::100] = True  # 24 values, 24 gaps of 99
    set_masks(model, {"2": mask})
    found = report(model)
    assert [row.bytes_sparse for row in found.rows] == [4 * 144 + 4 * 81, 24 * 4 + 24 + 4 * 81, 4 * 64, 4 * 8]


def test_the_report_prints_exports_and_reads_back() -> None:
    model = interspace(network())
    ours(model)
    found = report(model, X)
    text = str(found)
    assert "interspace" in text and "2,304" in text and "50.00%" in text and "everything" in text
    as_dict = json.loads(json.dumps(found.to_dict()))
    assert as_dict["layers"][0]["nonzeros"] == 72 and as_dict["prunable"]["parameters"] == PARAMETERS
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [row["layer"] for row in rows] == ["0", "2", "3", "6", "prunable", "everything"]
    assert rows[0]["shape"] == "16x1x3x3" and rows[0]["nonzeros"] == "72"
    for column in ("parameters", "nonzeros", "basis_parameters", "bytes_dense", "bytes_sparse", "macs_nonzero"):
        assert sum(int(row[column]) for row in rows[:4]) == int(rows[4][column])
    assert report(nn.ReLU()).prunable.sparsity == 0.0
    assert report(model).rows[0].macs_dense is None and "MACs" not in str(report(model))


class Functional(nn.Module):
    """Weights that functions use, attention, a weight that is computed, and Parameters that are not prunable."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 6)
        self.attention, self.table = nn.MultiheadAttention(6, 2, batch_first=True), nn.Embedding(5, 6)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = (
            F.conv2d(x, self.conv.weight, padding=1)
            + F.conv_transpose2d(self.conv(x), self.conv.weight)[:, :1, 1:-1, 1:-1]
        )
        tokens = F.linear(h.flatten(2).mT, self.fc.weight) + self.table.weight[0]
        out: torch.Tensor = self.attention(tokens, tokens, tokens)[0] @ self.fc.weight
        return out


@pytest.mark.parametrize("space", ["spatial", "host", "interspace"])
def test_multiply_adds_of_weights_that_functions_use(space: str) -> None:
    model, x = Functional(), torch.randn(3, 2, 4, 4)
    if space == "interspace":
        interspace(model, basis="orthonormal")
    if space == "host":
        host.l1_unstructured(model.conv, "weight", amount=0.5)
    else:
        set_masks(model, {"conv": halves(torch.Size((4, 2, 3, 3)))})
    found = report(model, x)
    macs = {row.layer: row.macs_dense for row in found.rows}
    positions = 3 * 16
    assert macs == {
        "conv": 3 * positions * 72, "fc": 2 * positions * 24, "attention.out_proj": positions * 36, "unused": 0,
    }  # fmt: skip
    assert found.rows[0].macs_nonzero == macs["conv"] // 2
    # All of it: in_proj is a Parameter, but not one that can be pruned.
    assert (found.everything.macs_dense or 0) - (found.prunable.macs_dense or 0) == positions * 108
    assert torch.backends.mha.get_fastpath_enabled() and not model.conv._forward_hooks


def test_what_is_not_prunable_is_named() -> None:
    model = interspace(Functional())
    found = report(model)
    prunable_count, others = 72 + 24 + 36 + 9, {"MultiheadAttention.in_proj_weight": 108, "Embedding.weight": 30}
    biases = {"MultiheadAttention.in_proj_bias": 18, "Linear.bias": 9, "Conv2d.bias": 4}
    biases["NonDynamicallyQuantizableLinear.bias"] = 6
    assert found.outside == {**others, **biases}
    assert list(found.outside)[:2] == list(others)
    assert found.coverage == pytest.approx(prunable_count / (prunable_count + 108 + 30 + 37))
    assert found.to_dict()["outside"] == found.outside
    text = " ".join(str(found).split())
    assert "`prunable` holds 44.6% of the parameters; outside: MultiheadAttention.in_proj_weight 108" in text
    assert "others 10" in text
    assert report(nn.Linear(2, 2, bias=False)).coverage == 1 and "100.0% of the parameters" in str(
        report(nn.Linear(2, 2, bias=False))
    )
    foreign = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 2, bias=False))
    assert report(nn.Sequential(foreign)).outside == {"Conv1d.weight": 15}


@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_a_model_that_fsdp_has_sharded(space: str) -> None:
    distributed = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(distributed, "fully_shard"):
        pytest.skip("this version has no fully_shard")
    model = network().eval()
    if space == "interspace":
        interspace(model, sharing="model")
    ours(model)
    expected = report(model, X)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        assert report(distributed.fully_shard(model, mesh=mesh), X) == expected
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inside", [False, True])
def test_a_model_of_torchscript_is_refused(inside: bool) -> None:
    model: nn.Module = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match="TorchScript: '0'" if inside else "a model of TorchScript"):
        report(nn.Sequential(model) if inside else model)
