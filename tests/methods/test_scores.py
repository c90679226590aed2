"""Scores: literals worked out by hand, slow oracles on explicit formulas, both spaces, nothing left behind."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kinds import KINDS, Case, every_kind
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call
from torch.nn.utils import prune as host

from ip_plugin import errors, interspace, masks, methods, prunable, set_masks
from ip_plugin.adapters import torch_prune
from ip_plugin.basis.bases import Constraint
from ip_plugin.core.tensor_ref import prunable_tensors

Score = Callable[[nn.Module, Any], methods.Scores]


def by_classes(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


#: Every score as a function of a model and an input.
SCORES: dict[str, Score] = {
    "random": lambda model, x: methods.random(model, generator=torch.Generator().manual_seed(3)),
    "magnitude": lambda model, x: methods.magnitude(model),
    "lamp": lambda model, x: methods.lamp(model),
    "snip": lambda model, x: methods.snip(model, batches_of(x), by_classes),
    "grasp": lambda model, x: methods.grasp(model, batches_of(x), by_classes, temperature=2),
    "synflow": lambda model, x: methods.synflow(model, x[:1]),
    "movement": lambda model, x: methods.movement(model, batches_of(x), by_classes),
}
NEED_DATA = ("snip", "grasp", "movement")
every_score = pytest.mark.parametrize("name", SCORES)


def batches_of(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    with torch.inference_mode(False):
        return [(x, torch.arange(len(x)) % 3), (-0.5 * x, (torch.arange(len(x)) + 1) % 3)]


def values(scores: methods.Scores) -> list[Tensor]:
    return list(scores.values())


# The toy: coefficients (2, -1) in the basis ((1, 1), (1, -1)), so the kernel (1, 3); then the linear weights (3, -2).


def toy() -> nn.Sequential:
    model = nn.Sequential(nn.Conv1d(1, 1, 2, bias=False), nn.Flatten(), nn.Linear(2, 1, bias=False)).double()
    interspace(model, basis=torch.tensor([[1.0, 1.0], [1.0, -1.0]]), constraint="none")
    with torch.no_grad():
        model[0].parametrizations.weight.original.copy_(torch.tensor([[[2.0, -1.0]]]))
        model[2].weight.copy_(torch.tensor([[3.0, -2.0]]))
    return model


FIRST = (torch.tensor([[[1.0, 2.0, 3.0]]]).double(), None)  # outputs (7, 11), then -1; dL/dc = (-1, -1)
SECOND = (torch.tensor([[[0.0, 1.0, 0.0]]]).double(), None)  # outputs (3, 1), then 7; dL/dc = (1, -5)


def total(outputs: Tensor, targets: None) -> Tensor:
    return outputs.sum()


BY_HAND: dict[str, tuple[Callable[[nn.Module], methods.Scores], list[float], list[float]]] = {
    "magnitude": (methods.magnitude, [2 * math.sqrt(2), math.sqrt(2)], [3, 2]),
    "lamp": (methods.lamp, [1, 0.2], [1, 4 / 13]),
    "snip": (lambda model: methods.snip(model, [FIRST], total), [2, 1], [21, 22]),
    # The gradients are summed before the absolute value is taken: (-1 + 1, -1 - 5) and (7 + 3, 11 + 1).
    "snip of two batches": (lambda model: methods.snip(model, [FIRST, SECOND], total), [0, 6], [30, 24]),
    "snip of four batches": (lambda model: methods.snip(model, [FIRST, SECOND] * 2, total), [0, 12], [60, 48]),
    "movement": (lambda model: methods.movement(model, [FIRST, SECOND], total), [0, -6], [-30, 24]),
    # H couples c and a by the rows (3, -1) and (5, -1). In unit gauge dL/dc is halved: H v = (7 * 3 + 11 * 5,
    # -7 - 11) and (-1.5 + 0.5, -2.5 + 0.5).
    "grasp": (lambda model: methods.grasp(model, [FIRST], total, temperature=1), [152, 18], [-3, 4]),
    "grasp at 200": (
        lambda model: methods.grasp(model, [FIRST], total),
        [152 / 40000, 18 / 40000],
        [-3 / 40000, 4 / 40000],
    ),
    # Without signs the kernel is 2 (1, 1) + 1 (1, 1) and the linear weights are (3, 2): the outputs 6, 6, then 30.
    "synflow": (lambda model: methods.synflow(model, FIRST[0]), [20, 10], [18, 12]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_scores_of_a_toy_worked_out_by_hand(name: str) -> None:
    score, of_coefficients, of_weights = BY_HAND[name]
    model = toy()
    found = score(model)
    assert list(found) == prunable(model)
    expected = [torch.tensor([[of_coefficients]]).double(), torch.tensor([of_weights]).double()]
    torch.testing.assert_close(values(found), expected)


def test_lamp_of_equal_and_of_pruned_entries_and_of_a_layer_of_zeros() -> None:
    model = nn.Sequential(nn.Linear(5, 1), nn.Linear(1, 2))
    model[0].weight.data = torch.tensor([[2.0, -2.0, 1.0, 0.0, 9.0]])
    model[1].weight.data.zero_()
    set_masks(model, {"0": torch.tensor([[1, 1, 1, 1, 0]])})
    first, second = values(methods.lamp(model))
    torch.testing.assert_close(first, torch.tensor([[4 / 8, 4 / 8, 1 / 9, 0.0, -math.inf]]).double())
    assert second.tolist() == [[0.0], [0.0]]


def mask_of(layer: Any) -> Tensor:
    return torch.rand(layer.parameter.shape, generator=torch.Generator().manual_seed(2)) < 0.6


# Oracles: the plain twin is called with kernels that an explicit sum has composed.


class Formula:
    """A network of `kinds` as a function of its coefficients, without any parametrization."""

    def __init__(self, case: Case, constraint: Constraint = "none") -> None:
        self.plain, self.x = case.plain(torch.float64)
        self.model = case.convert(copy.deepcopy(self.plain), constraint=constraint)
        self.layers = prunable_tensors(self.model)
        generator = torch.Generator().manual_seed(5)
        for layer in self.layers:
            if layer.interspace is not None:  # move the basis: no longer orthonormal, no unit norms
                noise = torch.rand(layer.interspace.basis.shape, generator=generator)
                layer.interspace.basis.data.add_(noise, alpha=0.3)
        self.coefficients = [layer.parameter.detach().clone() for layer in self.layers]
        self.bases = [None if e.interspace is None else e.interspace.effective_basis.detach() for e in self.layers]

    def __call__(self, coefficients: list[Tensor], bases: list[Tensor | None], x: Tensor) -> Tensor:
        kernels = {}
        for layer, c, g in zip(self.layers, coefficients, bases, strict=True):
            kernel = c if g is None else torch.einsum("oin,nk->oik", c.flatten(2), g).reshape(c.shape)
            kernels[f"{layer.module_name}.weight"] = kernel
        return functional_call(self.plain, kernels, (x,))

    def gradients(self) -> list[Tensor]:
        sums = [torch.zeros_like(c) for c in self.coefficients]
        for x, y in batches_of(self.x):
            leaves = [c.clone().requires_grad_() for c in self.coefficients]
            by_classes(self(leaves, self.bases, x), y).backward()
            for each, leaf in zip(sums, leaves, strict=True):
                each += leaf.grad
        return sums


MOVED = [Case(kind, ("tensor", "dct")[i % 2], "callable") for i, kind in enumerate(KINDS)]
MOVED_CONSTRAINTS: tuple[Constraint, ...] = ("none", "none", "unit", "unit", "orthonormal", "none")


def moved(kind: int) -> Formula:
    """By number; the constraints go round, so that each meets both bases."""
    constraint = MOVED_CONSTRAINTS[kind % 6]
    case = MOVED[kind]
    return Formula(replace(case, basis="dct") if constraint == "orthonormal" else case, constraint)


every_moved = pytest.mark.parametrize("kind", range(len(MOVED)), ids=list(KINDS))


@every_moved
def test_first_order_scores_equal_the_explicit_formula_with_a_moved_basis(kind: int) -> None:
    formula = moved(kind)
    products = [c * g for c, g in zip(formula.coefficients, formula.gradients(), strict=True)]
    torch.testing.assert_close(values(SCORES["snip"](formula.model, formula.x)), [p.abs() for p in products])
    torch.testing.assert_close(values(SCORES["movement"](formula.model, formula.x)), [-p for p in products])


@every_moved
def test_magnitudes_equal_the_explicit_formula_with_a_moved_basis(kind: int) -> None:
    formula = moved(kind)
    for score, lamp, c, g in zip(
        values(methods.magnitude(formula.model)),
        values(methods.lamp(formula.model)),
        formula.coefficients,
        formula.bases,
        strict=True,
    ):
        unit = (c.flatten(2) * g.square().sum(1).sqrt() if g is not None else c).abs().flatten()
        torch.testing.assert_close(score.flatten(), unit)
        slow = torch.stack([v**2 / (unit[unit >= v] ** 2).sum() for v in unit])
        torch.testing.assert_close(lamp.flatten(), slow)


@every_moved
def test_synflow_equals_the_explicit_formula_with_a_moved_basis(kind: int) -> None:
    formula = moved(kind)
    for parameter in formula.plain.parameters():
        parameter.data.abs_()
    leaves = [c.abs().requires_grad_() for c in formula.coefficients]
    bases = [None if g is None else g.abs() for g in formula.bases]
    if MOVED[kind].kind == "subclass":  # its own forward subtracts means: there is no network without signs
        return
    formula(leaves, bases, torch.ones_like(formula.x[:1])).sum().backward()
    expected = [(leaf.detach() * leaf.grad).abs() for leaf in leaves if leaf.grad is not None]
    torch.testing.assert_close(values(methods.synflow(formula.model, formula.x[:1])), expected)


@pytest.mark.parametrize(
    ("kind", "basis", "masked"),
    [
        ("conv1d", "standard", ""), ("conv1d", "tensor", "ours"), ("transposed1d", "tensor", "host"),
        ("1x3", "tensor", ""), ("1x3", "standard", "host"), ("depthwise", "standard", "ours"),
        ("depthwise", "tensor", "ours"), ("subclass", "tensor", "host"),
    ],
)  # fmt: skip
def test_grasp_equals_the_hessian_in_unit_gauge(kind: str, basis: str, masked: str) -> None:
    formula = Formula(Case(kind, basis, "callable"))
    norms = [1.0 if g is None else g.square().sum(1).sqrt() for g in formula.bases]
    unit_bases = [None if g is None else g / n[:, None] for g, n in zip(formula.bases, norms, strict=True)]
    in_unit = [
        c if g is None else (c.flatten(2) * n).reshape(c.shape)
        for c, g, n in zip(formula.coefficients, formula.bases, norms, strict=True)
    ]
    sizes = [c.numel() for c in in_unit]
    kept = [mask_of(layer) if masked else torch.ones_like(layer.parameter) for layer in formula.layers]
    for layer, mask in zip(formula.layers, kept, strict=True):
        if masked == "ours":
            set_masks(formula.model, {layer.module_name: mask})
        elif masked == "host":
            host.custom_from_mask(*layer.target, mask=mask)
    ones = torch.cat([mask.flatten() for mask in kept])

    def loss(flat: Tensor) -> Tensor:
        flat = flat * ones
        coefficients = [part.reshape(c.shape) for part, c in zip(flat.split(sizes), in_unit, strict=True)]
        outputs = [(formula(coefficients, unit_bases, x), y) for x, y in batches_of(formula.x)]
        return sum(by_classes(o / 2, y) for o, y in outputs)  # type: ignore[return-value]

    flat = torch.cat([c.flatten() for c in in_unit])
    gradient = torch.autograd.functional.jacobian(loss, flat)
    hessian = torch.autograd.functional.hessian(loss, flat)
    expected = flat * (hessian @ gradient)
    assert expected.abs().max() > 1e-3
    found = torch.cat([score.flatten() for score in values(SCORES["grasp"](formula.model, formula.x))])
    torch.testing.assert_close(found, expected.masked_fill(ones == 0, -math.inf))


def test_grasp_sees_the_same_dropout_and_statistics_in_both_derivatives() -> None:
    torch.manual_seed(1)
    parts = (nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))
    model = nn.Sequential(*parts).double()
    x, y = torch.randn(8, 4).double(), torch.arange(8) % 3
    sizes = [24, 18]

    def loss(flat: Tensor) -> Tensor:
        first, second = flat.split(sizes)
        torch.manual_seed(7)
        weights = {"0.weight": first.reshape(6, 4), "4.weight": second.reshape(3, 6)}
        return by_classes(functional_call(copy.deepcopy(model), weights, (x,)), y)

    flat = torch.cat([model[0].weight.detach().flatten(), model[4].weight.detach().flatten()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    expected = flat * (hessian @ torch.autograd.functional.jacobian(loss, flat))
    torch.manual_seed(7)
    found = methods.grasp(model, iter([(x, y)]), by_classes, temperature=1)
    torch.testing.assert_close(torch.cat([score.flatten() for score in values(found)]), expected)


# Two spaces


@every_score
@every_kind
def test_under_the_standard_basis_scores_are_those_of_the_plain_twin(kind: str, name: str) -> None:
    plain, x = KINDS[kind].ready()
    model = interspace(copy.deepcopy(plain))
    for ours, theirs in zip(values(SCORES[name](model, x)), values(SCORES[name](plain, x)), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous() and ours.isfinite().all()


@every_score
@pytest.mark.parametrize("sharing", ["layer", "model"])
def test_no_score_depends_on_the_gauge(name: str, sharing: str) -> None:
    plain, x = KINDS["conv2d"].ready(torch.float64)
    model = interspace(plain, basis="orthonormal", sharing=sharing, constraint="none")
    before = values(SCORES[name](model, x))
    scale = torch.linspace(0.5, 3, 9, dtype=torch.float64)
    scaled: set[int] = set()
    for layer in prunable_tensors(model):
        if layer.interspace is not None:
            layer.parameter.data /= scale.reshape(3, 3)
            if id(layer.interspace.basis) not in scaled:
                layer.interspace.basis.data *= scale[:, None]
                scaled.add(id(layer.interspace.basis))
    torch.testing.assert_close(values(SCORES[name](model, x)), before)


def test_grasp_of_a_filter_that_vanished_is_zero() -> None:
    plain, x = KINDS["conv2d"].ready(torch.float64)
    model = interspace(plain, constraint="none")
    model[0].parametrizations.weight[0].basis.data[4] = 0
    score = values(SCORES["grasp"](model, x))[0]
    assert (score[..., 1, 1] == 0).all() and (score[..., 0, 0] != 0).any()


def mixed(dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor]:
    """Interspace and spatial layers, BatchNorm, dropout, tied weights, a frozen layer, gradients on some."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
        nn.Conv2d(4, 4, 3),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(16, 16),
        nn.Tanh(),
        nn.Linear(16, 16),
        nn.Linear(16, 3),
    ).to(dtype)
    model[9].weight = model[7].weight
    model[0].requires_grad_(False)
    interspace(model, basis="dct", sharing="layer")
    model[4].eval()
    x = torch.randn(6, 3, 6, 6, dtype=dtype)
    by_classes(model(x), torch.arange(6) % 3).backward()
    model[10].weight.grad = None
    return model, x


@pytest.mark.parametrize("name", [name for name in SCORES if name != "grasp"])
@pytest.mark.parametrize("hosts", ["ours", "host", "both"])
def test_pruned_entries_score_lowest_and_count_nowhere(name: str, hosts: str) -> None:
    model, x = mixed()
    zeroed, _ = mixed()
    for layer, other in zip(prunable_tensors(model), prunable_tensors(zeroed), strict=True):
        mask = mask_of(layer)
        if hosts != "host":
            set_masks(model, {layer.module_name: mask if hosts == "ours" else mask | (torch.rand(mask.shape) < 0.2)})
        if hosts != "ours":
            host.custom_from_mask(*layer.target, mask=mask)
        other.parameter.data *= mask
    model[9].weight.data *= masks(model)["7"]  # the mask is on one of the tied layers only
    torch.manual_seed(4)
    found = SCORES[name](model, x)
    torch.manual_seed(4)
    reference = SCORES[name](zeroed, x)
    for layer, score, expected in zip(prunable_tensors(model), values(found), values(reference), strict=True):
        assert layer.mask is not None and (score[~layer.mask] == -math.inf).all()
        torch.testing.assert_close(score[layer.mask], expected[layer.mask])


@every_score
def test_frozen_tensors_are_scored_like_others(name: str) -> None:
    plain, x = KINDS["conv2d"].ready(torch.float64)
    model = interspace(plain, basis="dct")
    before = values(SCORES[name](model, x))
    torch.testing.assert_close(values(SCORES[name](model.requires_grad_(False), x)), before, rtol=0, atol=0)


@every_score
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_scores_do_not_ask_for_the_callers_gradient_mode(name: str, off: Any) -> None:
    model, x = mixed()
    before = values(SCORES[name](model, x))
    with off():
        found = values(SCORES[name](model, x))
    torch.testing.assert_close(found, before, rtol=0, atol=0)


@every_score
def test_channels_last_changes_no_score(name: str) -> None:
    plain, x = KINDS["conv2d"].ready(torch.float64)
    model = interspace(plain, basis="dct")
    before = values(SCORES[name](model, x))
    found = values(SCORES[name](model.to(memory_format=torch.channels_last), x))
    torch.testing.assert_close(found, before)
    assert all(score.is_contiguous() for score in found)


@pytest.mark.parametrize("name", NEED_DATA)
def test_half_precision_is_summed_in_float32(name: str) -> None:
    model, x = KINDS["conv2d"].ready(torch.bfloat16)
    assert {score.dtype for score in values(SCORES[name](interspace(model), x))} == {torch.float32}


def test_inputs_may_be_tuples_and_mappings() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 3)

        def forward(self, first: Tensor, second: Tensor, *, tokens: Tensor | None = None) -> dict[str, Any]:
            assert tokens is None or tokens.dtype == torch.int64
            return {"logits": [self.linear(first + second)], "length": torch.tensor(2)}

    model, a, b = Sum(), torch.randn(4, 2), torch.randn(4, 2)
    named = {"first": a, "second": b, "tokens": torch.arange(4)}

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        return by_classes(outputs["logits"][0], targets)

    y = torch.tensor([0, 1, 2, 0])
    one, other = (values(methods.snip(model, [(inputs, y)], loss)) for inputs in ((a, b), named))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    one, other = (values(methods.synflow(model, example)) for example in ((a, b), named))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    # 4 rows of ones + ones, into 3 outputs
    torch.testing.assert_close(one, [8 * model.linear.weight.detach().abs().double()])


@pytest.mark.parametrize("name", [*NEED_DATA, "synflow"])
def test_a_layer_that_is_not_used_scores_zero(name: str) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 3), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    used, unused = values(SCORES[name](Half(), torch.randn(4, 2)))
    assert used.abs().sum() > 0
    assert (unused == 0).all()


def test_noise_is_the_same_from_the_same_seed() -> None:
    model, _ = mixed()
    first, again = (methods.random(model, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    other = methods.random(model, generator=torch.Generator().manual_seed(4))
    assert all(torch.equal(first[where], again[where]) for where in first)
    assert not any(torch.equal(first[where], other[where]) for where in first)
    flat = torch.cat([score.flatten() for score in values(first)])
    assert flat.min() >= 0 and flat.max() < 1 and abs(flat.mean() - 0.5) < 0.05


# Purity


def everything(model: nn.Module) -> Any:
    """What a score could leave behind: objects by identity, and the bytes of every tensor."""
    seen: list[Any] = [torch.get_rng_state(), torch.is_grad_enabled()]
    for name, module in model.named_modules():
        seen += [name, type(module), {key: id(value) for key, value in vars(module).items()}]
        seen += [{k: id(v) for k, v in place.items()} for place in (module._parameters, module._buffers)]
        seen += [list(module._forward_pre_hooks), list(module._forward_hooks)]
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor):
                seen += [tensor.detach().clone(), tensor.requires_grad, tensor._version]
                grad = tensor.grad if tensor.is_leaf else None
                seen += [id(grad), None if grad is None else grad.clone()]
    return seen


def same(first: Any, second: Any) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(first, second, strict=True)
    )


def pruned_by_the_host() -> tuple[nn.Sequential, Tensor]:
    model, x = mixed()
    set_masks(model, {"0": torch.rand(6, 3, 3, 3) < 0.5})
    host.l1_unstructured(model[3], "weight", 0.5)
    host.l1_unstructured(model[4].parametrizations.weight, "original", 0.5)
    host.random_unstructured(model[10], "bias", 1)
    return model, x


@every_score
@pytest.mark.parametrize("training", [True, False])
def test_a_score_leaves_nothing_behind(name: str, training: bool) -> None:
    model, x = pruned_by_the_host()
    model.train(training)
    model[4].eval()
    before = everything(model)
    SCORES[name](model, x)
    assert same(before, everything(model))


def test_the_test_above_can_fail() -> None:
    model, x = pruned_by_the_host()
    for leave_something in (
        lambda: model(x),
        lambda: model[0].parametrizations.weight.original.data.mul_(1.5),
        lambda: torch.rand(1),
        lambda: model[10].weight.sum().backward(),
        lambda: model[4].train(),
    ):
        before = everything(model)
        leave_something()
        assert not same(before, everything(model))


class FailsInTheSecondBatch:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("out of memory")
        return by_classes(outputs, targets)


@pytest.mark.parametrize("score", [methods.snip, methods.grasp, methods.movement])
def test_a_score_that_fails_leaves_nothing_behind(score: Any) -> None:
    model, x = pruned_by_the_host()
    before = everything(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        score(model, batches_of(x), FailsInTheSecondBatch())
    assert same(before, everything(model))


def test_attributes_that_a_forward_pass_sets_are_put_back() -> None:
    class Counter(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = super().forward(x)
            return self.last

    model = Counter(2, 3)
    methods.snip(model, batches_of(torch.randn(3, 2)), by_classes)
    assert (model.calls, hasattr(model, "last")) == (0, False)


BAD: dict[str, tuple[Callable[[nn.Module, Tensor], Any], type[Exception], str]] = {
    "no batches": (lambda m, x: methods.snip(m, [], by_classes), errors.NoBatchesError, "empty iterable"),
    "no batches for GraSP": (lambda m, x: methods.grasp(m, iter([]), by_classes), errors.NoBatchesError, "empty"),
    "a tensor for a batch": (lambda m, x: methods.snip(m, [x], by_classes), errors.InvalidBatchError, "a Tensor"),
    "a triple": (lambda m, x: methods.movement(m, [(x, x, x)], by_classes), errors.InvalidBatchError, "length 3"),
    "a loss for each row": (
        lambda m, x: methods.snip(m, batches_of(x), lambda o, y: o.sum(1)),
        errors.InvalidLossError,
        r"a tensor of shape \(6,\)",
    ),
    "a loss that is no tensor": (
        lambda m, x: methods.grasp(m, batches_of(x), lambda o, y: 1.0),
        errors.InvalidLossError,
        "a float",
    ),
    "NaN": (
        lambda m, x: methods.snip(m, [(x * math.nan, torch.arange(6) % 3)], by_classes),
        errors.InvalidLossError,
        "nan",
    ),
    "detached": (
        lambda m, x: methods.snip(m, batches_of(x), lambda o, y: o.detach().sum()),
        errors.InvalidLossError,
        "does not depend",
    ),
    "infinite gradients": (
        lambda m, x: methods.snip(m, batches_of(x), lambda o, y: (0 * o).sum().sqrt()),
        errors.NonFiniteScoresError,
        "layer '0': 162 NaN",
    ),
    "temperature": (
        lambda m, x: methods.grasp(m, batches_of(x), by_classes, temperature=0),
        errors.InvalidTemperatureError,
        "0",
    ),
    "an input that does not fit": (lambda m, x: methods.synflow(m, x[:, :2]), errors.ExampleInputError, "channels"),
    "nothing to prune": (lambda m, x: methods.magnitude(nn.ReLU()), errors.NothingToPruneError, "empty"),
    "nothing to rank": (lambda m, x: methods.ranks({}), errors.NothingToPruneError, "empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_user_can_get_wrong_changes_nothing(case: str) -> None:
    call, error, message = BAD[case]
    model, x = pruned_by_the_host()
    before = everything(model)
    with pytest.raises(error, match=message) as caught:
        call(model, x)
    assert isinstance(caught.value, errors.InterspaceError)
    assert "What to do: " in str(caught.value)
    assert same(before, everything(model))


def test_outputs_that_a_score_cannot_use_are_refused() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), "text"

    model = Pair(2, 3)
    batches = batches_of(torch.randn(3, 2))
    with pytest.raises(errors.InvalidOutputsError, match="GraSP needs outputs that can be divided.*\n.*a tuple"):
        methods.grasp(model, batches, lambda outputs, targets: by_classes(outputs[0], targets))
    unused = nn.Sequential(nn.Linear(2, 2), nn.Flatten())
    unused.forward = lambda x: x  # type: ignore[method-assign, assignment]
    with pytest.raises(errors.InvalidOutputsError, match="SynFlow needs a floating point output that depends"):
        methods.synflow(unused, torch.ones(1, 2))
    spoilt = nn.Linear(2, 2)
    spoilt.weight.data[0, 0] = math.nan
    for score in (methods.magnitude, methods.lamp, lambda m: methods.synflow(m, torch.ones(1, 2))):
        with pytest.raises(errors.NonFiniteScoresError, match="layer '': "):
            score(spoilt)


# Hosts


@every_score
@pytest.mark.parametrize("prune", [host, torch_prune], ids=["host", "adapter"])
@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_torch_prune_takes_them_as_importance_scores(name: str, prune: Any, space: str) -> None:
    model, x = KINDS["conv2d"].ready(torch.float64)
    if space == "interspace":
        interspace(model, basis="dct", sharing="model")
    for count, amount in ((150, 150), (300, 150)):  # the host counts what it prunes besides
        scores = SCORES[name](model, x)
        expected = methods.select(scores, count=count)
        signed = any((score[score > -math.inf] < 0).any() for score in scores.values())
        assert signed == (name in ("grasp", "movement"))
        given = methods.ranks(scores) if signed else scores
        prune.global_unstructured(prunable(model), prune.L1Unstructured, importance_scores=given, amount=amount)
        found = [layer.mask for layer in prunable_tensors(model)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected.values(), strict=True))
        assert sum(int((~mask).sum()) for mask in found) == count


def test_ranks_order_all_tensors_together() -> None:
    one, two = nn.Linear(2, 1), nn.Linear(1, 2)
    scores = {(one, "weight"): torch.tensor([[-3.0, 2.0]]), (two, "weight"): torch.tensor([[-math.inf], [2.0]])}
    assert [score.tolist() for score in methods.ranks(scores).values()] == [[[1.0, 2.0]], [[0.0], [2.0]]]


# SynFlow


def chain(space: str, seed: int) -> nn.Sequential:
    """A chain without biases. Its widest layer has nine tenths of the entries, and they are much alike."""
    torch.manual_seed(seed)
    widths = (3, 4, 96, 96, 4)
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        parts += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.ReLU()]
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3, bias=False))
    if space == "interspace":
        interspace(model, basis=torch.eye(9) + 0.1 * torch.rand(9, 9))
    for layer in prunable_tensors(model):
        layer.parameter.data.uniform_(0.5, 1).div_(layer.parameter[0].numel())
    return model


@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_synflow_conserves_the_flow_through_every_layer_of_a_chain(space: str) -> None:
    model = chain(space, 0)
    for layer in prunable_tensors(model):
        layer.parameter.data *= torch.randn(layer.parameter.shape)
    sums = torch.stack([score.sum() for score in values(methods.synflow(model, torch.zeros(1, 3, 8, 8)))])
    assert len(sums) == 5 and sums[0] > 0
    torch.testing.assert_close(sums, sums[0].expand(5))


@pytest.mark.parametrize("space", ["spatial", "interspace"])
@pytest.mark.parametrize("seed", [0, 1])
def test_synflow_in_100_rounds_keeps_every_layer_at_99_percent_where_snip_loses_one(space: str, seed: int) -> None:
    model = chain(space, seed)
    x = torch.rand(8, 3, 4, 4)
    size = sum(score.numel() for score in values(methods.magnitude(model)))
    with pytest.warns(errors.LayerCollapseWarning, match=r"less than a tenth.*\(96, 96, 3, 3\)"):
        by_snip = methods.select(SCORES["snip"](model, x), sparsity=0.99)
    assert min(int(mask.sum()) for mask in by_snip.values()) == 0
    for k in range(100):
        scores = methods.synflow(model, x[:1])
        methods.apply_masks(model, methods.select(scores, sparsity=1 - 0.01 ** ((k + 1) / 100)))
    kept = [int(mask.sum()) for mask in masks(model).values()]
    assert sum(kept) == size - round(0.99 * size)
    assert min(kept) > 0
    assert max(score.max() for score in values(methods.synflow(model, x[:1]))) > 0


def test_synflow_of_a_deep_network_stays_finite_and_leaves_float32() -> None:
    parts = [nn.Linear(64, 64) for _ in range(60)]
    for part in parts:
        part.weight.data.uniform_(-1, 1)
    scores = values(methods.synflow(nn.Sequential(*parts), torch.ones(1, 64)))
    assert max(score.max() for score in scores) > torch.finfo(torch.float32).max
    assert all(score.isfinite().all() for score in scores)


def test_synflow_reads_running_means_as_zero_and_keeps_running_variances() -> None:
    model = nn.Sequential(nn.Conv1d(1, 1, 1, bias=False), nn.BatchNorm1d(1, eps=0), nn.ReLU())
    model[0].weight.data.fill_(-2)
    model[1].running_mean.fill_(100)
    model[1].running_var.fill_(4)
    model[1].weight.data.fill_(-3)
    [score] = values(methods.synflow(model, torch.zeros(1, 1, 5)))
    assert score.tolist() == [[[15.0]]]  # 5 positions, each 2 / sqrt(4) * 3


# Movement over a training run


def trained(model: nn.Module, x: Tensor, steps: int, follower: methods.Movement, lr: float = 0.1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for inputs, targets in batches_of(x) * steps:
        optimizer.zero_grad()
        by_classes(model(inputs), targets).backward()
        follower.update()
        optimizer.step()


def test_movement_without_steps_is_movement_of_the_batches() -> None:
    model, x = KINDS["conv2d"].ready(torch.float64)
    interspace(model, basis="dct")
    follower = methods.Movement(model)
    trained(model, x, 1, follower, lr=0.0)
    torch.testing.assert_close(values(follower.scores()), values(SCORES["movement"](model, x)))


def test_movement_says_how_squares_change_while_training() -> None:
    model, x = KINDS["conv2d"].ready(torch.float64)
    interspace(model, basis="dct")
    follower = methods.Movement(model)
    before = [layer.parameter.detach().clone() for layer in prunable_tensors(model)]
    trained(model, x, 20, follower, lr=1e-4)
    for layer, old, score in zip(prunable_tensors(model), before, values(follower.scores()), strict=True):
        # d(t^2) = -2 lr t dL/dt in each step, up to lr^2
        change = (layer.parameter.detach() ** 2 - old**2) / 2e-4
        torch.testing.assert_close(score, change, rtol=1e-2, atol=2e-3)


def test_movement_stopped_and_resumed_is_that_of_a_run_that_was_not(tmp_path: Path) -> None:
    model, x = mixed(torch.float32)
    model.eval()
    other = copy.deepcopy(model)
    through = methods.Movement(model)
    trained(model, x, 4, through)
    first = methods.Movement(other)
    trained(other, x, 2, first)
    torch.save(first.state_dict(), tmp_path / "movement.pt")
    resumed = methods.Movement(other)
    resumed.load_state_dict(torch.load(tmp_path / "movement.pt", weights_only=True))
    trained(other, x, 2, resumed)
    for ours, theirs in zip(values(resumed.scores()), values(through.scores()), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(*(list(each.state_dict().values())[1] for each in (first, resumed)))


def test_movement_goes_on_when_masks_come_and_leaves_out_what_has_no_gradient() -> None:
    model, x = mixed()
    follower = methods.Movement(model)
    trained(model, x, 1, follower)
    before = follower.scores()
    methods.apply_masks(model, methods.select(before, sparsity=0.5))
    after = follower.scores()
    assert list(after) == prunable(model) != list(before)
    assert sum(int((score == -math.inf).sum()) for score in values(after)) == sum(
        int((~mask).sum()) for mask in masks(model).values()
    )
    assert (values(after)[0][masks(model)["0"]] == 0).all()  # frozen
    trained(model, x, 1, follower)
    assert not torch.equal(values(follower.scores())[1], values(after)[1])


def test_a_saved_state_of_movement_does_not_move_on() -> None:
    model, x = KINDS["conv2d"].ready()
    follower = methods.Movement(model)
    trained(model, x, 1, follower)
    saved = follower.state_dict()
    before = [total.clone() for total in saved.values()]
    trained(model, x, 1, follower)
    assert all(torch.equal(a, b) for a, b in zip(saved.values(), before, strict=True))


def test_movement_refuses_the_state_of_another_model() -> None:
    follower = methods.Movement(nn.Sequential(nn.Linear(2, 2)))
    for state, message in (({"1": torch.zeros(2, 2)}, "'0', '1'"), ({"0": torch.zeros(2, 3)}, r"shape \(2, 3\)")):
        with pytest.raises(errors.MovementMismatchError, match=message):
            follower.load_state_dict(state)


# Wrappers


@every_score
def test_a_compiled_model_is_scored_and_does_not_compile_again(name: str) -> None:
    torch._dynamo.reset()
    model, x = KINDS["conv2d"].ready(torch.float64)
    interspace(model, basis="dct")
    expected = SCORES[name](model, x)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    compiled(x)
    compiled_once = counter.frame_count
    assert compiled_once > 0
    found = SCORES[name](compiled, x)
    assert list(found) == list(expected)
    torch.testing.assert_close(values(found), values(expected))
    compiled(x)
    assert counter.frame_count == compiled_once
    model.compile(backend=counter)
    torch.testing.assert_close(values(SCORES[name](model, x)), values(expected))
    assert counter.frame_count == compiled_once
    model(x)
    assert model._compiled_call_impl is not None
