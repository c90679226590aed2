"""Selection: from scores to masks that prune an exact count, in a scope or a pattern.

>>> from torch import nn
>>> from ip_plugin import interspace
>>> from ip_plugin.methods import magnitude
>>> model = interspace(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)))
>>> model = apply_masks(model, select(magnitude(model), sparsity=0.9, scope="erk"))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..core.masking import set_masks, warn_of_thin_layers
from ..core.tensor_ref import Model, Target, TensorRef, described, prunable_tensors
from ..errors import (
    AlreadySparserError,
    InvalidAmountError,
    InvalidFloorError,
    InvalidPatternError,
    InvalidScopeError,
    NonFiniteScoresError,
    NothingToPruneError,
    PatternMismatchError,
    UnknownTargetError,
)
from ..utils.topk import keep_largest
from ..utils.validation import check_count, check_fraction, is_count

Scope: TypeAlias = Literal["global", "layer", "erk"]
Masks: TypeAlias = dict[Target, Tensor]


@dataclass(frozen=True)
class NofM:
    """Of every `m` consecutive entries the `n` best are kept.

    Attributes:
        n, m: ``1 <= n <= m``.
        along: ``"kernel"``: the flattened kernel (3 of 9 coefficients); ``"input"``: dimension 1, where convolutions
            and linear layers have their input channels (transposed convolutions their output channels).

    >>> NofM(2, 4).fits((16, 64, 3, 3)), NofM(2, 4).fits((64, 3, 3, 3)), NofM(3, 9, "kernel").fits((64, 3, 3, 3))
    (True, False, True)
    """

    n: int
    m: int
    along: Literal["kernel", "input"] = "input"

    def __post_init__(self) -> None:
        if not is_count(self.n, 1) or not is_count(self.m, self.n) or self.along not in ("kernel", "input"):
            raise InvalidPatternError(f"{self!r}")

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape can be divided into groups of `m`."""
        if self.along == "kernel":
            return len(shape) > 2 and math.prod(shape[2:]) % self.m == 0
        return len(shape) > 1 and shape[1] % self.m == 0

    def mask(self, scores: Tensor) -> Tensor:
        """The mask for scores of a shape that `fits`; of equal scores in a group the first is kept."""
        rows = scores.flatten(2) if self.along == "kernel" else scores.movedim(1, -1)
        groups = rows.reshape(-1, self.m)
        best = groups.argsort(dim=1, descending=True, stable=True)[:, : self.n]
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True) & (groups > -math.inf)
        kept = kept.reshape(rows.shape)
        return (kept.reshape(scores.shape) if self.along == "kernel" else kept.movedim(-1, 1)).contiguous()


def select(
    scores: Mapping[Target, Tensor],
    *,
    sparsity: float | None = None,
    count: int | None = None,
    scope: Scope = "global",
    min_per_layer: int = 0,
    pattern: NofM | None = None,
) -> Masks:
    """Masks that keep what scores highest and prune exactly as much as asked for.

    Args:
        scores: {target: scores}, finite; -inf marks entries that are pruned already. They stay pruned and count.
        sparsity: fraction of all entries that the masks prune; rounded to a count.
        count: number of entries that the masks prune, instead of a sparsity.
        scope: ``"global"``: one threshold; ``"layer"``: every layer has the same sparsity; ``"erk"``: densities by
            `erk`. Counts of layers sum to the count exactly (largest remainder).
        min_per_layer: how many entries every layer keeps at least (fewer only where fewer are left). With the default 0
            the scores alone decide.
        pattern: N of every M entries, in each layer alike; instead of sparsity, count, scope and min_per_layer.

    Returns:
        {target: bool mask of its shape}, True = kept. Equal scores at the threshold are spread evenly over all entries
        that have them, so over the layers too, and always alike.

    Raises:
        NothingToPruneError: no scores.
        NonFiniteScoresError: scores that are NaN or +inf.
        InvalidAmountError: no amount, two, or one outside of what there is.
        AlreadySparserError: more is pruned already than is asked for.
        InvalidScopeError, InvalidFloorError, InvalidPatternError, PatternMismatchError

    Warns:
        LayerCollapseWarning: layers keep less than a tenth of the share of entries that all layers keep together.

    >>> from torch import nn
    >>> scores = {(nn.Linear(4, 1), "weight"): torch.tensor([[0.5, 2.0, -1.0, 3.0]])}
    >>> select(scores, sparsity=0.5)[next(iter(scores))]
    tensor([[False,  True, False,  True]])
    >>> select(scores, pattern=NofM(1, 2))[next(iter(scores))]
    tensor([[False,  True, False,  True]])
    """
    _check(scores)
    if pattern is not None:
        if not isinstance(pattern, NofM):
            raise InvalidPatternError(f"{pattern!r}")
        others = {"sparsity": sparsity, "count": count, "scope": scope, "min_per_layer": min_per_layer}
        if others != {"sparsity": None, "count": None, "scope": "global", "min_per_layer": 0}:
            raise InvalidPatternError(f"{pattern} and {others}")
        misfits = [described(where, score) for where, score in scores.items() if not pattern.fits(score.shape)]
        if misfits:
            raise PatternMismatchError(str(pattern), misfits)
        return {where: pattern.mask(score) for where, score in scores.items()}
    if scope not in ("global", "layer", "erk"):
        raise InvalidScopeError(scope)
    values = [_flat(score) for score in scores.values()]
    sizes = [len(value) for value in values]
    keep = sum(sizes) - pruned(sparsity, count, sum(sizes))
    left = [int((value > -math.inf).sum()) for value in values]
    if keep > sum(left):
        raise AlreadySparserError(keep, sum(left))
    bounds = least(min_per_layer, left, keep)
    if scope == "global":
        device = values[0].device
        held = [
            v.masked_fill(keep_largest([v], f)[0], math.inf) if f else v for v, f in zip(values, bounds, strict=True)
        ]
        kept = keep_largest([h.to(device) for h in held], keep)
    else:
        weights = sizes if scope == "layer" else [sum(score.shape) for score in scores.values()]
        counts = _whole(_shares(weights, bounds, left, Fraction(keep)))
        kept = [keep_largest([value], n)[0] for value, n in zip(values, counts, strict=True)]
    masks = {
        where: mask.reshape(score.shape).to(score.device)
        for (where, score), mask in zip(scores.items(), kept, strict=True)
    }
    warn_of_thin_layers(
        [(described(where, mask), mask) for (where, mask), n in zip(masks.items(), left, strict=True) if n]
    )
    return masks


def apply_masks(model: Model, masks: Mapping[Target, Tensor]) -> Model:
    """`ip_plugin.set_masks` for masks by target.

    Args:
        model: changed in place; the one that the scores were computed for.
        masks: {target: mask}. A target may have been pruned since (``(conv, "weight")`` finds its tensor).

    Returns:
        The model.

    Raises:
        UnknownTargetError, InvalidMaskError: the model is as it was.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model = apply_masks(model, {(model, "weight"): torch.tensor([[True, False]])})
    """
    names = {layer.target: layer.module_name for layer in prunable_tensors(model)}
    by_name: dict[str, Tensor] = {}
    for where, mask in masks.items():
        name = names.get(TensorRef(*where).target)
        if name is None:
            raise UnknownTargetError(where[1], type(where[0]).__name__)
        by_name[name] = mask
    return set_masks(model, by_name)


def erk(shapes: Iterable[Sequence[int]], density: float) -> list[float]:
    """Densities of layers by the Erdos-Renyi-kernel rule: proportional to ``sum(shape) / prod(shape)``.

    Layers above 1 are made dense, and the rest is solved again (Evci et al. 2020, arXiv 1911.11134).

    Args:
        shapes: of the tensors.
        density: of all together.

    Returns:
        One density for each shape; those of all entries together average to `density`.

    Raises:
        NothingToPruneError, InvalidAmountError

    >>> erk([(2, 2), (4, 16), (4, 8)], 0.36)
    [1.0, 0.3125, 0.375]
    """
    listed = [tuple(shape) for shape in shapes]
    if not listed:
        raise NothingToPruneError
    sizes = [math.prod(shape) for shape in listed]
    total = Fraction(check_fraction(density, "density")) * sum(sizes)
    shares = _shares([sum(shape) for shape in listed], [0] * len(sizes), sizes, total)
    return [float(share / size) if size else 0.0 for share, size in zip(shares, sizes, strict=True)]


def _shares(weights: Sequence[int], least: Sequence[int], most: Sequence[int], total: Fraction) -> list[Fraction]:
    """Split `total` in proportion to `weights`, each share within its bounds; the bounds must allow it.

    As long as shares are out of bounds, those on the side that is further out in sum are set to their bound, and the
    rest is split again: nothing set so would come back, for the rest moves away from it.
    """
    shares = [Fraction(0)] * len(weights)
    free = set(range(len(weights)))
    while free:
        spread = total - sum((shares[i] for i in range(len(weights)) if i not in free), Fraction(0))
        unit = spread / max(1, sum(weights[i] for i in free))
        for i in free:
            shares[i] = unit * weights[i]
        above = {i: shares[i] - most[i] for i in free if shares[i] > most[i]}
        below = {i: least[i] - shares[i] for i in free if shares[i] < least[i]}
        if not above and not below:
            break
        for i in above if sum(above.values()) >= sum(below.values()) else below:
            shares[i] = Fraction(most[i] if i in above else least[i])
            free.remove(i)
    return shares


def _whole(shares: Sequence[Fraction]) -> list[int]:
    """Shares as whole numbers of the same sum: the largest remainders are rounded up, of equal ones the first."""
    counts = [math.floor(share) for share in shares]
    missing = round(sum(shares)) - sum(counts)
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[:missing]:
        counts[i] += 1
    return counts


def _flat(score: Tensor) -> Tensor:
    """As a vector in a dtype that every device can rank, and that has an infinity."""
    wide = torch.promote_types(score.dtype, torch.float32) if score.is_floating_point() else torch.float64
    return score.detach().flatten().to(wide)


def pruned(sparsity: object, count: object, size: int) -> int:
    """How many entries of `size` are to be pruned; raises as `select`."""
    if (sparsity is None) == (count is None):
        raise InvalidAmountError(
            "Either `sparsity` or `count` must say how much to prune.",
            f"sparsity={sparsity!r}, count={count!r}",
            f"pass sparsity=, a fraction in [0, 1], or count=, an int between 0 and {size}; not both",
        )
    return check_count(count, size) if sparsity is None else round(check_fraction(sparsity) * size)


def least(min_per_layer: object, left: Sequence[int], keep: int) -> list[int]:
    """How many entries each layer keeps at least, of those that it has left; raises as `select`."""
    if not is_count(min_per_layer):
        raise InvalidFloorError(f"{min_per_layer!r}")
    bounds = [min(int(min_per_layer), n) for n in left]
    if sum(bounds) > keep:
        raise InvalidFloorError(f"{min_per_layer} for each of {len(left)} layers, {keep} entries kept in all")
    return bounds


def _check(scores: Mapping[Target, Tensor]) -> None:
    if not any(score.numel() for score in scores.values()):
        raise NothingToPruneError
    for where, score in scores.items():
        bad = int((score.isnan() | (score == math.inf)).sum())
        if bad:
            raise NonFiniteScoresError(described(where, score), bad)
