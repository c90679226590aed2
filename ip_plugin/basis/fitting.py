"""Fitted bases: bases in which given kernels need few coefficients. No data, no training.

For kernels, flattened, as rows of `W`, find an orthonormal basis `G` and coefficients `C` with few non-zeros such that
``||W - C G||`` is small, by turns: `C` keeps the largest entries of ``W G^T`` (the best choice, as `G` is orthonormal),
and `G` is the best orthonormal basis for that `C` (the Procrustes solution ``U V^T`` of the singular value
decomposition of ``C^T W``). The error never rises. Several bases and layers can be fitted for one common budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..utils.topk import keep_largest
from . import bases

#: Called with coefficients, a matrix for each layer; which of them to keep: bool tensors of their shapes. It must keep
#: those of largest magnitude within each part that has a budget of its own, or the error could rise.
Keep: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]

#: Rows of a layer group that the first rounds look at.
_SAMPLE = 1 << 15
#: How much earlier than the rounds on a sample those on all rows end.
_ON_ALL = 10
_MOST_ROUNDS = 2000


@dataclass(frozen=True)
class Kernels:
    """The kernels of one layer.

    Attributes:
        rows: ``(kernels, N)``, one flattened kernel a row.
        group: layers of one group share a basis; None for a layer that has none, whose rows are its coefficients.
        kernel: spatial shape, ``prod(kernel) == N``; unused without a group.
    """

    rows: Tensor
    group: int | None
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True)
class Fit:
    """What a fit found.

    Attributes:
        bases: by group, ``(N, N)``, float64 on the CPU, orthonormal.
        error: ``||W - C G||^2`` of all layers, those without a basis included.
        errors: after each round, of the start that won; first on a sample of the rows if there are many, then on all.
        start: which start won.
    """

    bases: dict[int, Tensor]
    error: float
    errors: tuple[float, ...]
    start: str


@torch.no_grad()
def fit(
    layers: Sequence[Kernels],
    keep: Keep,
    *,
    tolerance: float = 1e-6,
    seed: int = 0,
    round_done: Callable[[int, float], None] = lambda number, error: None,  # noqa: ARG005
) -> Fit:
    """Fit the bases of all groups at once.

    The error is never above that of magnitude pruning by the same `keep`: the standard basis is among the starts, which
    are besides the singular vectors of the kernels and the DCT.

    Args:
        layers: at least one with a group.
        keep: which coefficients are kept.
        tolerance: a start ends when a round lowers the error by less than this part of it; after a sample, the
            rounds on all kernels end at ten times as much.
        seed: of the sample.
        round_done: called after each round with its number and the relative error.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch...>
    >>> turned = torch.linalg.qr(torch.randn(4, 4)).Q
    >>> kernels = Kernels(torch.eye(4).repeat(50, 1) @ turned, 0, (2, 2))  # each is one filter of a basis
    >>> found = fit([kernels], largest(0.25))
    >>> found.error < 1e-6
    True
    """
    total = sum(float(each.rows.square().sum(dtype=torch.float64)) for each in layers)
    rounds = 0

    def watch(error: float) -> None:
        nonlocal rounds
        rounds += 1
        round_done(rounds, math.sqrt(max(0.0, error) / total) if total else 0.0)

    sample = sampled(layers, seed, _SAMPLE)
    found = [(name, *_descend(sample, keep, start, tolerance, watch)) for name, start in _starts(sample).items()]
    name, best, errors = min(found, key=lambda each: each[2][-1])
    if any(len(part.rows) < len(whole.rows) for part, whole in zip(sample, layers, strict=True)):
        best, more = _descend(layers, keep, best, _ON_ALL * tolerance, watch)
        standard = _identity(layers)
        if _kept(layers, keep, standard)[1] < more[-1]:  # the sample has misled
            name, (best, more) = "standard", _descend(layers, keep, standard, _ON_ALL * tolerance, watch)
        errors = [*errors, *more]
    return Fit(best, errors[-1], tuple(errors), name)


def kernel_rows(weight: Tensor) -> Tensor:
    """Kernels ``(out, in, *kernel)`` as rows ``(out * in, N)``, in float32 at least."""
    return weight.detach().flatten(2).flatten(0, 1).to(torch.promote_types(weight.dtype, torch.float32))


def largest(density: float) -> Keep:
    """Keep a share of the entries of all layers together: those of largest magnitude."""

    def keep(coefficients: Sequence[Tensor]) -> list[Tensor]:
        count = round(density * sum(each.numel() for each in coefficients))
        return keep_largest(coefficients, count, magnitudes=True)

    return keep


def sampled(layers: Sequence[Kernels], seed: int, most: int) -> list[Kernels]:
    """Equally many rows of a hundred of every layer, where a group has more than `most`."""
    sizes: dict[int | None, int] = {}
    for each in layers:
        sizes[each.group] = sizes.get(each.group, 0) + len(each.rows)
    largest_group = max((size for group, size in sizes.items() if group is not None), default=0)
    if largest_group <= most:
        return list(layers)
    rate = most / largest_group
    generator = torch.Generator().manual_seed(seed)
    found = []
    for each in layers:
        count = max(1, round(rate * len(each.rows)))
        chosen = torch.randperm(len(each.rows), generator=generator)[:count].sort().values
        found.append(Kernels(each.rows[chosen.to(each.rows.device)], each.group, each.kernel))
    return found


def _starts(layers: Sequence[Kernels]) -> dict[str, dict[int, Tensor]]:
    kernels = {each.group: each.kernel for each in layers if each.group is not None}
    moments: dict[int, Tensor] = {}
    for each in layers:
        if each.group is not None:
            moment = (each.rows.mT @ each.rows).double().cpu()
            moments[each.group] = moments.get(each.group, 0) + moment
    return {
        "standard": _identity(layers),
        "singular vectors": {group: torch.linalg.eigh(moment).eigenvectors.mT for group, moment in moments.items()},
        "dct": {group: bases.make("dct", kernel) for group, kernel in kernels.items()},
    }


def _identity(layers: Sequence[Kernels]) -> dict[int, Tensor]:
    return {each.group: bases.make("standard", each.kernel) for each in layers if each.group is not None}


def _coefficients(layers: Sequence[Kernels], found: dict[int, Tensor]) -> list[Tensor]:
    return [
        each.rows if each.group is None else bases.compose(each.rows[:, None], found[each.group].mT.to(each.rows))[:, 0]
        for each in layers
    ]


def _kept(layers: Sequence[Kernels], keep: Keep, found: dict[int, Tensor]) -> tuple[list[Tensor], float]:
    """The sparse coefficients (meaningless for layers without a basis), and the error: what was dropped."""
    coefficients = _coefficients(layers, found)
    error = 0.0
    for layer, each, mask in zip(layers, coefficients, keep(coefficients), strict=True):
        error += float(each.masked_fill(mask, 0).square_().sum(dtype=torch.float64))
        if layer.group is not None:
            each.mul_(mask)
    return coefficients, error


def _descend(
    layers: Sequence[Kernels], keep: Keep, start: dict[int, Tensor], tolerance: float, watch: Callable[[float], None]
) -> tuple[dict[int, Tensor], list[float]]:
    """Take turns until a round gains too little; the best bases and the errors, one for each round."""
    best = start
    sparse, error = _kept(layers, keep, best)
    errors = [error]
    watch(error)
    for _ in range(_MOST_ROUNDS):
        products: dict[int, Tensor] = {}
        for each, coefficients in zip(layers, sparse, strict=True):
            if each.group is not None:
                product = (coefficients.mT @ each.rows).double().cpu()
                products[each.group] = products.get(each.group, 0) + product
        found = {}
        for group, product in products.items():
            left, _, right = torch.linalg.svd(product)
            found[group] = left @ right
        sparse.clear()  # before the next ones are made
        sparse, error = _kept(layers, keep, found)
        watch(error)
        if not error < errors[-1] * (1 - tolerance):
            if error < errors[-1]:
                best, errors = found, [*errors, error]
            break
        best, errors = found, [*errors, error]
    return best, errors
