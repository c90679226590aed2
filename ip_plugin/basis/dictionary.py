"""Bases that need not be orthonormal, fitted to kernels of which each layer keeps a given number of coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import bases
from .fitting import Kernels, sampled
from .sparse_coding import Code, code

#: Rows that the search looks at; it ends when a round lowers the squared error by less than this part of it.
_SAMPLE = 1 << 14
_TOLERANCE = 1e-4
_MOST_ROUNDS = 500
#: How much a filter is worth where it is, as a part of what the filter that is used most is worth to the kernels.
_PULL = 1e-12
#: Codes of float32 kernels are exact to about 1e-4 then. What is found has 20 to 110 for trained 3x3 kernels.
_MOST_CONDITION = 1e3
#: The search ends, too, where only shorter steps than this leave the filters well conditioned.
_SHORTEST = 1e-3


@dataclass(frozen=True)
class Dictionary:
    """What `learn` found.

    Attributes:
        basis: ``(N, N)``, float64 on the CPU, filters at unit norm, well conditioned.
        codes: of each layer, with as many coefficients as it keeps.
        error: ``||W - C G||^2`` of all layers.
    """

    basis: Tensor
    codes: list[Code]
    error: float


@torch.no_grad()
def learn(
    layers: Sequence[Kernels],
    counts: Sequence[int],
    start: Tensor,
    *,
    seed: int = 0,
    round_done: Callable[[int, float], None] = lambda number, error: None,  # noqa: ARG005
) -> Dictionary:
    """A basis in which layers that share it lose little with so many coefficients, and these coefficients.

    By turns: `code` of every layer, and filters by least squares, at unit norm (the method of optimal directions:
    Engan, Aase and Husoy 1999); steps towards those filters are lengthened while that helps. The error is never above
    that of the start, on the sample of kernels that is looked at where there are many. A good start is
    orthonormal and fitted (`fit`).

    Args:
        layers: of one group.
        counts: how many coefficients each layer keeps.
        start: ``(N, N)``, finite. One that is ill-conditioned is replaced by the orthonormal one that is nearest to it.
        seed: of the sample.
        round_done: called after each round with its number and the relative error of what was looked at.

    >>> kernels = Kernels(torch.tensor([[3.0, 4.0], [6.0, 8.0], [1.0, 0.0]]), 0, (2,))
    >>> learn([kernels], [3], torch.eye(2, dtype=torch.float64)).basis.abs()  # its second filter along (3, 4)
    tensor([[1.0000, 0.0000],
            [0.6000, 0.8000]], dtype=torch.float64)
    """
    some = sampled(layers, seed, _SAMPLE)
    rates = [len(part.rows) / max(1, len(whole.rows)) for part, whole in zip(some, layers, strict=True)]
    fewer = [round(rate * count) for rate, count in zip(rates, counts, strict=True)]
    basis = _searched(some, fewer, _well_conditioned(start.detach().to("cpu", torch.float64)), round_done)
    codes = [code(layer.rows, basis, count) for layer, count in zip(layers, counts, strict=True)]
    return Dictionary(basis, codes, _error(layers, [each.coefficients for each in codes], basis))


def _searched(
    layers: Sequence[Kernels], counts: Sequence[int], start: Tensor, round_done: Callable[[int, float], None]
) -> Tensor:
    """Take turns until a plain round gains too little."""
    total = sum(float(each.rows.square().sum(dtype=torch.float64)) for each in layers)
    best, step, rounds = start, 1.0, 1
    error, goal = _round(layers, counts, best)
    while rounds < _MOST_ROUNDS:
        round_done(rounds, math.sqrt(error / total) if total else 0.0)
        rounds += 1
        while not _is_regular(candidate := _unit(best + step * (goal - best))) and step > _SHORTEST:
            step /= 2
        if step <= _SHORTEST:
            break
        found, following = _round(layers, counts, candidate)
        enough = found < error * (1 - _TOLERANCE)
        if found < error:
            error, goal, best = found, following, candidate
        if not enough and step <= 1:
            break
        step = 2 * step if enough else 1.0
    return best


def _round(layers: Sequence[Kernels], counts: Sequence[int], basis: Tensor) -> tuple[float, Tensor]:
    """The squared error in a basis, and the filters that would be best for these codes, at unit norm."""
    codes = [code(layer.rows, basis, count).coefficients for layer, count in zip(layers, counts, strict=True)]
    moment, product = torch.zeros_like(basis), torch.zeros_like(basis)
    for layer, coefficients in zip(layers, codes, strict=True):
        moment += (coefficients.mT @ coefficients).double().cpu()
        product += (coefficients.mT @ layer.rows).double().cpu()
    # Filters that no kernel uses stay where they are.
    most = float(moment.diagonal().max())
    pull = _PULL * (most or 1.0) * torch.eye(len(basis), dtype=torch.float64, device="cpu")
    best = torch.linalg.solve(moment + pull, product + pull @ basis)
    return _error(layers, codes, basis), _unit(best)


def _error(layers: Sequence[Kernels], codes: Sequence[Tensor], basis: Tensor) -> float:
    return sum(
        float((layer.rows - coefficients @ basis.to(coefficients)).square_().sum(dtype=torch.float64))
        for layer, coefficients in zip(layers, codes, strict=True)
    )


def _unit(basis: Tensor) -> Tensor:
    found: Tensor = basis / bases.norms(basis)[:, None]
    return found


def _well_conditioned(start: Tensor) -> Tensor:
    lengths = bases.norms(start)
    if bool((lengths > 0).all()) and _is_regular(_unit(start)):
        return _unit(start)
    left, _, right = torch.linalg.svd(start)
    nearest: Tensor = left @ right
    return nearest


def _is_regular(basis: Tensor) -> bool:
    return float(torch.linalg.cond(basis)) <= _MOST_CONDITION
