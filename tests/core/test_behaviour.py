"""Invariants, for every layer kind, basis and sharing."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kinds import CASES, KINDS, Case, backward, every_case, every_kind, train
from torch import Tensor, nn
from torch.nn.utils import prune as host

import ip_plugin
from ip_plugin import bake, interspace, masks, prunable, report, set_masks
from ip_plugin.adapters import torch_prune

pytestmark = pytest.mark.contract

#: One kind for each way to compose kernels.
KINDS_COMPILED = ("conv1d", "conv2d", "conv3d", "transposed2d_grouped", "depthwise", "1x3", "circular", "subclass")


def random_masks(model: nn.Module, density: float = 0.5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    names = ("0", "2", "4")
    shapes = [getattr(module, tensor_name).shape for module, tensor_name in prunable(model)]
    return {n: torch.rand(s, generator=generator) < density for n, s in zip(names, shapes, strict=True)}


def coefficients(model: nn.Module) -> list[nn.Parameter]:
    return [getattr(module, tensor_name) for module, tensor_name in prunable(model)]


def bases(model: nn.Module) -> list[Tensor]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith("basis")]


def oracle(coefficients: Tensor, basis: Tensor, mask: Tensor | None = None) -> Tensor:
    """Kernels by definition, one filter after the other."""
    if mask is not None:
        coefficients = torch.where(mask, coefficients, 0)
    flat = coefficients.flatten(2)
    kernels = torch.zeros_like(flat)
    for n, filter in enumerate(basis):
        kernels += flat[:, :, n, None] * filter
    return kernels.view_as(coefficients)


@every_case
def test_interspace_keeps_outputs_and_gradients(case: Case) -> None:
    dtype = torch.float32 if case.basis == "standard" else torch.float64
    plain, x = case.plain(dtype)
    converted = case.convert(copy.deepcopy(plain))
    x.requires_grad_()
    expected, expected_x = backward(plain, x), x.grad
    x.grad = None
    found, found_x = backward(converted, x), x.grad
    assert expected_x is not None and found_x is not None
    if case.basis == "standard":
        assert torch.equal(found, expected) and torch.equal(found_x, expected_x)
        for a, b in zip(coefficients(plain), coefficients(converted), strict=True):
            assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)
    else:
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found_x, expected_x)
        for index in (0, 2):
            basis = converted[index].parametrizations.weight[0].basis.detach()
            by_weight = plain[index].weight.grad.flatten(2)
            torch.testing.assert_close(coefficients(converted)[index // 2].grad.flatten(2), by_weight @ basis.mT)


@every_case
def test_weights_are_linear_combinations_of_the_basis_also_when_it_has_moved(case: Case) -> None:
    model, x = case.interspace(torch.float64)
    before = [basis.detach().clone() for basis in bases(model)]
    train(model, x)
    set_masks(model, random_masks(model))
    for index in (0, 2):
        space = model[index].parametrizations.weight[0]
        expected = oracle(model[index].parametrizations.weight.original, space.effective_basis, space.mask)
        torch.testing.assert_close(model[index].weight, expected)
    assert all((a != b).any() for a, b in zip(before, bases(model), strict=True))


@every_case
def test_interspace_then_bake_gives_back_the_model(case: Case) -> None:
    model, x = case.plain()
    kept = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in kept.items()}
    classes = [type(module) for module in model]
    expected = model(x)
    bake(case.convert(model))
    assert [type(module) for module in model] == classes
    assert list(dict(model.named_parameters())) == list(kept)
    for name, parameter in model.named_parameters():
        assert parameter is kept[name]
        if case.basis == "standard":
            assert torch.equal(parameter, values[name])
        else:
            torch.testing.assert_close(parameter, values[name])
    torch.testing.assert_close(model(x), expected)
    assert set(model.state_dict()) == set(values)
    # An ordinary model pickles, and loads where this package is not installed.
    file = io.BytesIO()
    torch.save(model, file)
    assert b"ip_plugin" not in file.getvalue()
    assert not any(module._load_state_dict_pre_hooks for module in model)


@every_case
def test_a_shared_basis_is_one_parameter(case: Case) -> None:
    model, x = case.interspace(torch.float64)
    first, second = (model[i].parametrizations.weight[0].basis for i in (0, 2))
    assert (first is second) == (case.sharing != "layer")
    assert len(bases(model)) == (2 if case.sharing == "layer" else 1)
    assert isinstance(first, nn.Parameter) and first.ndim == 2
    copied = copy.deepcopy(model).to(torch.float32)
    assert (copied[0].parametrizations.weight[0].basis is copied[2].parametrizations.weight[0].basis) == (
        first is second
    )
    # One gradient, summed over the layers.
    backward(model, x)
    total = torch.zeros_like(first)
    for index in (0, 2):
        if model[index].parametrizations.weight[0].basis is first:
            weight = model[index].weight.detach().requires_grad_()
            rest = {n: p for n, p in bake(copy.deepcopy(model)).named_parameters() if n != f"{index}.weight"}
            output = torch.func.functional_call(bake(copy.deepcopy(model)), {**rest, f"{index}.weight": weight}, (x,))
            (by_weight,) = torch.autograd.grad(F.cross_entropy(output, torch.arange(x.shape[0]) % 3), weight)
            total += torch.einsum("oin,oik->nk", coefficients(model)[index // 2].flatten(2), by_weight.flatten(2))
    (expected,) = torch.autograd.grad(model[0].parametrizations.weight[0].effective_basis, first, total)
    torch.testing.assert_close(first.grad, expected)


@every_case
def test_copying_pruning_and_baking_one_copy_leaves_the_other(case: Case) -> None:
    model, x = case.interspace()
    set_masks(model, random_masks(model))
    expected = model(x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    baked, pruned, converted = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    bake(baked)
    torch_prune.global_unstructured(prunable(pruned), torch_prune.L1Unstructured, amount=0.5)
    if KINDS[case.kind].model()[0].bias is not None:
        torch_prune.l1_unstructured(pruned[0], "bias", amount=1)
        with_bias = copy.deepcopy(pruned)
        torch_prune.remove(pruned[0], "bias")
        assert torch.equal(with_bias(x), pruned(x)) and "bias" in with_bias[0].parametrizations
    interspace(bake(converted), basis="dct")
    torch.testing.assert_close(baked(x), expected)
    assert torch.equal(model(x), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.load_state_dict(bake(copy.deepcopy(model)).state_dict(), strict=True)  # its load hooks still work
    bake(model)
    pruned(x), converted(x)
    torch.testing.assert_close(model(x), expected)


@every_case
def test_a_pruned_coefficient_contributes_nothing(case: Case) -> None:
    model, x = case.interspace()
    chosen = random_masks(model)
    set_masks(model, chosen)
    train(model, x)  # with momentum and weight decay
    expected = backward(model, x)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    for parameter, mask in zip(coefficients(model), chosen.values(), strict=True):
        assert not parameter.grad[~mask].any()
        parameter.data[~mask] = 1e3
    assert torch.equal(backward(model, x), expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    # Not after a second pruning either, however large the pruned value is.
    torch_prune.global_unstructured(prunable(model), torch_prune.L1Unstructured, amount=10)
    again = masks(model)
    assert all(not (again[name] & ~mask).any() for name, mask in chosen.items())
    assert sum(int(m.sum()) for m in again.values()) == sum(int(m.sum()) for m in chosen.values()) - 10
    assert torch.equal(bake(copy.deepcopy(model))(x), model(x))


@every_case
def test_a_mask_of_ones_is_the_identity(case: Case) -> None:
    model, x = case.interspace()
    expected = backward(model, x)
    gradients = {parameter: parameter.grad.clone() for parameter in model.parameters()}
    set_masks(model, random_masks(model, density=2.0))
    assert len(masks(model)) == 3
    assert torch.equal(backward(model, x), expected)
    assert {*model.parameters()} == {*gradients}
    for parameter, gradient in gradients.items():
        assert torch.equal(parameter.grad, gradient)


@every_case
@pytest.mark.parametrize("prune", [host, torch_prune], ids=["host", "adapter"])
def test_the_count_of_zeros_is_the_count_asked_for(case: Case, prune: object) -> None:
    model, _ = case.interspace()
    total = report(model).prunable.parameters
    for zeros in (17, 40):  # the second pruning adds to the first
        before = total - report(model).prunable.nonzeros
        prune.global_unstructured(prunable(model), prune.L1Unstructured, amount=zeros)
        assert report(model).prunable.nonzeros == total - before - zeros
        assert sum(int((~mask).sum()) for mask in masks(model).values()) == before + zeros
    nonzeros = report(model).prunable.nonzeros
    assert report(ip_plugin.adopt_masks(model)).prunable.nonzeros == nonzeros
    assert not host.is_pruned(model)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("basis", ["standard", "orthonormal", "dct"])
@every_kind
def test_structured_l2_chooses_the_same_channels_in_both_spaces(kind: str, basis: str, dim: int) -> None:
    plain, _ = KINDS[kind].ready(torch.float64)
    model = interspace(copy.deepcopy(plain), basis=basis, train_basis=False)
    for index in (0, 2):
        for each in (plain, model):
            torch_prune.ln_structured(each[index], "weight", amount=0.5, n=2, dim=dim)
        channels = [masks(each)[str(index)].movedim(dim, 0).flatten(1).any(1) for each in (plain, model)]
        assert torch.equal(*channels)
        # Half of the channels; the host rounds half to even.
        size = len(channels[0])
        assert int(channels[0].sum()) == size - round(0.5 * size)


@every_kind
def test_zeros_are_in_the_coefficients_and_not_in_the_weights(kind: str) -> None:
    model, _ = KINDS[kind].ready()
    interspace(model, basis="orthonormal")
    set_masks(model, random_masks(model, density=0.7))
    before = report(model)
    assert not (model[0].weight == 0).any(dim=-1).all()
    sparse = sum(row.nonzeros for row in before.rows[:2])
    dense = sum(row.nonzeros for row in report(bake(model)).rows[:2])
    assert sparse < 0.8 * (before.rows[0].parameters + before.rows[1].parameters) < dense


@every_case
def test_a_dense_state_dict_loads_into_the_interspace(case: Case) -> None:
    plain, x = case.plain(torch.float64)
    expected, dense = plain(x), copy.deepcopy(plain.state_dict())
    model, _ = case.interspace(torch.float64)
    train(model, x)
    basis = [b.detach().clone() for b in bases(model)]
    model.load_state_dict(dense, strict=True)
    torch.testing.assert_close(model(x), expected)
    assert all(torch.equal(a, b) for a, b in zip(basis, bases(model), strict=True))


@every_case
@pytest.mark.parametrize("assign", [False, True])
def test_an_interspace_state_dict_loads(case: Case, assign: bool) -> None:
    model, x = case.interspace()
    train(model, x)
    set_masks(model, random_masks(model))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh, _ = case.interspace()
    set_masks(fresh, {"4": torch.ones(fresh[4].weight.shape)})
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True, assign=assign)
    assert torch.equal(fresh(x), model(x))
    assert all(torch.equal(mask, masks(model)[name]) for name, mask in masks(fresh).items())
    shared = fresh[0].parametrizations.weight[0].basis is fresh[2].parametrizations.weight[0].basis
    assert shared == (case.sharing != "layer")


@every_kind
@pytest.mark.parametrize("basis", ["standard", "orthonormal"])
def test_channels_last_is_kept_and_changes_nothing(basis: Any, kind: str) -> None:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    plain, x = KINDS[kind].ready()
    if x.ndim not in formats:
        pytest.skip("three-dimensional tensors have no channels_last")
    memory_format = formats[x.ndim]
    plain.to(memory_format=memory_format)
    x = x.contiguous(memory_format=memory_format)
    model = interspace(copy.deepcopy(plain), basis=basis)
    set_masks(model, random_masks(model, density=2.0))
    expected, found = plain[:3](x), model[:3](x)
    assert model[0].parametrizations.weight[0].mask.stride() == model[0].parametrizations.weight.original.stride()
    if kind != "depthwise":  # the stride of a single input channel is arbitrary
        assert model[0].weight.stride() == plain[0].weight.stride()
    assert found.stride() == expected.stride()
    if basis == "standard":
        assert torch.equal(found, expected) and torch.equal(backward(model, x), backward(plain, x))
    else:
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(backward(model, x), backward(plain, x))


@every_kind
@pytest.mark.parametrize("masked", [False, True])
def test_autocast_rounds_only_where_the_plain_model_does(kind: str, masked: bool) -> None:
    plain, x = KINDS[kind].ready()
    model = interspace(copy.deepcopy(plain))
    if masked:
        set_masks(model, random_masks(model, density=2.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = backward(plain, x), backward(model, x)
        assert model[0].weight.dtype == torch.float32
    assert torch.equal(found, expected)
    for a, b in zip(coefficients(plain), coefficients(model), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@every_kind
def test_every_floating_dtype_works(kind: str, dtype: torch.dtype) -> None:
    model, _ = KINDS[kind].ready()
    model.to(dtype)
    weights = [model[i].weight.detach().clone() for i in (0, 2)]
    interspace(model, basis="orthonormal")
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    for i, weight in zip((0, 2), weights, strict=True):
        assert model[i].weight.dtype == dtype
        torch.testing.assert_close(model[i].weight, weight, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS_COMPILED)
def test_torch_compile_takes_the_whole_graph(kind: str) -> None:
    model, x = KINDS[kind].ready()
    interspace(model, basis="orthonormal", sharing="model")
    set_masks(model, random_masks(model))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(backward(compiled, x), model(x))
    compiled_gradients = [parameter.grad.clone() for parameter in model.parameters()]
    backward(model, x)
    for parameter, gradient in zip(model.parameters(), compiled_gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.parametrize("kind", KINDS_COMPILED)
def test_torch_export_takes_the_model(kind: str) -> None:
    model, x = KINDS[kind].ready()
    interspace(model, basis="orthonormal", sharing="model")
    set_masks(model, random_masks(model))
    exported = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


def test_the_table_of_cases_is_whole() -> None:
    pairs = [{(case.kind, case.basis) for case in CASES}, {(case.kind, case.sharing) for case in CASES},
             {(case.basis, case.sharing) for case in CASES}]  # fmt: skip
    assert [len(found) for found in pairs] == [len(KINDS) * 4, len(KINDS) * 3, 4 * 3]
