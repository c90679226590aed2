"""Dictionary learning: errors fall, and known bases are recovered."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ip_plugin.basis.bases import make
from ip_plugin.basis.dictionary import Dictionary, learn
from ip_plugin.basis.fitting import Kernels, fit, largest
from ip_plugin.basis.sparse_coding import code

SHAPES = [(3,), (1, 3), (3, 3), (5, 5), (7, 7), (3, 2, 2)]


def kernels(shape: tuple[int, ...], count: int = 200, seed: int = 0) -> Kernels:
    """Smooth kernels with noise, similar to trained ones."""
    generator = torch.Generator().manual_seed(seed)
    n = math.prod(shape)
    mixing = torch.randn(n, n, generator=generator) * torch.linspace(2, 0.1, n)[:, None]
    return Kernels(torch.randn(count, n, generator=generator) @ mixing, 0, shape)


def error(parts: Sequence[Kernels], counts: Sequence[int], basis: Tensor) -> float:
    """The squared error of the codes in a basis."""
    codes = [code(part.rows, basis, count) for part, count in zip(parts, counts, strict=True)]
    return written_error(parts, Dictionary(basis, codes, 0))


def written_error(parts: Sequence[Kernels], found: Dictionary) -> float:
    """The squared error by composing and subtracting."""
    return sum(
        float((part.rows - each.coefficients @ found.basis.to(part.rows)).square().sum())
        for part, each in zip(parts, found.codes, strict=True)
    )


@pytest.mark.parametrize(("shape", "density"), [((3, 3), 0.1), ((3, 3), 0.7), *((shape, 0.3) for shape in SHAPES)])
def test_never_worse_than_the_start_and_mostly_better(shape: tuple[int, ...], density: float) -> None:
    part = kernels(shape)
    count = round(density * part.rows.numel())
    start = fit([part], largest(density)).bases[0]
    seen: list[tuple[int, float]] = []
    found = learn([part], [count], start, round_done=lambda *each: seen.append(each))
    torch.testing.assert_close(found.basis.norm(dim=1), torch.ones(len(start), dtype=torch.float64))
    assert int(found.codes[0].mask.sum()) == count
    assert found.error == pytest.approx(written_error([part], found), rel=1e-4)
    before = error([part], [count], start)
    assert found.error <= before * (1 + 1e-6)
    assert all(later <= earlier for (_, earlier), (_, later) in itertools.pairwise(seen))
    assert [number for number, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[0][1] == pytest.approx(math.sqrt(before / float(part.rows.square().sum())), rel=1e-3)
    if shape == (3, 3):
        assert found.error < 0.97 * before


def test_a_basis_that_kernels_were_made_of_is_found() -> None:
    """No orthonormal basis needs so few coefficients. A few codes use a wrong filter, which hardly matters."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=torch.float64)).Q
    hidden = hidden + 0.3 * torch.randn(9, 9, generator=generator, dtype=torch.float64)
    hidden = hidden / hidden.norm(dim=1, keepdim=True)
    sparse = torch.randn(1000, 9, generator=generator, dtype=torch.float64)
    sparse[torch.rand(1000, 9, generator=generator) > 0.2] = 0
    part, count = Kernels(sparse @ hidden, 0, (3, 3)), int((sparse != 0).sum())
    start = fit([part], largest(count / sparse.numel())).bases[0]
    found = learn([part], [count], start)
    total = float(part.rows.square().sum())
    assert error([part], [count], start) > 0.01 * total
    assert found.error < 1e-3 * total
    nearest = (found.basis @ hidden.mT).abs().max(dim=1).values  # up to order and signs
    assert nearest.sort().values[1] > 0.999


def test_layers_keep_their_counts() -> None:
    """If one layer keeps everything, its error is zero in any basis, so the other layer determines the basis."""
    parts = [kernels((3, 3), seed=0), kernels((3, 3), seed=1)]
    counts = [parts[0].rows.numel(), 200]
    start = make("dct", (3, 3))
    found = learn(parts, counts, start)
    assert [int(each.mask.sum()) for each in found.codes] == counts
    assert found.error < error(parts[1:], counts[1:], start)
    assert error(parts[:1], counts[:1], found.basis) < 1e-6 * float(parts[0].rows.square().sum())


def test_the_gauge_of_the_start_does_not_matter() -> None:
    part, start = kernels((3, 3)), make("dct", (3, 3))
    scaled = start * torch.linspace(0.1, 30, 9)[:, None]
    torch.testing.assert_close(learn([part], [500], scaled).basis, learn([part], [500], start).basis)


def test_many_kernels_are_begun_on_a_sample_and_end_on_all() -> None:
    part, start = kernels((3, 3), 3000), make("dct", (3, 3))
    whole = learn([part], [5400], start)
    sampled = learn([part], [5400], start, sample=300)
    assert not torch.equal(sampled.basis, whole.basis)
    assert sampled.codes[0].mask.shape == (3000, 9) and int(sampled.codes[0].mask.sum()) == 5400
    assert sampled.error == pytest.approx(written_error([part], sampled), rel=1e-4)
    assert sampled.error < 1.15 * whole.error < error([part], [5400], start)
    assert torch.equal(learn([part], [5400], start, sample=300).basis, sampled.basis)
    assert not torch.equal(learn([part], [5400], start, sample=300, seed=1).basis, sampled.basis)


def test_extremes() -> None:
    part, start = kernels((3, 3)), make("dct", (3, 3))
    for rows, count in ((part.rows, 0), (part.rows, part.rows.numel()), (torch.zeros(4, 9), 7)):
        found = learn([Kernels(rows, 0, (3, 3))], [count], start)
        assert found.basis.isfinite().all() and int(found.codes[0].mask.sum()) == count
        if count != rows.numel():
            torch.testing.assert_close(found.basis, start)
    assert learn([Kernels(part.rows[:0], 0, (3, 3))], [0], start).error == 0


def test_filters_that_come_too_near_to_each_other_are_not_taken() -> None:
    part, start = kernels((3, 3)), make("dct", (3, 3))
    limit = float(torch.linalg.cond(learn([part], [300], start).basis)) / 2
    assert float(torch.linalg.cond(learn([part], [300], start, max_condition=limit).basis)) <= limit


@pytest.mark.parametrize("shape", [(3, 3), (5, 5)])
def test_a_start_that_is_ill_conditioned_is_replaced(shape: tuple[int, ...]) -> None:
    part, good = kernels(shape), make("dct", shape)
    start = good.clone()
    start[1] = start[0] + 1e-9 * start[1]
    dead = good.clone()
    dead[0] = 0
    wanted = learn([part], [len(part.rows)], good).error
    for each in (start, dead):
        found = learn([part], [len(part.rows)], each)
        assert float(torch.linalg.cond(found.basis)) < 1e3
        assert found.error < 1.2 * wanted


@pytest.mark.parametrize("shape", [(3, 3), (5, 5)])
def test_codes_are_as_exact_as_the_condition_allows(shape: tuple[int, ...]) -> None:
    """Two filters at the angle that gives the largest condition number allowed."""
    part, basis = kernels(shape), make("dct", shape)
    basis[1] = basis[0] + 2e-3 * basis[1]
    basis = basis / basis.norm(dim=1, keepdim=True)
    assert 900 < float(torch.linalg.cond(basis)) <= 1e3 + 1
    rest = part.rows - code(part.rows, basis, part.rows.numel()).coefficients @ basis.float()
    assert float(rest.square().sum()) < 1e-4 * float(part.rows.square().sum())
