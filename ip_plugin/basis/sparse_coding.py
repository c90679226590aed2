"""Sparse codes: few coefficients for given kernels, in a basis that need not be orthonormal.

In an orthonormal basis the best ones are the largest of ``W G^T``. In another one the filters say the same in part:
which of them a kernel needs must be searched for, and their coefficients follow by least squares.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..utils.topk import keep_largest

#: Up to so many filters every subset of them is looked at (512 of nine); of more, one is added after the other.
_ALL_SUBSETS = 9
_ROWS_AT_ONCE = 1 << 12
#: Below this part of a filter's energy that the chosen ones do not say, it adds nothing but rounding.
_DEPENDENT = 1e-6


class Code(NamedTuple):
    """Coefficients ``(kernels, N)``, zero where the bool mask of the same shape is False."""

    coefficients: Tensor
    mask: Tensor


@torch.no_grad()
def code(rows: Tensor, basis: Tensor, count: int) -> Code:
    """Coefficients of which exactly `count` are chosen, such that ``||rows - coefficients @ basis||`` is small.

    Up to nine filters, each kernel has the best of all subsets of its size; with more, filters are added one after the
    other, each time that which explains most (orthogonal least squares: Chen, Billings and Luo 1989). How many each
    kernel has follows from what each further filter explains, over all kernels.

    Args:
        rows: ``(kernels, N)``, float32 or float64, one flattened kernel a row.
        basis: ``(N, N)``, regular, filters as rows.
        count: at most as many as `rows` has entries.

    >>> basis = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> code(torch.tensor([[3.0, 3.0], [0.1, 0.0]]), basis, 1).coefficients  # three times the second filter
    tensor([[0., 3.],
            [0., 0.]])
    """
    basis = basis.detach().to("cpu", torch.float64)
    search: _Search = (_AllSubsets if len(basis) <= _ALL_SUBSETS else _OneByOne)(basis @ basis.mT, rows)
    products = (rows @ basis.mT.to(rows)).split(_ROWS_AT_ONCE)
    found = [search.candidates(part) for part in products]
    gains = torch.cat([_marginal(energies) for energies, _ in found])
    sizes = keep_largest([gains], count)[0].sum(1).split(_ROWS_AT_ONCE)
    codes = [search.code(*each) for each in zip(products, (those for _, those in found), sizes, strict=True)]
    return Code(torch.cat([each.coefficients for each in codes]), torch.cat([each.mask for each in codes]))


def _marginal(energies: Tensor) -> Tensor:
    """What each further filter explains, ``(kernels, N)``, falling along each row: slopes of the concave majorant.

    Args:
        energies: what as many filters as the column says explain, ``(kernels, N + 1)``.
    """
    n = energies.shape[1] - 1
    found = torch.full_like(energies[:, 1:], torch.inf)
    for begin in range(n):
        slopes = (energies[:, begin + 1 :] - energies[:, begin, None]) / torch.arange(1, n - begin + 1).to(energies)
        steepest = slopes.flip(1).cummax(1).values.flip(1)  # from `begin` to somewhere at or behind each place
        found[:, begin:] = torch.minimum(found[:, begin:], steepest)
    return found


class _Search(Protocol):
    """A way to look for the filters of a kernel. Products are those of kernels with filters, ``(kernels, N)``."""

    def candidates(self, products: Tensor) -> tuple[Tensor, Tensor]:
        """What the best filters explain, by their number, ``(kernels, N + 1)``; and which they are, for `code`."""

    def code(self, products: Tensor, those: Tensor, sizes: Tensor) -> Code:
        """The code of each kernel with so many filters."""


@lru_cache(maxsize=_ALL_SUBSETS)
def _subsets(n: int) -> tuple[Tensor, list[int]]:
    """All subsets of `n` filters, ``(2 ** n, n)``, small ones first; where those of each size begin, and the end."""
    every = torch.tensor(sorted(itertools.product((False, True), repeat=n), key=sum)).reshape(-1, n)
    return every, [0, *every.sum(1).bincount(minlength=n + 1).cumsum(0).tolist()]


class _AllSubsets:
    """Every subset is tried. What it explains is a quadratic form in the products: its inverse Gram matrix."""

    def __init__(self, gram: Tensor, like: Tensor) -> None:
        subsets, self.begins = _subsets(len(gram))
        both = subsets[:, :, None] & subsets[:, None]
        inverses = torch.linalg.inv(torch.where(both, gram, torch.eye(len(gram)).to(gram))) * both
        self.first, self.second = torch.triu_indices(len(gram), len(gram), device=like.device)
        twice = inverses + inverses.tril(-1).mT  # each pair once
        self.forms = twice[:, self.first.cpu(), self.second.cpu()].to(like)
        self.subsets, self.inverses = subsets.to(like.device), inverses.to(like)

    def candidates(self, products: Tensor) -> tuple[Tensor, Tensor]:
        explained = (products[:, self.first] * products[:, self.second]) @ self.forms.mT
        best = [explained[:, begin:end].max(1) for begin, end in itertools.pairwise(self.begins)]
        those = torch.stack([each.indices + begin for each, begin in zip(best, self.begins, strict=False)], 1)
        return torch.stack([each.values for each in best], 1), those.to(torch.int16)

    def code(self, products: Tensor, those: Tensor, sizes: Tensor) -> Code:
        chosen = those.gather(1, sizes[:, None])[:, 0].int()
        return Code((self.inverses[chosen] @ products[:, :, None])[:, :, 0], self.subsets[chosen])


class _OneByOne:
    """Filters one after the other; what is chosen is taken out of the products and the Gram matrix by elimination."""

    def __init__(self, gram: Tensor, like: Tensor) -> None:
        self.gram = gram.to(like)

    def candidates(self, products: Tensor) -> tuple[Tensor, Tensor]:
        count, n = products.shape
        left, grams = products.clone(), self.gram.repeat(count, 1, 1)
        place = torch.full_like(products, n, dtype=torch.int16)
        energies = products.new_zeros(count, n + 1)
        every = torch.arange(count, device=products.device)
        for number in range(n):
            own = grams.diagonal(dim1=1, dim2=2)
            adds = torch.where(own > _DEPENDENT * self.gram.diagonal(), left.square() / own, 0)
            gain, chosen = adds.masked_fill(place < n, -1).max(1)
            place[every, chosen] = number
            energies[:, number + 1] = energies[:, number] + gain
            row = grams[every, chosen]
            share = torch.where(gain > 0, row[every, chosen].reciprocal(), 0)[:, None] * row
            left -= left[every, chosen, None] * share
            grams -= share[:, :, None] * row[:, None]
        return energies, place

    def code(self, products: Tensor, those: Tensor, sizes: Tensor) -> Code:
        mask = those < sizes[:, None]
        both = mask[:, :, None] & mask[:, None]
        forms = torch.where(both, self.gram, torch.eye(len(self.gram)).to(self.gram)).double()
        return Code(torch.linalg.solve(forms, (products * mask).double()).to(products) * mask, mask)
