"""`load` restores what `save` wrote, bit for bit, in a freshly built model."""

from __future__ import annotations

import copy
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from checkpoint_workers import WORKERS, run_part, small
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import Case, every_case
from torch import Tensor, nn
from torch.nn.utils import prune as host

import ip_plugin
from ip_plugin import bake, errors, interspace, load, masks, prunable, report, save, set_masks
from ip_plugin.adapters import torch_prune
from ip_plugin.adapters.torch_pruning import pruner
from ip_plugin.methods import NofM, apply_masks, magnitude, select

pytestmark = pytest.mark.contract

Prune = Callable[[nn.Module], None]


def bits(tensor: Tensor) -> list[int]:
    """Every bit of a tensor."""
    values = tensor.detach().cpu().contiguous().reshape(-1)
    return list(values.view(torch.uint8).tolist()) if values.numel() else []


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and bits(first) == bits(second)


def ours(model: nn.Module) -> None:
    torch_prune.global_unstructured(prunable(model), torch_prune.L1Unstructured, amount=0.7)


def hosts(model: nn.Module) -> None:
    host.global_unstructured(prunable(model), host.L1Unstructured, amount=0.7)


def both(model: nn.Module) -> None:
    ours(model)
    host.random_unstructured(*prunable(model)[0], amount=0.3)
    host.l1_unstructured(model[4], "bias", amount=1)


def baked_zeros(model: nn.Module) -> None:
    hosts(model)
    bake(model)


PRUNERS: dict[str, Prune] = {
    "nothing": lambda m: None,
    "ours": ours,
    "hosts": hosts,
    "both": both,
    "zeros": baked_zeros,
}


def expect_equal(loaded: nn.Module, saved: nn.Module, x: Tensor) -> None:
    """Equal outputs, masks and tensors."""
    assert torch.equal(loaded(x), saved(x))
    first, second = masks(loaded), masks(saved)
    assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)
    left, right = report(loaded), report(saved)
    assert left == right
    assert sorted(name for name, _ in loaded.named_parameters()) == sorted(name for name, _ in saved.named_parameters())
    for one, other in zip(loaded.modules(), saved.modules(), strict=True):
        assert type(one).__name__ == type(other).__name__


@every_case
def test_every_layer_kind_basis_and_sharing_comes_back(case: Case, tmp_path: Path) -> None:
    model, x = case.interspace()
    ours(model)
    save(model, tmp_path / "model")
    fresh, _ = case.plain()
    parameters = list(fresh.parameters())
    assert load(fresh, tmp_path / "model") is fresh
    expect_equal(fresh, model, x)
    for (name, one), (other, two) in zip(fresh.named_parameters(), model.named_parameters(), strict=True):
        assert name == other
        kept = masks(model).get(name.removesuffix(".parametrizations.weight.original")) if "original" in name else None
        assert same_bits(one, two if kept is None else two.detach().where(kept, torch.zeros(())))
    assert all(any(p is q for q in fresh.parameters()) for p in parameters)  # the same objects, and bases
    first, second = fresh[0].parametrizations.weight[0].basis, fresh[2].parametrizations.weight[0].basis
    assert (first is second) == (case.sharing != "layer")


@pytest.mark.parametrize("space", ["spatial", "interspace"])
@pytest.mark.parametrize("prune", PRUNERS)
@pytest.mark.parametrize(
    "kind", ["conv1d", "conv3d", "transposed2d_grouped", "depthwise", "1x3", "no_bias", "subclass"]
)
def test_every_way_to_prune_comes_back_and_the_report_says_the_size(
    kind: str, prune: str, space: str, tmp_path: Path
) -> None:
    case = Case(kind, "orthonormal", "model")
    model, x = case.interspace() if space == "interspace" else case.plain()
    model.eval()
    PRUNERS[prune](model)
    model(x)
    path = tmp_path / "model"
    save(model, path)
    header = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    padded = path.stat().st_size - header
    assert padded == report(model).everything.bytes_sparse
    fresh = case.plain()[0].eval()
    load(fresh, path)
    assert torch.equal(fresh(x), model(x))
    # Masks of the host become masks of ours.
    assert not any(name.endswith("_orig") for name, _ in fresh.named_parameters())
    assert {n: m.tolist() for n, m in masks(fresh).items()} == {n: m.tolist() for n, m in masks(model).items()}
    assert (report(fresh).prunable, report(fresh).everything) == (report(model).prunable, report(model).everything)
    if prune == "both":
        assert int((model[4].bias == 0).sum()) == int((fresh[4].bias == 0).sum()) == 1
    assert bake(fresh).state_dict().keys() == bake(copy_of_plain(case)).state_dict().keys()
    assert torch.equal(fresh(x), model(x))


def copy_of_plain(case: Case) -> nn.Module:
    return case.plain()[0]


def test_numbers_that_are_rare_come_back_bit_for_bit(tmp_path: Path) -> None:
    """NaN with a payload, infinities, a denormal number; -0.0 if a mask keeps it or all values are stored."""
    patterns = [0x7FC00001, 0x7F800123, 0xFFC00000, 0x7F800000, 0xFF800000, 0x00000001, 0x80000001, 0x80000000, 0]
    values = torch.tensor([p - 2**32 if p >= 2**31 else p for p in patterns], dtype=torch.int32).view(torch.float32)
    kept = nn.Linear(9, 2, bias=False)
    kept.weight.data.copy_(values.repeat(2, 1))
    set_masks(kept, {"": torch.tensor([[True] * 9, [False] * 9])})
    save(kept, tmp_path / "masked")
    loaded = load(nn.Linear(9, 2, bias=False), tmp_path / "masked")
    assert same_bits(loaded.parametrizations.weight.original, torch.stack([values, torch.zeros(9)]))

    sparse = nn.Linear(90, 9, bias=True)  # zeros, and so their signs, may be left out
    nn.init.zeros_(sparse.weight)
    sparse.weight.data[:, 7] = values
    sparse.bias.data.copy_(values)
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        try:
            save(sparse, tmp_path / "sparse")
            save(sparse, tmp_path / "resumable", resumable=True)
            for name, minus_zero in (("sparse", 0), ("resumable", -(2**31))):
                loaded = load(nn.Linear(90, 9), tmp_path / name)
                expected = sparse.weight.detach().view(torch.int32).clone()
                expected[7, 7] = minus_zero
                assert torch.equal(loaded.weight.detach().view(torch.int32), expected)
                assert same_bits(loaded.bias, values)
        finally:
            torch.set_flush_denormal(False)
    assert (tmp_path / "sparse").stat().st_size < 700 < 4 * sparse.weight.numel()


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint64]


class Holder(nn.Module):
    """Parameters and buffers of every dtype and layout."""

    def __init__(self, fill: bool) -> None:
        super().__init__()
        for dtype in DTYPES:
            numbers = torch.arange(1, 7).to(dtype) if fill else torch.zeros(6, dtype=dtype)
            name = str(dtype).removeprefix("torch.")
            self.register_buffer(f"{name}_buffer", numbers.reshape(2, 3))
            self.register_buffer(f"{name}_empty", torch.empty(0, 3, dtype=dtype))
            self.register_buffer(f"{name}_scalar", numbers[-1].clone())
            self.register_parameter(f"{name}_parameter", nn.Parameter(numbers.clone(), requires_grad=False))
        self.register_buffer("absent", None)
        self.register_buffer("passing", torch.full((3,), float(fill)), persistent=False)
        big = torch.randn(3, 4, 5)
        self.register_buffer("transposed", big.transpose(0, 2))
        self.first, self.second = nn.Parameter(big[0, 0]), nn.Parameter(big[0, 0, 1:])  # views of one storage


def test_every_dtype_and_layout_comes_back(tmp_path: Path) -> None:
    model, fresh = Holder(True), Holder(False)
    layout = fresh.transposed.stride()
    save(model, tmp_path / "model")
    load(fresh, tmp_path / "model")
    for (name, one), (_, two) in zip(fresh.state_dict().items(), model.state_dict().items(), strict=True):
        assert same_bits(one, two), name
    assert fresh.transposed.stride() == layout != (20, 5, 1)
    assert torch.equal(fresh.passing, torch.zeros(3)) and fresh.absent is None


def test_the_memory_format_is_the_models_own(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 9, 9)
    plain, last = small(), small().to(memory_format=torch.channels_last)
    interspace(last, basis="dct")
    ours(last)
    save(last, tmp_path / "last")
    save(interspace(copy.deepcopy(plain)), tmp_path / "plain")
    loaded = load(small(), tmp_path / "last")
    assert loaded[0].parametrizations.weight.original.is_contiguous()
    assert torch.allclose(loaded(x), last(x), atol=1e-6)
    loaded = load(small().to(memory_format=torch.channels_last), tmp_path / "last")
    assert loaded[0].parametrizations.weight.original.stride() == last[0].parametrizations.weight.original.stride()
    assert torch.equal(loaded(x), last(x))


def test_a_cut_layer_keeps_the_memory_format(tmp_path: Path) -> None:
    save(nn.Conv2d(3, 5, 3), tmp_path / "model")
    loaded = load(nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last), tmp_path / "model")
    assert loaded.weight.shape == (5, 3, 3, 3) and loaded.weight.stride(1) == 1


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embedding, self.decoder, self.third = nn.Embedding(9, 4), nn.Linear(4, 9), nn.Linear(4, 9)
        if tie:
            self.decoder.weight = self.third.weight = self.embedding.weight
            self.third.register_buffer(
                "extra", self.decoder.register_buffer("extra", torch.ones(2)) or self.decoder.extra
            )
        else:
            self.decoder.register_buffer("extra", torch.ones(2))
            self.third.register_buffer("extra", torch.ones(2))

    def forward(self, index: Tensor) -> Tensor:
        inside = self.embedding(index)
        out: Tensor = self.decoder(inside) + self.third(inside)
        return out


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_tied_is_stored_once_and_tied_again(masked: bool, tie: bool, tmp_path: Path) -> None:
    model, index = Tied(), torch.arange(9)
    if masked:
        host.l1_unstructured(model.third, "weight", amount=30)
        model.decoder.weight.data[0] = 0
    save(model, tmp_path / "model")
    fresh = load(Tied(tie), tmp_path / "model")
    assert torch.equal(fresh(index), model(index))
    last = fresh.third.parametrizations.weight.original if masked else fresh.third.weight
    assert fresh.embedding.weight is fresh.decoder.weight is last
    assert fresh.decoder.extra is fresh.third.extra
    assert len(list(fresh.parameters())) == 3
    apart = Tied(tie=False)
    save(apart, tmp_path / "apart")
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(errors.CheckpointError, match="'decoder.weight' and 'embedding.weight', which are one tensor"):
        load(fresh, tmp_path / "apart")
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


@pytest.mark.parametrize("amount", [0.0, 1.0])
def test_nothing_pruned_and_everything_pruned(amount: float, tmp_path: Path) -> None:
    model = interspace(small())
    for where in prunable(model):
        torch_prune.l1_unstructured(*where, amount=amount)
    save(model, tmp_path / "model")
    fresh = load(small(), tmp_path / "model")
    x = torch.randn(1, 3, 9, 9)
    assert torch.equal(fresh(x), model(x))
    assert {n: int(m.sum()) for n, m in masks(fresh).items()} == {n: int(m.sum()) for n, m in masks(model).items()}
    assert len(masks(fresh)) == 3
    assert save(nn.Sequential(), tmp_path / "none") is None and len(load(nn.Sequential(), tmp_path / "none")) == 0


def test_what_one_mask_hides_of_a_tied_weight_is_there_for_the_other_layer(tmp_path: Path) -> None:
    model, index = Tied(), torch.arange(9)
    host.l1_unstructured(model.embedding, "weight", amount=30)
    save(model, tmp_path / "model")
    fresh = load(Tied(), tmp_path / "model")
    assert torch.equal(fresh(index), model(index)) and torch.equal(fresh.decoder.weight, model.decoder.weight)
    assert int((fresh.embedding.weight == 0).sum()) == 30


def test_a_tensor_with_few_zeros_is_stored_as_it_is(tmp_path: Path) -> None:
    model = nn.Linear(10, 10)
    model.weight.data[0, 0] = 0
    save(model, tmp_path / "model")
    assert [(line.name, line.positions, line.nbytes) for line in inspected(tmp_path / "model")] == [
        ("weight", "all", 400), ("bias", "all", 40),
    ]  # fmt: skip


def test_entries_that_are_kept_and_zero_stay_trainable(tmp_path: Path) -> None:
    model = nn.Linear(3, 1, bias=False)
    set_masks(model, {"": torch.tensor([[True, True, False]])})
    model.parametrizations.weight.original.data.zero_()
    save(model, tmp_path / "model")
    assert masks(load(nn.Linear(3, 1, bias=False), tmp_path / "model"))[""].tolist() == [[True, True, False]]


def test_masks_of_n_in_m_and_frozen_bases(tmp_path: Path) -> None:
    model = interspace(small(), train_basis=False, basis="dct")
    pattern = NofM(2, 4, along="input")
    scores = {where: each for where, each in magnitude(model).items() if pattern.fits(each.shape)}
    apply_masks(model, select(scores, pattern=pattern))
    save(model, tmp_path / "model")
    fresh = load(small(), tmp_path / "model")
    keep = masks(fresh)["2"]
    assert bool((keep.unflatten(1, (2, 4)).sum(2) == 2).all()) and torch.equal(keep, masks(model)["2"])
    bases = [p for n, p in fresh.named_parameters() if n.endswith("basis")]
    assert len(bases) == 2 and not any(basis.requires_grad for basis in bases)


@pytest.mark.parametrize("before", ["plain", "ours", "hosts", "interspace", "shared", "masked interspace"])
@pytest.mark.parametrize("file", ["plain", "ours", "interspace", "shared", "masked interspace"])
def test_whatever_the_model_was_it_is_what_the_file_says(file: str, before: str, tmp_path: Path) -> None:
    def made(what: str) -> nn.Sequential:
        model = small()
        if "interspace" in what or what == "shared":
            interspace(model, basis="orthonormal", sharing="model" if what == "shared" else "layer")
        if what in ("ours", "masked interspace"):
            ours(model)
        if what == "hosts":
            hosts(model)
            host.l1_unstructured(model[0], "bias", amount=2)
        return model

    saved, model = made(file), made(before)
    save(saved, tmp_path / "model", resumable=True)
    coefficients = [getattr(*where) for where in prunable(model)] if before != "hosts" else []
    load(model, tmp_path / "model")
    expect_equal(model, saved, torch.randn(2, 3, 9, 9))
    assert list(model.state_dict()) == list(saved.state_dict())
    assert all(same_bits(a, b) for a, b in zip(model.state_dict().values(), saved.state_dict().values(), strict=True))
    assert all(one is other for one, other in zip(coefficients, (getattr(*where) for where in prunable(model))))
    bake(model)
    assert list(model.state_dict()) == list(small().state_dict())


def test_bases_stay_the_objects_that_an_optimizer_has(tmp_path: Path) -> None:
    model = interspace(small(), sharing="model")
    save(model, tmp_path / "model")
    basis = model[0].parametrizations.weight[0].basis
    saved = basis.detach().clone()
    basis.data += 1
    load(model, tmp_path / "model")
    assert model[0].parametrizations.weight[0].basis is basis is model[2].parametrizations.weight[0].basis
    assert torch.equal(basis, saved)
    save(interspace(small(), sharing="model", train_basis=False), tmp_path / "frozen")
    load(model, tmp_path / "frozen")
    assert model[2].parametrizations.weight[0].basis is basis and not basis.requires_grad
    # Two bases in place of a shared one: neither layer may keep it.
    save(interspace(small()), tmp_path / "apart")
    load(model, tmp_path / "apart")
    found = [model[i].parametrizations.weight[0].basis for i in (0, 2)]
    assert found[0] is not found[1]


def test_a_model_on_the_meta_device_gets_values(tmp_path: Path) -> None:
    saved = interspace(small(), sharing="model")
    ours(saved)
    save(saved, tmp_path / "model")
    with torch.device("meta"):
        model = small()
    load(model, tmp_path / "model")
    expect_equal(model, saved, torch.randn(1, 3, 9, 9))
    assert not any(p.is_meta for p in model.parameters())


def test_wrappers_are_looked_into(tmp_path: Path) -> None:
    model = interspace(small())
    save(nn.DataParallel(model), tmp_path / "model")
    inside = small()
    assert isinstance(load(nn.DataParallel(inside), tmp_path / "model"), nn.DataParallel)
    x = torch.randn(1, 3, 9, 9)
    assert torch.equal(inside(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_can_be_stored_in_half_the_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = interspace(small(), basis="orthonormal")
    torch_prune.l1_unstructured(model[2], "weight", amount=0.9)
    save(model, tmp_path / "whole")
    save(model, tmp_path / "half", dtype=dtype)
    fresh = load(small(), tmp_path / "half")
    for (name, one), two in zip(fresh.named_parameters(), model.parameters(), strict=True):
        rounded = name.endswith(("original", "6.weight"))
        expected = two.detach().to(dtype).float() if rounded else two.detach()
        kept = fresh[2].parametrizations.weight[0].mask if name.startswith("2.") and rounded else torch.tensor(True)
        assert same_bits(one, expected.where(kept, torch.zeros(()))), name
    numbers = 8 * 3 * 9 + int(masks(model)["2"].sum()) + 8 * 3
    saved = (tmp_path / "whole").stat().st_size - (tmp_path / "half").stat().st_size
    assert 2 * numbers - 100 <= saved <= 2 * numbers
    assert [line.dtype for line in inspected(tmp_path / "half") if "as" in line.dtype] == [
        f"float32 as {str(dtype).removeprefix('torch.')}"
    ] * 3


def inspected(path: Path) -> Any:
    from ip_plugin.checkpoint.inspection import inspect

    return inspect(path).lines


def test_values_that_half_does_not_hold_are_refused(tmp_path: Path) -> None:
    model = small()
    model[6].weight.data[0, 0] = 1e5
    (tmp_path / "model").write_bytes(b"old")
    for options, text in (
        ({"dtype": torch.float16}, "'6.weight' has values up to 1e\\+05"),
        ({"dtype": torch.float32}, "torch.float32"),
        ({"dtype": "float16"}, "dtype=float16"),
        ({"dtype": torch.float16, "resumable": True}, "resumable=True"),
    ):
        with pytest.raises(errors.CheckpointError, match=text):
            save(model, tmp_path / "model", **options)
    save(model, tmp_path / "model2", dtype=torch.bfloat16)
    assert (tmp_path / "model").read_bytes() == b"old"
    model[6].weight.data[0, 0] = math.inf  # also infinite in float16
    save(model, tmp_path / "model", dtype=torch.float16)
    assert load(small(), tmp_path / "model")[6].weight[0, 0] == math.inf


class Net(nn.Module):
    """All kinds of layers that Torch-Pruning prunes: plain, grouped and depthwise convolutions, norms, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.depthwise, self.act = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.PReLU(16)
        self.wide, self.group_norm = nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32)
        self.up, self.instance = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.InstanceNorm2d(16, affine=True)
        self.head, self.layer_norm, self.out = nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.depthwise(self.norm(self.stem(x))))
        x = self.instance(self.up(self.group_norm(self.wide(x))))
        out: Tensor = self.out(self.layer_norm(self.head(x.mean((2, 3)))))
        return out


@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_cut_channels_travel_with_the_file(space: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, x = Net(), torch.randn(2, 3, 8, 8)
    if space == "interspace":
        interspace(model, basis="orthonormal", sharing="model")
    options = {"importance": tp.importance.GroupMagnitudeImportance(p=2), "pruning_ratio": 0.5}
    pruner(tp.pruner.MagnitudePruner, model, x, ignored_layers=[model.out], **options).step()
    torch_prune.global_unstructured(prunable(model), torch_prune.L1Unstructured, amount=0.5)
    model.eval()
    assert model.stem.out_channels < 16 and model.depthwise.groups < 16
    save(model, tmp_path / "model")
    fresh = Net().eval()
    parameters = dict(fresh.named_parameters())
    fresh.stem.bias.grad = torch.ones(16)
    load(fresh, tmp_path / "model")
    assert torch.equal(fresh(x), model(x))
    assert report(fresh) == report(model)
    for (name, one), (_, two) in zip(fresh.named_modules(), model.named_modules(), strict=True):
        numbers = {
            k: v
            for k, v in vars(two).items()
            if isinstance(v, (int, tuple)) and k not in ("order", "training") and not k.startswith("_")
        }
        assert {k: getattr(one, k) for k in numbers} == numbers, name
        assert repr(one) == repr(two)
    assert fresh.stem.bias is parameters["stem.bias"] and fresh.stem.bias.grad is None
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    fresh(x).sum().backward()
    optimizer.step()


def build(**changes: nn.Module) -> nn.Sequential:
    layers = {
        "conv": nn.Conv2d(4, 8, 3, groups=2), "norm": nn.BatchNorm2d(8), "flatten": nn.Flatten(), "fc": nn.Linear(8, 3),
    }  # fmt: skip
    model = nn.Sequential()
    for name, module in {**layers, **changes}.items():
        if module is not None:
            model.add_module(name, module)
    return model


class Custom(nn.Module):
    def __init__(self, size: int = 5, buffer: bool = False) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("scale", torch.ones(size))
        else:
            self.scale = nn.Parameter(torch.ones(size))


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"anything": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


WRONG_MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "a layer more": (build, lambda: build(more=nn.Linear(2, 2)), "2 tensors of the model that are not in the file"),
    "a layer less": (build, lambda: build(norm=None), r"5 tensors of the file .* \(norm.weight, norm.bias, norm.r"),
    "another name": (lambda: build(a=nn.PReLU()), lambda: build(b=nn.PReLU()), "b.weight.* and 1 tensors .*a.weight"),
    "a smaller model": (build, lambda: build(fc=nn.Linear(8, 2)), r"'fc.weight' of shape \(3, 8\) .* and \(2, 8\) in"),
    "another kernel": (build, lambda: build(conv=nn.Conv2d(4, 8, 5, groups=2)), r"kernel \(3, 3\), .* \(5, 5\)"),
    "a transposed kernel": (
        lambda: build(conv=nn.Conv2d(4, 8, (1, 3))), lambda: build(conv=nn.Conv2d(4, 8, (3, 1))), r"of shape \(8, 4, 1",
    ),
    "other groups": (
        lambda: build(conv=nn.Conv2d(2, 8, 3)), build, "'conv' with 1 groups in the file and 2 in the model",
    ),
    "more groups": (
        lambda: build(conv=nn.Conv2d(8, 8, 3, groups=4)), lambda: build(conv=nn.Conv2d(8, 9, 3)), "4 groups of 8 input",
    ),
    "other dimensions": (
        lambda: build(conv=nn.Conv1d(4, 8, 3, groups=2)), build, r"of shape \(8, 2, 3\) in the file and \(8, 2, 3, 3\)",
    ),
    "a cut layer of unknown kind": (
        lambda: build(own=Custom(4)), lambda: build(own=Custom(5)), "layer 'own', .*: a Custom, whose attributes",
    ),
    "a cut attention": (
        lambda: build(own=nn.MultiheadAttention(4, 2)), lambda: build(own=nn.MultiheadAttention(8, 2)), "Multihead",
    ),
    "parameter and buffer": (
        lambda: build(own=Custom()), lambda: build(own=Custom(buffer=True)), "a parameter in the file and a buffer in",
    ),
    "another kind of number": (
        lambda: build(fc=nn.Linear(8, 3, dtype=torch.complex64)), build, "complex64 in the file and float32 here",
    ),
    "another norm": (
        lambda: build(n=nn.GroupNorm(2, 6)), lambda: build(n=nn.GroupNorm(4, 8)), "6 channels in 4 groups",
    ),
    "padding cut off": (
        lambda: build(n=nn.Embedding(4, 2)), lambda: build(n=nn.Embedding(9, 2, padding_idx=8)), "padding is number 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_another_model_is_refused_and_stays_as_it_was(name: str, tmp_path: Path) -> None:
    saved, other, text = WRONG_MODELS[name]
    save(saved(), tmp_path / "model")
    model = other()
    before = snapshot(model)
    with pytest.raises(errors.CheckpointError, match=text) as caught:
        load(model, tmp_path / "model")
    assert isinstance(caught.value, errors.CheckpointError) and "What to do: build the model" in str(caught.value)
    assert snapshot(model) == before


def snapshot(model: nn.Module) -> Any:
    """Everything that a failed call could have changed."""
    tensors = [*model.parameters(), *model.buffers()]
    return (
        repr(model),
        [(id(tensor), bits(tensor) if has_bits(tensor) else None, tensor.requires_grad) for tensor in tensors],
        [(type(module), sorted(vars(module)), list(module._forward_pre_hooks)) for module in model.modules()],
    )


def has_bits(tensor: Tensor) -> bool:
    lazy = isinstance(tensor, nn.parameter.UninitializedTensorMixin)
    return not lazy and tensor.layout == torch.strided and not tensor.is_meta


def on_top() -> nn.Module:
    model = interspace(build())
    nn.utils.parametrizations.weight_norm(model.conv)
    return model


def beneath() -> nn.Module:
    model = build(fc=nn.utils.parametrizations.weight_norm(nn.Linear(8, 3)))
    host.l1_unstructured(model.fc.parametrizations.weight, "original1", amount=3)
    return model


def spoilt(value: float) -> nn.Module:
    model = interspace(build())
    model.conv.parametrizations.weight[0].basis.data[2] = value
    return model


def sparse_layout() -> nn.Module:
    model = build()
    model.register_buffer("graph", torch.eye(3).to_sparse())
    return model


NOT_STORABLE: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "not initialised": (lambda: build(a=nn.LazyLinear(3)), errors.CheckpointError, "'a.weight': not initialised yet"),
    "a lazy buffer": (lambda: build(a=nn.LazyBatchNorm1d()), errors.CheckpointError, "'a.weight': not initialised"),
    "meta": (lambda: build(a=nn.Linear(2, 2, device="meta")), errors.CheckpointError, "'a.weight': on the meta"),
    "extra state": (lambda: build(a=Extra(2, 2)), errors.CheckpointError, "'a': the extra state of a Extra"),
    "a sparse buffer": (sparse_layout, errors.CheckpointError, "'graph': of layout torch.sparse_coo"),
    "someone else's on top": (on_top, errors.ConversionError, "'conv': weight parametrized by _WeightNorm"),
    "pruned beneath someone else's": (beneath, errors.ConversionError, "original1"),
    "a basis with NaN": (lambda: spoilt(math.nan), errors.BasisError, "NaN or infinite .* of 'conv.weight'"),
    "an infinite basis": (lambda: spoilt(math.inf), errors.BasisError, "NaN or infinite"),
    "a singular basis": (lambda: spoilt(0.0), errors.BasisError, "linearly dependent, or zero"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_STORABLE)
def test_what_cannot_be_stored_is_refused_and_the_old_file_stays(name: str, tmp_path: Path) -> None:
    made, error, text = NOT_STORABLE[name]
    model, path = made(), tmp_path / "model"
    path.write_bytes(b"old")
    before = snapshot(model)
    with pytest.raises(error, match=text):
        save(model, path)
    assert snapshot(model) == before and path.read_bytes() == b"old" and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("made", [lambda: build(a=nn.LazyLinear(3)), on_top, lambda: build(a=Extra(2, 2))])
def test_load_refuses_models_that_save_refuses(made: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = made()
    saved = build(a=nn.Linear(4, 3)) if hasattr(model, "a") else build()
    save(saved, tmp_path / "model")
    before = snapshot(model)
    with pytest.raises((errors.CheckpointError, errors.ConversionError)):
        load(model, tmp_path / "model")
    assert snapshot(model) == before


def test_other_peoples_parametrizations_come_back(tmp_path: Path) -> None:
    def made() -> nn.Sequential:
        return build(fc=nn.utils.parametrizations.weight_norm(nn.Linear(8, 3)))

    model = interspace(made(), layers=["conv"])
    save(model, tmp_path / "model")
    loaded = load(made(), tmp_path / "model")
    assert torch.equal(loaded.fc.weight, model.fc.weight)
    assert list(loaded.state_dict()) == list(model.state_dict())


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_network_comes_back(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Random mixtures of layers, spaces, sharings, masks and dtypes."""
    path = tmp_path_factory.mktemp("any") / "model"
    kinds: list[Callable[[], nn.Module]] = [
        lambda: nn.Conv2d(4, 4, 3), lambda: nn.Conv2d(4, 4, 1), lambda: nn.Conv2d(4, 4, (2, 1), groups=2, bias=False),
        lambda: nn.BatchNorm2d(4), lambda: nn.Linear(1, 5), lambda: nn.ConvTranspose1d(4, 4, 3, groups=4),
    ]  # fmt: skip
    chosen = data.draw(st.lists(st.sampled_from(kinds), max_size=5))
    seed = data.draw(st.integers(0, 9))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))

    def made() -> nn.Sequential:
        return nn.Sequential(*(kind() for kind in chosen))

    torch.manual_seed(seed)
    model = made().to(dtype)
    convolutions = [n for n, m in model.named_modules() if hasattr(m, "kernel_size") and math.prod(m.kernel_size) > 1]
    converted = data.draw(st.sets(st.sampled_from(convolutions))) if convolutions else set()
    if converted:
        sharing = data.draw(st.sampled_from(["layer", "model"]))
        interspace(model, layers=converted, basis="orthonormal", sharing=sharing)
    for where in prunable(model):
        fraction = data.draw(st.sampled_from([None, 0.0, 0.5, 0.97, 1.0]))
        if fraction is not None:
            (torch_prune if data.draw(st.booleans()) else host).random_unstructured(*where, amount=fraction)
    whole = data.draw(st.booleans())
    save(model, path, resumable=whole)
    loaded = load(made(), path)
    assert report(loaded) == report(model)
    wanted = {n: m.tolist() for n, m in masks(model).items()}
    assert {n: m.tolist() for n, m in masks(loaded).items()} == wanted
    for one, other in zip(bake(loaded).state_dict().values(), bake(model).state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_training_goes_on_bit_for_bit_in_another_process(tmp_path: Path) -> None:
    """A resumed training ends with the same bits as an uninterrupted one, pruned values included."""
    script = Path(__file__).parents[1] / "checkpoint_workers.py"
    for space in WORKERS:
        run_part(space, "first", tmp_path)
    run = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    for space in WORKERS:
        run_part(space, "whole", tmp_path)
        whole, first, second = (
            json.loads((tmp_path / f"{space}-{part}.json").read_text()) for part in ("whole", "first", "second")
        )
        assert len(whole) > 8 and whole == second
        assert not set(whole) & set(first)


def test_public_names_are_there() -> None:
    assert ip_plugin.save is save and ip_plugin.load is load
