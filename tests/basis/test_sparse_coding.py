"""Sparse codes: exact counts, and the best subsets, against exhaustive search."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ip_plugin.basis.sparse_coding import code
from ip_plugin.utils.topk import keep_largest


def regular(n: int, generator: torch.Generator) -> Tensor:
    """A basis of unit-norm filters that are not orthogonal."""
    found = torch.randn(n, n, generator=generator, dtype=torch.float64) + 2 * torch.eye(n)
    return found / found.norm(dim=1, keepdim=True)


def explained(row: Tensor, filters: Tensor) -> float:
    """The energy of a kernel that some filters explain, by least squares."""
    if len(filters) == 0:
        return 0.0
    rest = row - torch.linalg.lstsq(filters.mT, row[:, None]).solution[:, 0] @ filters
    return float(row.square().sum() - rest.square().sum())


def best_error(rows: Tensor, basis: Tensor, count: int) -> float:
    """The smallest error of all codes with `count` coefficients, by exhaustive search."""
    n = len(basis)
    subsets = [list(itertools.combinations(range(n), size)) for size in range(n + 1)]
    best = [[max(explained(row, basis[list(some)]) for some in alike) for alike in subsets] for row in rows]
    most = max(
        sum(energies[size] for energies, size in zip(best, sizes, strict=True))
        for sizes in itertools.product(range(n + 1), repeat=len(rows))
        if sum(sizes) == count
    )
    return float(rows.square().sum()) - most


def error(rows: Tensor, basis: Tensor, count: int) -> float:
    found = code(rows, basis, count)
    assert int(found.mask.sum()) == count and not found.coefficients[~found.mask].any()
    return float((rows - found.coefficients @ basis.to(rows)).square().sum())


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 3))
def test_no_other_choice_is_better(seed: int, n: int, kernels: int) -> None:
    """The code is optimal for counts at which the convex hull of the smallest errors touches, close elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    basis, rows = regular(n, generator), torch.randn(kernels, n, generator=generator, dtype=torch.float64)
    errors = [error(rows, basis, count) for count in range(n * kernels + 1)]
    best = [best_error(rows, basis, count) for count in range(n * kernels + 1)]
    slack = 1e-9 * float(rows.square().sum())
    corners = [count for count in range(len(best)) if is_corner(best, count)]
    for count, (found, least) in enumerate(zip(errors, best, strict=True)):
        assert found == pytest.approx(least, abs=slack) if count in corners else found >= least - slack
        assert found <= best[max(each for each in corners if each <= count)] + slack


def is_corner(errors: list[float], place: int) -> bool:
    """Whether the convex minorant of a sequence has a vertex at an index."""
    before = [(errors[place] - errors[other]) / (place - other) for other in range(place)]
    behind = [(errors[other] - errors[place]) / (other - place) for other in range(place + 1, len(errors))]
    return not before or not behind or max(before) < min(behind) - 1e-9


@pytest.mark.parametrize("n", [3, 9, 10, 25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_an_orthonormal_basis_the_largest_are_the_best(n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    rows = torch.randn(50, n, generator=generator, dtype=dtype)
    found = code(rows, basis, 20 * n)
    products = rows @ basis.mT.to(dtype)
    assert torch.equal(found.mask, keep_largest([products], 20 * n, magnitudes=True)[0])
    torch.testing.assert_close(found.coefficients, products * found.mask, atol=1e-5, rtol=1e-4)


def test_two_filters_that_only_help_together() -> None:
    # (0, 1) is 10 times the difference of two nearly equal filters; neither of them alone explains much of it.
    basis = torch.tensor([[1.0, 0.0, 0.0], [0.995, 0.0998749, 0.0], [0.0, 0.0, 1.0]])
    rows = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.5]])
    assert code(rows, basis, 2).mask.tolist() == [[True, True, False], [False, False, False]]
    assert code(rows, basis, 3).mask.tolist() == [[True, True, False], [False, False, True]]


@pytest.mark.parametrize("n", [16, 25])
def test_filters_one_after_the_other(n: int) -> None:
    """Against a slow greedy search for one kernel: least squares with each further filter."""
    generator = torch.Generator().manual_seed(n)
    basis, row = regular(n, generator), torch.randn(n, generator=generator, dtype=torch.float64)
    chosen: list[int] = []
    for count in range(1, n + 1):
        chosen.append(max(set(range(n)) - set(chosen), key=lambda each: explained(row, basis[[*chosen, each]])))
        found = code(row[None], basis, count)
        assert found.mask[0].nonzero().flatten().tolist() == sorted(chosen)
        expected = torch.linalg.lstsq(basis[sorted(chosen)].mT, row[:, None]).solution[:, 0]
        torch.testing.assert_close(found.coefficients[0, sorted(chosen)], expected)


@pytest.mark.parametrize("n", [1, 9, 12])
def test_kernels_of_zeros_and_extremes(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = regular(n, generator)
    zeros, rows = torch.zeros(5, n), torch.randn(5, n, generator=generator)
    for count in (0, 1, n, 5 * n):
        found = code(zeros, basis, count)
        assert int(found.mask.sum()) == count and not found.coefficients.any()
    assert error(rows, basis, 0) == pytest.approx(float(rows.square().sum()))
    assert error(rows, basis, 5 * n) == pytest.approx(0, abs=1e-8)
    assert code(rows[:0], basis, 0).coefficients.shape == (0, n)


@pytest.mark.parametrize("n", [9, 12])
def test_many_kernels_are_coded_as_few_are(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    basis, rows = regular(n, generator), torch.randn(100, n, generator=generator)
    whole = code(rows, basis, 300)
    parts = code(rows, basis, 300, rows_at_once=7)
    assert torch.equal(parts.mask, whole.mask)
    torch.testing.assert_close(parts.coefficients, whole.coefficients)
