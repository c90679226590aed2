"""Filter variety: redundant filters are removed before rare ones.

After the idea of Hubens et al. 2022 (arXiv 2203.05807), whose rule is not public to us; this rule is the project's own.
Again and again, the two most similar of the remaining filters are compared, and the one with the lower score is
removed. So the score decides between redundant filters, and a filter unlike all others is removed last.
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

    Each step removes the filter with the smallest ``(1 - strength) * rank of its score + strength * (1 - largest cosine
    similarity to a remaining filter)``; of equal ones the filter with the lowest score. Ranks run from 0 to 1. Filters
    of norm zero are removed first, unless the strength is 0.

    Args:
        scores: ``(filters,)``; the criterion alone would remove the lowest first.
        filters: ``(filters, ...)``: their kernels, in either space.
        strength: 1: redundancy decides, the score only within a pair of similar filters; 0: the score alone.

    Returns:
        int64 ``(filters,)``, a permutation: the index of the filter that is removed first, and so on.

    Raises:
        ScoreError: shapes that do not fit, or NaN.
        AmountError: a strength outside of [0, 1].

    Memory and time grow with the square of the number of filters; 2,048 filters take less than a second.

    >>> filters = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 0.3]])  # two alike, and a small rare one
    >>> removal_order(torch.tensor([1.0, 2.0, 0.3]), filters)
    tensor([0, 2, 1])
    >>> removal_order(torch.tensor([1.0, 2.0, 0.3]), filters, strength=0)
    tensor([2, 0, 1])
    """
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
    count = len(scores)
    values = scores.detach().double().cpu()
    ascending = values.argsort(stable=True)
    ranks = torch.empty(count, dtype=torch.float64)
    ranks[ascending] = torch.linspace(0, 1, count, dtype=torch.float64)
    for value in values[ascending][:-1][values[ascending].diff() == 0].unique():  # equal scores have equal ranks
        ranks[values == value] = ranks[values == value].mean()
    similarity = similarities(filters).double()
    zero = (filters.detach().reshape(count, -1).abs().amax(dim=1).cpu() == 0) & (strength > 0)
    similarity.fill_diagonal_(-torch.inf)
    largest, nearest = similarity.max(dim=1)
    remaining = torch.ones(count, dtype=torch.bool)
    order: list[int] = []
    for _ in range(count - 1):
        cost = (1 - strength) * ranks + strength * (1 - largest)
        cost = torch.where(zero, -torch.inf, cost).masked_fill_(~remaining, torch.inf)
        candidates = cost == cost.min()
        removed = int(torch.where(candidates, values, torch.inf).argmin())
        order.append(removed)
        remaining[removed] = False
        similarity[:, removed] = -torch.inf
        outdated = remaining & (nearest == removed)
        if outdated.any():
            largest[outdated], nearest[outdated] = similarity[outdated].max(dim=1)
    return torch.tensor([*order, int(remaining.nonzero()[0])])


def varied(scores: Tensor, filters: Tensor, strength: float = 1.0) -> Tensor:
    """The same values reassigned: the filter that `removal_order` removes first has the lowest one, and so on.

    With these scores a threshold over many layers removes as many filters of each layer as before, but redundant ones.

    Args, raises: as `removal_order`.

    Returns:
        ``(filters,)``, the values of `scores`.

    >>> filters = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 0.3]])
    >>> varied(torch.tensor([1.0, 2.0, 0.3]), filters)
    tensor([0.3000, 2.0000, 1.0000])
    """
    order = removal_order(scores, filters, strength).to(scores.device)
    reassigned = torch.empty_like(scores)
    reassigned[order] = scores.detach().sort(stable=True).values
    return reassigned


def similarities(filters: Tensor) -> Tensor:
    """Cosine similarity of every two filters: ``(filters, filters)``, symmetric, float32 or more, on the CPU.

    The similarity to a filter of norm zero is 0.
    """
    flat = filters.detach().reshape(len(filters), -1)
    flat = flat.to("cpu", torch.promote_types(flat.dtype, torch.float32))
    norms = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    unit = flat / torch.where(norms > 0, norms, torch.ones_like(norms))
    products = unit @ unit.mT
    return products.add_(products.mT.clone()).div_(2).clamp_(-1, 1)  # symmetric to the last bit


class Variety(NamedTuple):
    """How different filters are.

    Attributes:
        mean_similarity: mean cosine similarity of all pairs.
        largest_similarity: largest cosine similarity of a pair.
        effective_rank: ``exp`` of the entropy of the singular values of the filters at unit norm, as shares (Roy and
            Vetterli 2007): 1 where all filters are alike, their number where they are orthogonal.
    """

    mean_similarity: float
    largest_similarity: float
    effective_rank: float


@torch.no_grad()
def measure(filters: Tensor) -> Variety | None:
    """How different filters are; filters of norm zero are left out. None where fewer than two others are left.

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
    similarity = similarities(flat).double()
    shares = torch.linalg.eigvalsh(similarity).clamp_min(0).sqrt()
    shares = shares[shares > 1e-7 * shares.max()] / shares.sum()
    rank = float((-shares * shares.log()).sum().exp())
    mean = float((similarity.sum() - similarity.diagonal().sum()) / (count * (count - 1)))
    return Variety(round(mean, 6), round(float(similarity.fill_diagonal_(-1).max()), 6), round(rank, 6))


def check_similarity(similarity: str) -> None:
    """Raise ArgumentError unless `similarity` is known."""
    known = get_args(Similarity)
    if similarity not in known:
        rule = f"Filters must be compared by {' or '.join(known)}."
        raise ArgumentError(rule, f"{similarity!r}", f"pass {known[0]!r} or {known[1]!r}")
