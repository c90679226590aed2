"""Fitted bases: orthonormal bases in which given kernels are sparse. No data, no training.

With flattened kernels as rows of `W`, `fit` finds an orthonormal basis `G` and coefficients `C` with few non-zeros that
make ``||W - C G||`` small. It alternates: `C` keeps the largest entries of ``W G^T`` (the best choice for an
orthonormal `G`), and `G` is the best orthonormal basis for that `C` (the Procrustes solution ``U V^T``, from the
singular value decomposition of ``C^T W``). The error never rises. Several bases can be fitted for one common budget.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..utils.topk import keep_largest
from . import bases

#: Takes the coefficients, one matrix for each layer, and returns masks of what to keep. Within whatever shares a budget
#: it must keep the largest magnitudes, or the error could rise.
Keep: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]
_Descent: TypeAlias = tuple[dict[int, Tensor], list[float]]

#: Factor of the tolerance for the rounds on all kernels after those on a sample.
_ON_ALL = 10


@dataclass(frozen=True)
class Kernels:
    """The kernels of one layer.

    Attributes:
        rows: ``(kernels, N)``, one flattened kernel per row.
        group: layers of one group share a basis; None for a spatial layer, whose rows are its coefficients.
        kernel: spatial shape, ``prod(kernel) == N``; unused without a group.
    """

    rows: Tensor
    group: int | None
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True)
class Fit:
    """The result of `fit`.

    Attributes:
        bases: by group, ``(N, N)``, float64 on the CPU, orthonormal.
        error: ``||W - C G||^2`` of all layers, including those without a basis.
        errors: error after each round from the best start: on a sample first, if there are many kernels, then on all.
        start: name of the best start.
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
    sample: int = 1 << 15,
    most_rounds: int = 2000,
    seed: int = 0,
    round_done: Callable[[int, float], None] = lambda number, error: None,  # noqa: ARG005
) -> Fit:
    """Fit the bases of all groups together.

    Starts from the standard basis, the singular vectors of the kernels and the DCT, and returns the best result. So the
    error never exceeds that of magnitude pruning with the same `keep`.

    Args:
        layers: at least one with a group.
        keep: selects the coefficients to keep.
        tolerance: stop when a round lowers the error by less than this fraction; in the rounds on all kernels that
            follow those on a sample, ten times as much.
        sample: number of kernels of the largest group in the first rounds.
        most_rounds: of each start.
        seed: of the sample.
        round_done: called after each round with its number and the relative error.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch...>
    >>> basis = torch.linalg.qr(torch.randn(4, 4)).Q
    >>> kernels = Kernels(torch.eye(4).repeat(50, 1) @ basis, 0, (2, 2))  # each is one filter of the basis
    >>> fit([kernels], largest(0.25)).error < 1e-6
    True
    """
    total = sum(float(layer.rows.square().sum(dtype=torch.float64)) for layer in layers)
    rounds = itertools.count(1)

    def watch(error: float) -> None:
        round_done(next(rounds), math.sqrt(max(0.0, error) / total) if total else 0.0)

    def descend(some: Sequence[Kernels], start: dict[int, Tensor], tolerance: float) -> _Descent:
        return _descend(some, keep, start, tolerance, most_rounds, watch)

    some = sampled(layers, seed, sample)
    results = [(name, *descend(some, start, tolerance)) for name, start in _starts(some).items()]
    name, best, errors = min(results, key=lambda result: result[2][-1])
    if any(len(part.rows) < len(whole.rows) for part, whole in zip(some, layers, strict=True)):
        best, more = descend(layers, best, _ON_ALL * tolerance)
        standard = _identity(layers)
        if _kept(layers, keep, standard)[1] < more[-1]:  # the sample was misleading
            name, (best, more) = "standard", descend(layers, standard, _ON_ALL * tolerance)
        errors = [*errors, *more]
    return Fit(best, errors[-1], tuple(errors), name)


def kernel_rows(weight: Tensor) -> Tensor:
    """Kernels ``(out, in, *kernel)`` as rows ``(out * in, N)``, in float32 at least."""
    return weight.detach().flatten(2).flatten(0, 1).to(torch.promote_types(weight.dtype, torch.float32))


def largest(density: float) -> Keep:
    """Keep a fraction of the entries of all layers together: those of largest magnitude."""

    def keep(coefficients: Sequence[Tensor]) -> list[Tensor]:
        count = round(density * sum(values.numel() for values in coefficients))
        return keep_largest(coefficients, count, magnitudes=True)

    return keep


def nearest_orthonormal(matrix: Tensor) -> Tensor:
    """The orthonormal matrix that is closest to a square one."""
    left, _, right = torch.linalg.svd(matrix)
    nearest: Tensor = left @ right
    return nearest


def sampled(layers: Sequence[Kernels], seed: int, most: int) -> list[Kernels]:
    """The same fraction of the kernels of every layer, such that no group has many more than `most`."""
    sizes: dict[int | None, int] = {}
    for layer in layers:
        sizes[layer.group] = sizes.get(layer.group, 0) + len(layer.rows)
    largest_group = max((size for group, size in sizes.items() if group is not None), default=0)
    if largest_group <= most:
        return list(layers)
    rate = most / largest_group
    generator = torch.Generator().manual_seed(seed)
    sample = []
    for layer in layers:
        count = max(1, round(rate * len(layer.rows)))
        chosen = torch.randperm(len(layer.rows), generator=generator)[:count].sort().values
        sample.append(Kernels(layer.rows[chosen.to(layer.rows.device)], layer.group, layer.kernel))
    return sample


def _starts(layers: Sequence[Kernels]) -> dict[str, dict[int, Tensor]]:
    kernels = {layer.group: layer.kernel for layer in layers if layer.group is not None}
    moments = _products([layer.rows for layer in layers], layers)
    return {
        "standard": _identity(layers),
        "singular vectors": {group: torch.linalg.eigh(moment).eigenvectors.mT for group, moment in moments.items()},
        "dct": {group: bases.make("dct", kernel) for group, kernel in kernels.items()},
    }


def _products(coefficients: Sequence[Tensor], layers: Sequence[Kernels]) -> dict[int, Tensor]:
    """``C^T W`` of the layers of each group, in float64 on the CPU."""
    products: dict[int, Tensor] = {}
    for values, layer in zip(coefficients, layers, strict=True):
        if layer.group is not None:
            product = (values.mT @ layer.rows).double().cpu()
            products[layer.group] = products.get(layer.group, 0) + product
    return products


def _identity(layers: Sequence[Kernels]) -> dict[int, Tensor]:
    return {layer.group: bases.make("standard", layer.kernel) for layer in layers if layer.group is not None}


def _coefficients(layer: Kernels, fitted: dict[int, Tensor]) -> Tensor:
    if layer.group is None:
        return layer.rows
    return bases.compose(layer.rows[:, None], fitted[layer.group].mT.to(layer.rows))[:, 0]


def _kept(layers: Sequence[Kernels], keep: Keep, fitted: dict[int, Tensor]) -> tuple[list[Tensor], float]:
    """The sparse coefficients (meaningless for layers without a basis), and the squared norm of what was dropped."""
    coefficients = [_coefficients(layer, fitted) for layer in layers]
    error = 0.0
    for layer, values, mask in zip(layers, coefficients, keep(coefficients), strict=True):
        error += float(values.masked_fill(mask, 0).square_().sum(dtype=torch.float64))
        if layer.group is not None:
            values.mul_(mask)
    return coefficients, error


def _descend(
    layers: Sequence[Kernels],
    keep: Keep,
    start: dict[int, Tensor],
    tolerance: float,
    most_rounds: int,
    watch: Callable[[float], None],
) -> _Descent:
    """Alternate until a round gains too little; the best bases, and the error after each round."""
    best = start
    sparse, error = _kept(layers, keep, best)
    errors = [error]
    watch(error)
    for _ in range(most_rounds):
        candidate = {group: nearest_orthonormal(product) for group, product in _products(sparse, layers).items()}
        sparse.clear()  # frees the memory before the next coefficients are computed
        sparse, error = _kept(layers, keep, candidate)
        watch(error)
        previous = errors[-1]
        if error < previous:
            best, errors = candidate, [*errors, error]
        if not error < previous * (1 - tolerance):
            break
    return best, errors
