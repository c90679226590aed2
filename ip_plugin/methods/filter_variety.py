"""Filter variety: rare filters stay, redundant ones go.

After the idea of Hubens et al. 2022 (arXiv 2203.05807), whose rule is not public to us; the one here is the project's
own. Of the filters that are left, the two most similar ones are taken, and the one that the criterion scores lower is
removed; again and again. Among redundant filters the criterion decides; a filter like no other is removed last.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ..core.gauge import Similarity
from ..errors import ArgumentError, ScoreError
from ..utils.validation import check_fraction


@torch.no_grad()
def removal_order(scores: Tensor, filters: Tensor, strength: float = 1.0) -> Tensor:
    """The order in which filters are removed.

    Each time the filter goes for which ``(1 - strength) * rank of its score + strength * (1 - largest cosine similarity
    to one that is left)`` is smallest; of equal ones that of the lowest score. The rank runs from 0 to 1. Filters of
    norm zero go before all others, unless the strength is 0.

    Args:
        scores: ``(filters,)``: what a criterion says; the lowest would go first.
        filters: ``(filters, ...)``: their kernels, in either space.
        strength: 1: redundancy decides, the criterion only within a pair; 0: the criterion alone.

    Returns:
        int64 ``(filters,)``, a permutation: the number of the filter that goes first, and so on.

    Raises:
        ScoreError: shapes that do not fit, or NaN.
        AmountError: a strength outside of [0, 1].

    Memory grows with the square of the number of filters, time too: 2,048 filters take less than a second.

    >>> filters = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 0.3]])  # two alike, and a small rare one
    >>> removal_order(torch.tensor([1.0, 2.0, 0.3]), filters)
    tensor([0, 2, 1])
    >>> removal_order(torch.tensor([1.0, 2.0, 0.3]), filters, strength=0)
    tensor([2, 0, 1])
    """
    _check(scores, filters, strength)
    count = len(scores)
    values = scores.detach().double().cpu()
    place = values.argsort(stable=True)
    ranks = torch.empty(count, dtype=torch.float64)
    ranks[place] = torch.linspace(0, 1, count, dtype=torch.float64)
    for value in values[place][:-1][values[place].diff() == 0].unique():  # equal scores have equal ranks
        ranks[values == value] = ranks[values == value].mean()
    similarity = similarities(filters).double()
    zero = (filters.detach().reshape(count, -1).abs().amax(dim=1).cpu() == 0) & (strength > 0)
    similarity.fill_diagonal_(-torch.inf)
    nearest, who = similarity.max(dim=1)
    left = torch.ones(count, dtype=torch.bool)
    order: list[int] = []
    for _ in range(count - 1):
        cost = (1 - strength) * ranks + strength * (1 - nearest)
        cost = torch.where(zero, -torch.inf, cost).masked_fill_(~left, torch.inf)
        candidates = cost == cost.min()
        goes = int(torch.where(candidates, values, torch.inf).argmin())
        order.append(goes)
        left[goes] = False
        similarity[:, goes] = -torch.inf
        widowed = left & (who == goes)
        if widowed.any():
            nearest[widowed], who[widowed] = similarity[widowed].max(dim=1)
    return torch.tensor([*order, int(left.nonzero()[0])])


def varied(scores: Tensor, filters: Tensor, strength: float = 1.0) -> Tensor:
    """The same scores, dealt out anew: the filter that goes first has the lowest one, and so on.

    So a threshold that a host finds over many layers takes as many filters of each layer as before, but others.

    Args, raises: as `removal_order`.

    Returns:
        ``(filters,)``, the values of `scores`.

    >>> filters = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 0.3]])
    >>> varied(torch.tensor([1.0, 2.0, 0.3]), filters)
    tensor([0.3000, 2.0000, 1.0000])
    """
    order = removal_order(scores, filters, strength).to(scores.device)
    dealt = torch.empty_like(scores)
    dealt[order] = scores.detach().sort(stable=True).values
    return dealt


def similarities(filters: Tensor) -> Tensor:
    """Cosine similarity of every two filters: ``(filters, filters)``, symmetric, float32 or more, on the CPU.

    Filters of norm zero are similar to none (0).
    """
    flat = filters.detach().reshape(len(filters), -1)
    flat = flat.to("cpu", torch.promote_types(flat.dtype, torch.float32))
    norms = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    unit = flat / torch.where(norms > 0, norms, torch.ones_like(norms))
    found = unit @ unit.mT
    return found.add_(found.mT.clone()).div_(2).clamp_(-1, 1)  # symmetric to the last bit


class Variety(NamedTuple):
    """How different filters are.

    Attributes:
        mean_similarity: of all pairs, cosine.
        largest_similarity: of any pair.
        effective_rank: ``exp`` of the entropy of the singular values of the filters at unit norm, as shares (Roy and
            Vetterli 2007): 1 where all are alike, their number where they are orthogonal.
    """

    mean_similarity: float
    largest_similarity: float
    effective_rank: float


@torch.no_grad()
def measure(filters: Tensor) -> Variety | None:
    """How different filters are; those of norm zero do not count. None where fewer than two are left.

    Args:
        filters: ``(filters, ...)``: their kernels.

    >>> measure(torch.eye(3))
    Variety(mean_similarity=0.0, largest_similarity=0.0, effective_rank=3.0)
    """
    flat = filters.detach().flatten(1)
    flat = flat[(flat != 0).any(dim=1)]
    count = len(flat)
    if count < 2:
        return None
    found = similarities(flat).double()
    shares = torch.linalg.eigvalsh(found).clamp_min(0).sqrt()
    shares = shares[shares > 1e-7 * shares.max()] / shares.sum()
    rank = float((-shares * shares.log()).sum().exp())
    mean = float((found.sum() - found.diagonal().sum()) / (count * (count - 1)))
    return Variety(round(mean, 6), round(float(found.fill_diagonal_(-1).max()), 6), round(rank, 6))


def _check(scores: Tensor, filters: Tensor, strength: float) -> None:
    if scores.ndim != 1 or len(filters) != len(scores) or not len(scores) or filters.ndim < 2:
        raise ScoreError(
            "There must be one score for each filter.",
            f"scores {tuple(scores.shape)}, filters {tuple(filters.shape)}",
            "pass scores (filters,) and kernels (filters, ...)",
        )
    if bool(scores.isnan().any()) or not bool(filters.isfinite().all()):
        raise ScoreError(
            "Scores and filters must be numbers.",
            "NaN among the scores, or filters that are not finite",
            "take a model that has not diverged",
        )
    check_fraction(strength, "strength")


def check_similarity(similarity: str) -> None:
    """Raise ArgumentError unless `similarity` is known."""
    known = get_args(Similarity)
    if similarity not in known:
        raise ArgumentError(
            f"Filters must be compared by {' or '.join(known)}.",
            f"{similarity!r}",
            f"pass {known[0]!r} or {known[1]!r}",
        )
