"""Bases that need not be orthonormal, fitted to kernels whose numbers of coefficients are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import basis as bases
from .coding import code
from .errors import InvalidBasisError
from .fitting import Kernels, sampled

#: Rows that the first rounds look at, and the part of the error by which a round must lower it there, and on all.
_SAMPLE = 1 << 13
_TOLERANCES = 1e-4, 1e-3
_MOST_ROUNDS = 500


@torch.no_grad()
def improve(
    layers: Sequence[Kernels],
    counts: Sequence[int],
    start: Tensor,
    *,
    seed: int = 0,
    round_done: Callable[[int, float], None] = lambda number, error: None,  # noqa: ARG005
) -> Tensor:
    """A basis in which layers that share it lose less with as many coefficients as each has.

    By turns: `ip_plugin.coding.code` of every layer, and filters by least squares, at unit norm (the method of optimal
    directions: Engan, Aase and Husoy 1999); steps towards those filters are lengthened while that helps. The error is
    never above that of the start; an orthonormal fitted one (`ip_plugin.fitting.fit`) is a good start.

    Args:
        layers: of one kernel shape; what their `group` is does not matter.
        counts: how many coefficients each layer keeps.
        start: ``(N, N)``, regular.
        seed: of the sample of kernels that is looked at first where there are many.
        round_done: called after each round with its number and the relative error.

    Returns:
        The basis, ``(N, N)``, float64 on the CPU, filters at unit norm, as well conditioned as `interspace` asks.

    >>> kernels = Kernels(torch.tensor([[3.0, 4.0], [6.0, 8.0], [1.0, 0.0]]), 0, (2,))
    >>> improve([kernels], [3], torch.eye(2, dtype=torch.float64))
    tensor([[1.0000, 0.0000],
            [0.6000, 0.8000]], dtype=torch.float64)
    """
    total = sum(float(each.rows.square().sum(dtype=torch.float64)) for each in layers)

    rounds = 0

    def watch(error: float) -> None:
        nonlocal rounds
        rounds += 1
        round_done(rounds, math.sqrt(error / total) if total else 0.0)

    basis = start.detach().to("cpu", torch.float64)
    basis = basis / bases.norms(basis)[:, None]
    some = sampled(layers, seed, _SAMPLE)
    rates = [len(part.rows) / len(whole.rows) for part, whole in zip(some, layers, strict=True)]
    fewer = [round(rate * count) for rate, count in zip(rates, counts, strict=True)]
    for_sample = _descend(some, fewer, [basis], _TOLERANCES[0], watch)
    if min(rates) == 1:
        return for_sample
    return _descend(layers, counts, [basis, for_sample], _TOLERANCES[1], watch)


def _descend(
    layers: Sequence[Kernels], counts: Sequence[int], starts: Sequence[Tensor], tolerance: float,
    watch: Callable[[float], None],
) -> Tensor:  # fmt: skip
    """From the better start, take turns until a plain round gains too little."""
    coded = [(*_coded(layers, counts, each), each) for each in starts]
    error, goal, best = min(coded, key=lambda each: each[0])
    step = 1
    for _ in range(_MOST_ROUNDS):
        watch(error)
        candidate = best + step * (goal - best)
        candidate /= bases.norms(candidate)[:, None]
        found, following = _coded(layers, counts, candidate) if _is_regular(candidate) else (math.inf, goal)
        enough = found < error * (1 - tolerance)
        if found < error:
            error, goal, best = found, following, candidate
        if not enough and step == 1:
            break
        step = 2 * step if enough else 1
    return best


def _is_regular(basis: Tensor) -> bool:
    try:
        bases.check_condition(basis)
    except InvalidBasisError:
        return False
    return True


def _coded(layers: Sequence[Kernels], counts: Sequence[int], basis: Tensor) -> tuple[float, Tensor]:
    """The squared error in a basis, and the basis that would be best for these codes."""
    n = len(basis)
    error, moment, product = 0.0, torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    for layer, count in zip(layers, counts, strict=True):
        coefficients = code(layer.rows, basis, count).coefficients
        rest = layer.rows - coefficients @ basis.to(coefficients)
        error += float(rest.square().sum(dtype=torch.float64))
        moment += (coefficients.mT @ coefficients).double().cpu()
        product += (coefficients.mT @ layer.rows).double().cpu()
    used = moment.diagonal() > 0
    found = basis.clone()
    found[used] = torch.linalg.lstsq(moment[used][:, used], product[used]).solution
    return error, found / bases.norms(found)[:, None]
