"""Dictionary learning: bases that need not be orthonormal, fitted to kernels with a given number of coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import bases
from .fitting import Kernels, nearest_orthonormal, sampled
from .sparse_coding import Code, code

#: The search ends when a round lowers the squared error by less than this fraction.
_TOLERANCE = 1e-4
_MOST_ROUNDS = 500
#: Ridge towards the present filters, relative to the second moment of the filter that is used most.
_PULL = 1e-12
#: The search also ends where only shorter steps than this would keep the filters well conditioned.
_SHORTEST = 1e-3


@dataclass(frozen=True)
class Dictionary:
    """The result of `learn`.

    Attributes:
        basis: ``(N, N)``, float64 on the CPU, filters at unit norm, well conditioned.
        codes: the sparse code of each layer.
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
    sample: int = 1 << 14,
    max_condition: float = 1e3,
    seed: int = 0,
    round_done: Callable[[int, float], None] = lambda number, error: None,  # noqa: ARG005
) -> Dictionary:
    """Learn a basis for layers that share it, and sparse codes of their kernels with given numbers of coefficients.

    Alternates between `code` of every layer and unit-norm filters by least squares (the method of optimal directions:
    Engan, Aase and Husoy 1999); steps towards those filters are lengthened while that helps. On the kernels that the
    search uses (a sample, if there are many), the error never exceeds that of the start. A good start is an
    orthonormal basis from `fit`.

    Args:
        layers: of one group.
        counts: number of coefficients of each layer.
        start: ``(N, N)``, finite. An ill-conditioned one is replaced by the nearest orthonormal basis.
        sample: number of kernels that the search uses.
        max_condition: largest condition number of the basis: by default, float32 codes are exact to about 1e-4.
            (Trained 3x3 kernels lead to 20 to 110.)
        seed: of the sample.
        round_done: called after each round with its number and the relative error of the sample.

    >>> kernels = Kernels(torch.tensor([[3.0, 4.0], [6.0, 8.0], [1.0, 0.0]]), 0, (2,))
    >>> learn([kernels], [3], torch.eye(2, dtype=torch.float64)).basis.abs()  # its second filter along (3, 4)
    tensor([[1.0000, 0.0000],
            [0.6000, 0.8000]], dtype=torch.float64)
    """
    some = sampled(layers, seed, sample)
    rates = [len(part.rows) / max(1, len(whole.rows)) for part, whole in zip(some, layers, strict=True)]
    fewer = [round(rate * count) for rate, count in zip(rates, counts, strict=True)]
    first = _well_conditioned(start.detach().to("cpu", torch.float64), max_condition)
    basis = _search(some, fewer, first, max_condition, round_done)
    codes = [code(layer.rows, basis, count) for layer, count in zip(layers, counts, strict=True)]
    return Dictionary(basis, codes, _error(layers, [layer_code.coefficients for layer_code in codes], basis))


def _search(
    layers: Sequence[Kernels],
    counts: Sequence[int],
    start: Tensor,
    max_condition: float,
    round_done: Callable[[int, float], None],
) -> Tensor:
    """Alternate until a round with the full step gains too little; the best basis."""
    total = sum(float(layer.rows.square().sum(dtype=torch.float64)) for layer in layers)
    best, step, rounds = start, 1.0, 1
    error, goal = _round(layers, counts, best)
    while rounds < _MOST_ROUNDS:
        round_done(rounds, math.sqrt(error / total) if total else 0.0)
        rounds += 1
        while _condition(candidate := _unit(best + step * (goal - best))) > max_condition and step > _SHORTEST:
            step /= 2
        if step <= _SHORTEST:
            break
        candidate_error, next_goal = _round(layers, counts, candidate)
        enough = candidate_error < error * (1 - _TOLERANCE)
        if candidate_error < error:
            error, goal, best = candidate_error, next_goal, candidate
        if not enough and step <= 1:
            break
        step = 2 * step if enough else 1.0
    return best


def _round(layers: Sequence[Kernels], counts: Sequence[int], basis: Tensor) -> tuple[float, Tensor]:
    """The squared error of the codes in a basis, and the best unit-norm filters for these codes."""
    codes = [code(layer.rows, basis, count).coefficients for layer, count in zip(layers, counts, strict=True)]
    moment, product = torch.zeros_like(basis), torch.zeros_like(basis)
    for layer, coefficients in zip(layers, codes, strict=True):
        moment += (coefficients.mT @ coefficients).double().cpu()
        product += (coefficients.mT @ layer.rows).double().cpu()
    # The ridge keeps filters that no kernel uses as they are.
    pull = _PULL * (float(moment.diagonal().max()) or 1.0) * torch.eye(len(basis), dtype=torch.float64, device="cpu")
    best = torch.linalg.solve(moment + pull, product + pull @ basis)
    return _error(layers, codes, basis), _unit(best)


def _error(layers: Sequence[Kernels], codes: Sequence[Tensor], basis: Tensor) -> float:
    return sum(
        float((layer.rows - coefficients @ basis.to(coefficients)).square_().sum(dtype=torch.float64))
        for layer, coefficients in zip(layers, codes, strict=True)
    )


def _unit(basis: Tensor) -> Tensor:
    unit: Tensor = basis / bases.norms(basis)[:, None]
    return unit


def _well_conditioned(start: Tensor, max_condition: float) -> Tensor:
    if bool((bases.norms(start) > 0).all()) and _condition(_unit(start)) <= max_condition:
        return _unit(start)
    return nearest_orthonormal(start)


def _condition(basis: Tensor) -> float:
    return float(torch.linalg.cond(basis))
