"""Bases that need not be orthonormal: errors fall, and a basis that is known is found."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ip_plugin import dictionary
from ip_plugin.basis import make
from ip_plugin.coding import code
from ip_plugin.dictionary import improve
from ip_plugin.fitting import Kernels, fit, largest

SHAPES = [(3,), (1, 3), (3, 3), (5, 5), (7, 7), (3, 2, 2)]


def kernels(shape: tuple[int, ...], count: int = 200, seed: int = 0) -> Kernels:
    """Smooth kernels and noise, as trained ones are."""
    generator = torch.Generator().manual_seed(seed)
    n = math.prod(shape)
    mixing = torch.randn(n, n, generator=generator) * torch.linspace(2, 0.1, n)[:, None]
    return Kernels(torch.randn(count, n, generator=generator) @ mixing, 0, shape)


def error(parts: Sequence[Kernels], counts: Sequence[int], basis: Tensor) -> float:
    return sum(
        float((part.rows - code(part.rows, basis, count).coefficients @ basis.to(part.rows)).square().sum())
        for part, count in zip(parts, counts, strict=True)
    )


@pytest.mark.parametrize("density", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("shape", SHAPES)
def test_never_worse_than_the_start_and_mostly_better(shape: tuple[int, ...], density: float) -> None:
    part = kernels(shape)
    count = round(density * part.rows.numel())
    start = fit([part], largest(density)).bases[0]
    seen: list[tuple[int, float]] = []
    basis = improve([part], [count], start, round_done=lambda *each: seen.append(each))
    torch.testing.assert_close(basis.norm(dim=1), torch.ones(len(basis), dtype=torch.float64))
    before, after = error([part], [count], start), error([part], [count], basis)
    assert after <= before * (1 + 1e-6)
    assert all(later <= earlier for (_, earlier), (_, later) in itertools.pairwise(seen))
    assert [number for number, _ in seen] == list(range(1, len(seen) + 1))
    total = float(part.rows.square().sum())
    assert seen[0][1] == pytest.approx(math.sqrt(before / total), rel=1e-3)
    assert seen[-1][1] == pytest.approx(math.sqrt(after / total), rel=1e-3)
    if shape == (3, 3):
        assert after < 0.97 * before


def test_a_basis_that_kernels_were_made_of_is_found() -> None:
    """No orthonormal basis needs so few coefficients. One filter is taken for another here, which hardly matters."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=torch.float64)).Q
    hidden = hidden + 0.3 * torch.randn(9, 9, generator=generator, dtype=torch.float64)
    hidden = hidden / hidden.norm(dim=1, keepdim=True)
    sparse = torch.randn(1000, 9, generator=generator, dtype=torch.float64)
    sparse[torch.rand(1000, 9, generator=generator) > 0.2] = 0
    part, count = Kernels(sparse @ hidden, 0, (3, 3)), int((sparse != 0).sum())
    start = fit([part], largest(count / sparse.numel())).bases[0]
    basis = improve([part], [count], start)
    total = float(part.rows.square().sum())
    assert error([part], [count], start) > 0.01 * total
    assert error([part], [count], basis) < 1e-3 * total
    nearest = (basis @ hidden.mT).abs().max(dim=1).values  # up to order and signs
    assert nearest.sort().values[1] > 0.999


def test_layers_keep_their_counts() -> None:
    """One layer may keep everything: what the basis is then does not matter to it, and the other decides."""
    parts = [kernels((3, 3), seed=0), kernels((3, 3), seed=1)]
    counts = [parts[0].rows.numel(), 200]
    start = make("dct", (3, 3))
    basis = improve(parts, counts, start)
    assert error(parts[1:], counts[1:], basis) < error(parts[1:], counts[1:], start)
    assert error(parts[:1], counts[:1], basis) < 1e-6 * float(parts[0].rows.square().sum())


def test_the_gauge_of_the_start_does_not_matter() -> None:
    part, start = kernels((3, 3)), make("dct", (3, 3))
    scaled = start * torch.linspace(0.1, 30, 9)[:, None]
    torch.testing.assert_close(improve([part], [500], scaled), improve([part], [500], start))


def test_many_kernels_are_begun_on_a_sample_and_end_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    part, start = kernels((3, 3), 3000), make("dct", (3, 3))
    whole = improve([part], [5400], start)
    monkeypatch.setattr(dictionary, "_SAMPLE", 300)
    sampled = improve([part], [5400], start)
    assert not torch.equal(sampled, whole)
    assert error([part], [5400], sampled) < 1.05 * error([part], [5400], whole) < error([part], [5400], start)
    assert torch.equal(improve([part], [5400], start), sampled)
    assert not torch.equal(improve([part], [5400], start, seed=1), sampled)


def test_a_sample_that_misleads_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows but one are one-hot, so that the start is the best; the sample is that one row."""
    rows = torch.cat([torch.ones(1, 9), torch.eye(9).repeat(10, 1)])
    monkeypatch.setattr(dictionary, "sampled", lambda layers, seed, most: [Kernels(rows[:1], 0, (3, 3))])
    monkeypatch.setattr(dictionary, "_MOST_ROUNDS", 0)
    start = make("standard", (3, 3))
    assert torch.equal(improve([Kernels(rows, 0, (3, 3))], [91], start), start)


def test_extremes() -> None:
    part, start = kernels((3, 3)), make("dct", (3, 3))
    for rows, count in ((part.rows, 0), (part.rows, part.rows.numel()), (torch.zeros(4, 9), 7)):
        basis = improve([Kernels(rows, 0, (3, 3))], [count], start)
        assert basis.isfinite().all()
        if count != rows.numel():
            torch.testing.assert_close(basis, start)


def test_filters_that_come_too_near_to_each_other_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    part, start = kernels((3, 3)), make("dct", (3, 3))
    free = improve([part], [300], start)
    limit = float(torch.linalg.cond(free)) / 2
    monkeypatch.setattr("ip_plugin.basis.MAX_CONDITION", limit)
    assert float(torch.linalg.cond(improve([part], [300], start))) <= limit
