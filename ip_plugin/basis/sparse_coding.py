"""Sparse coding: few coefficients for given kernels, in a basis that need not be orthonormal.

In an orthonormal basis the largest entries of ``W G^T`` are the best choice. In any other basis the filters overlap, so
the best subset for each kernel must be searched for; its coefficients follow by least squares.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..utils.topk import keep_largest

#: With up to this many filters, all subsets are tried (512 for nine filters); with more, the search is greedy.
_ALL_SUBSETS = 9
#: A filter whose residual energy given the chosen filters is below this fraction adds nothing but rounding errors.
_DEPENDENT = 1e-6


class Code(NamedTuple):
    """Coefficients ``(kernels, N)``, zero where the bool mask of the same shape is False."""

    coefficients: Tensor
    mask: Tensor


@torch.no_grad()
def code(rows: Tensor, basis: Tensor, count: int, *, rows_at_once: int = 1 << 12) -> Code:
    """Choose exactly `count` coefficients such that ``||rows - coefficients @ basis||`` is small.

    With up to nine filters, each kernel gets the best of all subsets of its size. With more, filters are added
    greedily, each time the one that explains most (orthogonal least squares: Chen, Billings and Luo 1989). The number
    of coefficients of each kernel follows from the energy that each further filter explains, over all kernels.

    Args:
        rows: ``(kernels, N)``, float32 or float64, one flattened kernel per row.
        basis: ``(N, N)``, non-singular, filters as rows.
        count: at most as many as `rows` has entries.
        rows_at_once: bounds the memory.

    >>> basis = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> code(torch.tensor([[3.0, 3.0], [0.1, 0.0]]), basis, 1).coefficients  # three times the second filter
    tensor([[0., 3.],
            [0., 0.]])
    """
    basis = basis.detach().to("cpu", torch.float64)
    search = (_AllSubsets if len(basis) <= _ALL_SUBSETS else _Greedy)(basis @ basis.mT, rows)
    products = (rows @ basis.mT.to(rows)).split(rows_at_once)
    candidates = [search.candidates(part) for part in products]
    gains = torch.cat([_marginal(energies) for energies, _ in candidates])
    sizes = keep_largest([gains], count)[0].sum(1).split(rows_at_once)
    codes = [
        search.code(part, chosen, size) for part, (_, chosen), size in zip(products, candidates, sizes, strict=True)
    ]
    return Code(torch.cat([part.coefficients for part in codes]), torch.cat([part.mask for part in codes]))


def _marginal(energies: Tensor) -> Tensor:
    """The energy that each further filter explains, ``(kernels, N)``: slopes of the concave majorant, so never rising.

    Args:
        energies: ``(kernels, N + 1)``; column `k` is what the best `k` filters explain.
    """
    n = energies.shape[1] - 1
    gains = torch.full_like(energies[:, 1:], torch.inf)
    for begin in range(n):
        slopes = (energies[:, begin + 1 :] - energies[:, begin, None]) / torch.arange(1, n - begin + 1).to(energies)
        steepest = slopes.flip(1).cummax(1).values.flip(1)  # to the best end at or after each column
        gains[:, begin:] = torch.minimum(gains[:, begin:], steepest)
    return gains


@lru_cache(maxsize=_ALL_SUBSETS)
def _subsets(n: int) -> tuple[Tensor, list[int]]:
    """All subsets of `n` filters, ``(2 ** n, n)``, ordered by size; the start of each size, and the end."""
    subsets = torch.tensor(sorted(itertools.product((False, True), repeat=n), key=sum)).reshape(-1, n)
    return subsets, [0, *subsets.sum(1).bincount(minlength=n + 1).cumsum(0).tolist()]


class _AllSubsets:
    """Tries all subsets. The energy that a subset explains is the quadratic form of its inverse Gram matrix.

    `products` are inner products of kernels with filters, ``(kernels, N)``.
    """

    def __init__(self, gram: Tensor, like: Tensor) -> None:
        subsets, self.begins = _subsets(len(gram))
        both = subsets[:, :, None] & subsets[:, None]
        inverses = torch.linalg.inv(torch.where(both, gram, torch.eye(len(gram)).to(gram))) * both
        self.first, self.second = torch.triu_indices(len(gram), len(gram), device=like.device)
        folded = inverses + inverses.tril(-1).mT  # both triangles added up, as each pair of products occurs once
        self.forms = folded[:, self.first.cpu(), self.second.cpu()].to(like)
        self.subsets, self.inverses = subsets.to(like.device), inverses.to(like)

    def candidates(self, products: Tensor) -> tuple[Tensor, Tensor]:
        """The energies that the best `k` filters explain, ``(kernels, N + 1)``; and these filters, as `code` takes."""
        explained = (products[:, self.first] * products[:, self.second]) @ self.forms.mT
        best = [explained[:, begin:end].max(1) for begin, end in itertools.pairwise(self.begins)]
        chosen = torch.stack([of_size.indices + begin for of_size, begin in zip(best, self.begins, strict=False)], 1)
        return torch.stack([of_size.values for of_size in best], 1), chosen.to(torch.int16)

    def code(self, products: Tensor, chosen: Tensor, sizes: Tensor) -> Code:
        """The code of each kernel, with the number of filters in `sizes`."""
        subset = chosen.gather(1, sizes[:, None])[:, 0].int()
        return Code((self.inverses[subset] @ products[:, :, None])[:, :, 0], self.subsets[subset])


class _Greedy:
    """Adds one filter after the other; `factor` is each kernel's Cholesky factor of the Gram matrix, pivoted so."""

    def __init__(self, gram: Tensor, like: Tensor) -> None:
        self.gram = gram.to(like)

    def candidates(self, products: Tensor) -> tuple[Tensor, Tensor]:
        count, n = products.shape
        left, own = products.clone(), self.gram.diagonal().repeat(count, 1)
        factor = products.new_zeros(count, n, n)
        place = torch.full_like(products, n, dtype=torch.int16)
        energies = products.new_zeros(count, n + 1)
        kernels = torch.arange(count, device=products.device)
        for number in range(n):
            adds = torch.where(own > _DEPENDENT * self.gram.diagonal(), left.square() / own, 0)
            gain, chosen = adds.masked_fill(place < n, -1).max(1)
            place[kernels, chosen] = number
            energies[:, number + 1] = energies[:, number] + gain
            before = factor[:, :number]
            row = self.gram[chosen] - (before[kernels, :, chosen][:, None] @ before)[:, 0]
            scale = torch.where(gain > 0, own[kernels, chosen].rsqrt(), 0)[:, None]
            row *= scale
            left -= left[kernels, chosen, None] * scale * row
            own -= row.square()
            factor[:, number] = row
        return energies, place

    def code(self, products: Tensor, chosen: Tensor, sizes: Tensor) -> Code:
        mask = chosen < sizes[:, None]  # here the place of each filter in the order in which they are chosen
        both = mask[:, :, None] & mask[:, None]
        forms = torch.where(both, self.gram, torch.eye(len(self.gram)).to(self.gram)).double()
        return Code(torch.linalg.solve(forms, (products * mask).double()).to(products) * mask, mask)
