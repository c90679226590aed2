"""Fitted bases: errors fall, never exceed those of magnitude pruning, and known bases are recovered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ip_plugin import interspace
from ip_plugin.basis.fitting import Fit, Kernels, fit, largest, sampled
from ip_plugin.core.tensor_ref import prunable_tensors
from ip_plugin.errors import AmountError, ArgumentError, BasisError

SHAPES = [(3,), (1, 3), (2, 2), (3, 3), (5, 5), (7, 7), (3, 2, 2)]


def kernels(shape: tuple[int, ...], count: int = 200, seed: int = 0, group: int | None = 0) -> Kernels:
    """Smooth kernels with noise, similar to trained ones."""
    generator = torch.Generator().manual_seed(seed)
    n = math.prod(shape)
    mixing = torch.randn(n, n, generator=generator) * torch.linspace(2, 0.1, n)[:, None]
    return Kernels(torch.randn(count, n, generator=generator) @ mixing, group, shape)


def error_of(parts: Sequence[Kernels], found: Fit, density: float) -> float:
    """The squared error by keeping the largest coefficients, composing and subtracting."""
    coefficients = [p.rows.double() if p.group is None else p.rows.double() @ found.bases[p.group].mT for p in parts]
    everything = torch.cat([c.abs().flatten() for c in coefficients])
    count = round(density * len(everything))
    least = everything.sort(descending=True).values[count - 1] if count else math.inf
    total = 0.0
    for part, c in zip(parts, coefficients, strict=True):
        sparse = c * (c.abs() >= least)
        composed = sparse if part.group is None else sparse @ found.bases[part.group]
        total += float((part.rows - composed).square().sum())
    return total


def magnitude_error(parts: Sequence[Kernels], density: float) -> float:
    values = torch.cat([p.rows.flatten() for p in parts]).square().sort(descending=True).values
    return float(values[round(density * len(values)) :].sum())


@pytest.mark.parametrize("density", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("shape", SHAPES)
def test_bases_are_orthonormal_and_better_than_the_standard_basis(shape: tuple[int, ...], density: float) -> None:
    part = kernels(shape)
    found = fit([part], largest(density))
    basis = found.bases[0]
    torch.testing.assert_close(basis @ basis.mT, torch.eye(len(basis), dtype=torch.float64))
    assert found.error == pytest.approx(error_of([part], found, density), rel=1e-4)
    assert found.error < 0.9 * magnitude_error([part], density)
    assert all(later <= earlier for earlier, later in zip(found.errors, found.errors[1:], strict=False))


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10**6), st.sampled_from(SHAPES), st.integers(0, 50), st.integers(1, 40), st.booleans())
def test_never_worse_than_magnitude_pruning(
    seed: int, shape: tuple[int, ...], fiftieths: int, count: int, trained: bool
) -> None:
    density = fiftieths / 50  # hypothesis makes no floats where a compiler has turned denormal numbers off
    part = kernels(shape, count, seed)
    if not trained:
        generator = torch.Generator().manual_seed(seed)
        part = Kernels(torch.randn(part.rows.shape, generator=generator), 0, shape)
    found = fit([part, Kernels(torch.randn(7, 1), None)], largest(density))
    total = float(part.rows.square().sum())
    assert found.error <= magnitude_error([part, Kernels(torch.zeros(7, 1), None)], density) + 50 + 1e-5 * total
    alone = fit([part], largest(density))
    assert alone.error <= magnitude_error([part], density) + 1e-5 * total


def test_a_basis_that_kernels_were_made_of_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=torch.float64)).Q
    sparse = torch.randn(500, 9, generator=generator, dtype=torch.float64)
    sparse[torch.rand(500, 9, generator=generator) > 0.2] = 0
    density = float((sparse != 0).double().mean())
    found = fit([Kernels(sparse @ hidden, 0, (3, 3))], largest(density), tolerance=1e-12)
    assert found.error < 1e-12 * float(sparse.square().sum())
    assert (found.bases[0] @ hidden.mT).abs().max(dim=1).values.min() > 1 - 1e-6  # up to order and signs


def test_two_kernels_by_hand() -> None:
    # Rows (1, 1) and (1, -1) need two coefficients each in the standard basis, one each in the Hadamard basis.
    rows = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    found = fit([Kernels(rows, 0, (2,))], largest(0.5))
    assert found.error == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(found.bases[0].abs(), torch.full((2, 2), math.sqrt(0.5), dtype=torch.float64))


def test_groups_and_layers_without_a_basis_share_one_budget() -> None:
    strong, weak, linear = kernels((3, 3), group=0), kernels((2, 2), seed=1, group=1), kernels((1,), seed=2, group=None)
    parts = [strong, Kernels(0.01 * weak.rows, 1, (2, 2)), Kernels(3 * linear.rows, None)]
    found = fit(parts, largest(0.2))
    assert found.bases.keys() == {0, 1} and found.bases[1].shape == (4, 4)
    assert found.error == pytest.approx(error_of(parts, found, 0.2), rel=1e-4)
    # The weak layer keeps nothing, so its basis does not matter.
    assert found.error > float(parts[1].rows.square().sum()) * 0.99


def test_layers_that_share_are_fitted_together() -> None:
    parts = [kernels((3, 3), seed=0), kernels((3, 3), seed=1)]
    found = fit(parts, largest(0.3))
    together = fit([Kernels(torch.cat([p.rows for p in parts]), 0, (3, 3))], largest(0.3))
    torch.testing.assert_close(found.bases[0].abs(), together.bases[0].abs(), atol=1e-5, rtol=1e-4)


def test_many_kernels_are_begun_on_a_sample_and_end_on_all() -> None:
    part = kernels((3, 3), 3000)
    whole = fit([part], largest(0.2))
    seen: list[tuple[int, float]] = []
    sampled = fit([part], largest(0.2), sample=300, round_done=lambda number, error: seen.append((number, error)))
    assert sampled.error == pytest.approx(error_of([part], sampled, 0.2), rel=1e-4)
    assert sampled.error < 1.02 * whole.error
    assert [number for number, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][1] == pytest.approx(math.sqrt(sampled.error / float(part.rows.square().sum())), rel=1e-2)
    assert torch.equal(fit([part], largest(0.2), sample=300).bases[0], sampled.bases[0])
    assert not torch.equal(fit([part], largest(0.2), sample=300, seed=1).bases[0], sampled.bases[0])


def test_a_sample_that_misleads_does_no_harm() -> None:
    """All rows but one are one-hot, so the standard basis is the best; the sample is the other row."""
    rows = torch.cat([torch.ones(1, 9), torch.eye(9).repeat(10, 1)])
    part = Kernels(rows, 0, (3, 3))
    seed = next(seed for seed in range(1000) if bool((sampled([part], seed, 1)[0].rows == 1).all()))
    found = fit([part], largest(1 / 9), sample=1, most_rounds=0, seed=seed)
    assert found.start == "standard" and found.error <= magnitude_error([part], 1 / 9) * (1 + 1e-5)


def test_extremes() -> None:
    part = kernels((3, 3))
    assert fit([part], largest(1.0)).error == pytest.approx(0, abs=1e-3)
    assert fit([part], largest(0.0)).error == pytest.approx(float(part.rows.square().sum()), rel=1e-6)
    assert fit([Kernels(torch.zeros(4, 9), 0, (3, 3))], largest(0.5)).error == 0


# interspace(basis="fitted")


@pytest.mark.parametrize("sharing", ["layer", "model"])
def test_a_model_in_fitted_bases_computes_the_same_and_has_fewer_large_coefficients(sharing: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        for conv in (model[0], model[2]):
            conv.weight.copy_(kernels((3, 3), conv.weight.numel() // 9).rows.reshape(conv.weight.shape))
    x = torch.randn(1, 3, 8, 8)
    expected = model(x)
    dropped = [smallest(layer.parameter) for layer in prunable_tensors(model)]
    interspace(model, basis="fitted", sparsity=0.8, sharing=sharing)
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    for layer, before in zip(prunable_tensors(model), dropped, strict=True):
        assert layer.mask is None and smallest(layer.parameter) < 0.8 * before
    assert model[0].parametrizations.weight[0].basis.requires_grad


def smallest(values: Tensor) -> float:
    """The squared norm of the smallest 80 %."""
    ranked = values.detach().flatten().square().sort().values
    return float(ranked[: round(0.8 * len(ranked))].sum())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"basis": "fitted"}, ArgumentError, "belong together"),
        ({"basis": "dct", "sparsity": 0.5}, ArgumentError, "'dct' and sparsity 0.5"),
        ({"basis": "fitted", "sparsity": 1.5}, AmountError, "1.5"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    model = nn.Conv2d(3, 4, 3)
    with pytest.raises(error, match=text):
        interspace(model, **options)
    assert type(model) is nn.Conv2d and not hasattr(model, "parametrizations")


def test_a_model_on_the_meta_device_has_no_kernels() -> None:
    with torch.device("meta"):
        model = nn.Conv2d(3, 4, 3)
    with pytest.raises(BasisError, match="must have kernels to be fitted to"):
        interspace(model, basis="fitted", sparsity=0.5)
