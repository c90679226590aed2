"""Constraints hold for the effective filters, however a basis is trained."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kinds import Case, backward, every_kind
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from ip_plugin import interspace, join_optimizer, load, masks, normalize, save, set_masks
from ip_plugin.basis.bases import CONSTRAINTS, Constraint, constrained
from ip_plugin.core.parametrization import Interspace
from ip_plugin.errors import ArgumentError, BasisError

pytestmark = pytest.mark.contract

every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS)
every_real_constraint = pytest.mark.parametrize("constraint", ["unit", "orthonormal"])


def spaces(model: nn.Module) -> list[Interspace]:
    return [module for module in model.modules() if isinstance(module, Interspace)]


def net() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(4, 3, 7, 7)
    model(x)
    return model, x


def moved(constraint: Constraint, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Tensor]:
    """A network with trained bases."""
    model, x = net()
    interspace(model, basis="dct", sharing="model", constraint=constraint).to(dtype)
    with torch.no_grad():
        for space in set(spaces(model)[:1]):
            space.basis.add_(torch.rand(9, 9, dtype=dtype), alpha=0.3)
    return model, x.to(dtype)


@every_kind
@every_constraint
def test_outputs_and_gradients_start_bit_for_bit_from_the_standard_basis(kind: str, constraint: Constraint) -> None:
    for dtype in (torch.float32, torch.float64)[: 2 if kind == "conv2d" else 1]:
        plain, x = Case(kind, "standard", "layer").plain(dtype)
        model = interspace(copy.deepcopy(plain), constraint=constraint)
        assert torch.equal(backward(model, x), backward(plain, x))
        for index in (0, 2):
            original = model[index].parametrizations.weight.original
            assert torch.equal(original, plain[index].weight) and torch.equal(original.grad, plain[index].weight.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("basis", [2 * torch.eye(9), torch.diag(torch.logspace(-1, 1, 9)), "dct"])
@every_constraint
def test_a_given_basis_leaves_the_function_as_it_was(constraint: Constraint, basis: Any, dtype: torch.dtype) -> None:
    plain, x = net()
    model = interspace(copy.deepcopy(plain).to(dtype), basis=basis, constraint=constraint)
    torch.testing.assert_close(model(x.to(dtype)), plain.to(dtype)(x.to(dtype)))
    if constraint == "none" and isinstance(basis, Tensor):
        assert torch.equal(spaces(model)[0].basis, basis.to(dtype))
    if constraint != "none":
        norms = spaces(model)[0].basis.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))


def test_a_basis_that_cannot_be_orthonormal_and_an_unknown_constraint_are_refused() -> None:
    model, x = net()
    before, output = list(model.state_dict()), model(x)
    with pytest.raises(BasisError, match='(?s)orthogonal.*"unit"'):
        interspace(model, basis=torch.eye(9) + 0.1 * torch.rand(9, 9), constraint="orthonormal")
    with pytest.raises(ArgumentError, match="(?s)`constraint` must be.*'norm'"):
        interspace(model, constraint="norm")  # type: ignore[arg-type]
    assert list(model.state_dict()) == before and torch.equal(model(x), output)


def slow(basis: Tensor, constraint: Constraint) -> Tensor:
    """One filter after the other, by Gram-Schmidt."""
    filters: list[Tensor] = []
    for row in basis:
        if constraint == "orthonormal":
            for other in filters:
                row = row - (row @ other) * other
        filters.append(row if constraint == "none" else row / row.square().sum().sqrt())
    return torch.stack(filters)


@every_constraint
def test_filters_equal_the_definition(constraint: Constraint) -> None:
    basis = torch.randn(9, 9, dtype=torch.float64)
    torch.testing.assert_close(constrained(basis, constraint), slow(basis, constraint))


@every_real_constraint
def test_derivatives(constraint: Constraint) -> None:
    basis = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda b: constrained(b, constraint), basis)
    assert gradgradcheck(lambda b: constrained(b, constraint), basis)
    layer = interspace(nn.Conv2d(2, 2, 2).double(), basis="dct", constraint=constraint)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    names = ["parametrizations.weight.original", "parametrizations.weight.0.basis"]

    def output(*tensors: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))
        return found

    tensors = [dict(layer.named_parameters())[name].detach().clone().requires_grad_() for name in names]
    assert gradcheck(output, tensors)


@every_real_constraint
def test_the_scale_of_a_filter_and_decay_without_end_change_nothing(constraint: Constraint) -> None:
    model, x = moved(constraint)
    expected = backward(model, x)
    basis = spaces(model)[0].basis
    start = basis.detach().clone()
    with torch.no_grad():
        basis.copy_(start * torch.logspace(-3, 3, 9)[:, None])
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        for scale in (1e-33, 1e-25, 1e7, 1e30):  # the squares of most of these are out of the range of float32
            basis.copy_(start * scale)
            torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        basis.copy_(start)
        for _ in range(100_000):  # of a learning rate of 0.01 and a weight decay of 0.05
            basis.mul_(1 - 5e-4)
    torch.testing.assert_close(backward(model, x), expected, atol=1e-5, rtol=1e-5)
    assert basis.abs().max() > 0 and basis.grad is not None and basis.grad.isfinite().all()


def test_a_filter_of_zeros_gives_no_nan() -> None:
    model, x = moved("unit")
    with torch.no_grad():
        spaces(model)[0].basis[3] = 0
    assert backward(model, x).isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_filter_whose_coefficients_are_all_pruned_decays_without_harm() -> None:
    """A filter without a gradient is changed by weight decay alone, during the whole training."""
    model, x = moved("unit")
    kept = (torch.arange(9) != 4).reshape(3, 3)
    set_masks(model, {name: kept.expand(model[int(name)].weight.shape) for name in "02"})
    expected = model(x)
    with torch.no_grad():
        spaces(model)[0].basis[4] *= 1e-40
    torch.testing.assert_close(backward(model, x), expected)
    assert all(p.grad.isfinite().all() for p in model.parameters())


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.5),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@every_real_constraint
def test_filters_keep_their_norm_in_training(constraint: Constraint, optimizer: str) -> None:
    model, x = moved(constraint)
    before = spaces(model)[0].filters
    trained = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(20):
        backward(model, x)
        trained.step()
    filters = spaces(model)[0].filters.flatten(1)
    gram = filters @ filters.mT
    assert (filters - before.flatten(1)).abs().max() > 1e-3
    torch.testing.assert_close(gram.diagonal(), torch.ones(9), atol=1e-5, rtol=0)
    if constraint == "orthonormal":
        torch.testing.assert_close(gram, torch.eye(9), atol=1e-5, rtol=0)


@every_constraint
def test_momentum_joins_in_the_filters_that_are_used(constraint: Constraint) -> None:
    """Twice the standard basis: under a constraint its filters are the standard ones."""
    plain, x = net()
    model = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (plain, model)]
    for step in range(2):
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            if step == 1 and each is model:
                join_optimizer(interspace(model, basis=2 * torch.eye(9), constraint=constraint), optimizer)
                for space in spaces(model):
                    space.basis.requires_grad_(False)
            backward(each, x)
            optimizer.step()
    if constraint == "none":  # gradients of coefficients are twice those of weights, and so are steps of the halves
        assert not torch.allclose(model[0].weight, plain[0].weight, atol=1e-3)
    else:
        torch.testing.assert_close(model(x), plain(x), atol=1e-6, rtol=1e-5)


@every_real_constraint
@pytest.mark.parametrize("at_once", [False, True])
def test_a_step_with_momentum_is_that_of_the_plain_model_bit_for_bit(constraint: Constraint, at_once: bool) -> None:
    plain, x = net()
    model = copy.deepcopy(plain)
    weights = dict(zip(model.parameters(), plain.parameters(), strict=True))
    optimizers = [OPTIMIZERS["SGD"](each.parameters()) for each in (plain, model)]
    for each, optimizer in zip((plain, model), optimizers, strict=True):
        backward(each, x)
        optimizer.step()
    optimizer = optimizers[1]
    interspace(model, basis=2 * torch.eye(9), constraint=constraint, optimizer=optimizer if at_once else None)
    if not at_once:
        join_optimizer(model, optimizer)
    before = spaces(model)[0].basis.detach().clone()
    for each, optimizer in zip((plain, model), optimizers, strict=True):
        backward(each, x)
        optimizer.step()
    assert all(torch.equal(coefficients, weight) for coefficients, weight in weights.items())
    assert not torch.equal(spaces(model)[0].basis, before)


@every_constraint
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_brings_its_constraint(constraint: Constraint, assign: bool) -> None:
    model, x = moved(constraint)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    for other in CONSTRAINTS:
        fresh = interspace(net()[0], sharing="model", constraint=other)
        fresh.load_state_dict(torch.load(file, weights_only=True), assign=assign)
        file.seek(0)
        assert [space.constraint for space in spaces(fresh)] == [constraint] * 2
        assert torch.equal(fresh(x), model(x)) and torch.equal(spaces(fresh)[0].basis, spaces(model)[0].basis)
    assert copy.deepcopy(spaces(model)[0]).constraint == constraint


@every_constraint
def test_a_state_dict_from_before_there_were_constraints_is_used_as_it_is(constraint: Constraint) -> None:
    model, x = moved("none")
    # It has a shared basis under the key of every layer, too.
    old = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    fresh = interspace(net()[0], sharing="model", constraint=constraint)
    fresh.load_state_dict(old)
    assert spaces(fresh)[0].constraint == "none" and torch.equal(fresh(x), model(x))


@every_constraint
def test_a_compact_file_keeps_the_raw_basis_and_the_constraint(constraint: Constraint, tmp_path: Path) -> None:
    model, x = moved(constraint)
    with torch.no_grad():
        spaces(model)[0].basis.mul_(1.7)
    save(model, tmp_path / "model.safetensors")
    fresh = load(net()[0], tmp_path / "model.safetensors")
    assert [space.constraint for space in spaces(fresh)] == [constraint] * 2
    assert torch.equal(spaces(fresh)[0].basis, spaces(model)[0].basis) and torch.equal(fresh(x), model(x))


@every_constraint
def test_averages_keep_the_constraint(constraint: Constraint) -> None:
    model, x = moved(constraint)
    averages = [
        AveragedModel(model, use_buffers=True),
        AveragedModel(model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.999)),
    ]
    for average in averages:
        for _ in range(50):
            average.update_parameters(model)
        fresh = interspace(net()[0], sharing="model")
        fresh.load_state_dict(average.module.state_dict())
        assert spaces(fresh)[0].constraint == constraint
        torch.testing.assert_close(fresh(x), model(x))


@every_constraint
def test_casts_and_autocast(constraint: Constraint) -> None:
    model, x = moved(constraint)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)
        F.cross_entropy(found, torch.arange(4) % 3).backward()
    torch.testing.assert_close(found.float(), model(x), atol=0.05, rtol=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float16, 0.01), (torch.bfloat16, 0.05)):
        cast = copy.deepcopy(model).to(dtype)
        assert [space.constraint for space in spaces(cast)] == [constraint] * 2
        torch.testing.assert_close(cast(x.to(dtype)).float(), model(x), atol=tolerance, rtol=tolerance)


@every_constraint
def test_compiled_and_exported_models_compute_the_same(constraint: Constraint) -> None:
    model, x = moved(constraint)
    expected = backward(model, x)
    gradients = [p.grad.clone() for p in model.parameters()]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(backward(compiled, x), expected)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients)
    torch.testing.assert_close(torch.export.export(model.eval(), (x,)).module()(x), expected)


@every_constraint
def test_no_graph_is_kept_between_forward_passes(constraint: Constraint) -> None:
    """Accumulation without a step, activation checkpointing, and a forward pass without gradients in between."""
    model, x = moved(constraint, torch.float64)
    backward(model, x)
    once = [p.grad.clone() for p in model.parameters()]

    def loss(recomputed: bool = False) -> Tensor:
        hidden = checkpoint(model[:3], x, use_reentrant=False) if recomputed else model[:3](x)
        return F.cross_entropy(model[3:](hidden), torch.arange(4) % 3)

    model.zero_grad()
    loss().backward()
    with torch.no_grad():
        loss()
    loss(recomputed=True).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [2 * each for each in once])


def test_normalize_gives_a_basis_without_a_constraint_unit_norm_for_good() -> None:
    model, x = moved("none")
    set_masks(model, {"2": torch.rand(5, 4, 3, 3) < 0.5})
    expected, kept = model(x), masks(model)
    normalize(model)
    torch.testing.assert_close(model(x), expected)
    assert [space.constraint for space in spaces(model)] == ["unit"] * 2
    assert torch.equal(masks(model)["2"], kept["2"])


@pytest.mark.parametrize("sharing", ["layer", "model"])
def test_layers_that_share_a_basis_share_its_filters(sharing: str) -> None:
    first, second = spaces(Case("conv2d", "orthonormal", sharing).interspace()[0])
    assert torch.equal(first.filters, second.filters) == (sharing == "model")
    assert first.constraint == second.constraint == "unit"
