"""Selection: turn scores into masks that prune an exact count of entries, in a scope or an N:M pattern.

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
from ..errors import AmountError, ArgumentError, ScoreError, SelectionError, listed
from ..utils.topk import keep_largest
from ..utils.validation import check_count, check_fraction, is_count

Scope: TypeAlias = Literal["global", "layer", "erk"]
Masks: TypeAlias = dict[Target, Tensor]


@dataclass(frozen=True)
class NofM:
    """An N:M pattern: of every `m` consecutive entries the `n` with the highest scores are kept.

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
            raise ArgumentError(
                'An N:M pattern must keep 1 <= n <= m of every m entries, along "kernel" or "input".',
                f"{self!r}",
                "pass for example NofM(2, 4)",
            )

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
    """Masks that keep the entries with the highest scores, and prune exactly the given amount.

    Args:
        scores: {target: scores}, finite; -inf marks entries that are pruned already: they stay so, and are counted.
        sparsity: fraction of all entries that the masks prune; rounded to a count.
        count: number of entries that the masks prune, instead of a sparsity.
        scope: ``"global"``: one threshold; ``"layer"``: every layer has the same sparsity; ``"erk"``: densities by
            `erk`. Counts of layers sum to the count exactly (largest remainder).
        min_per_layer: the least number of entries that every layer keeps (all where fewer are not pruned yet). With
            the default 0 the scores alone decide.
        pattern: N of every M entries, in each layer alike; instead of sparsity, count, scope and min_per_layer.

    Returns:
        {target: bool mask of its shape}, True = kept. Of equal scores at the threshold, those to keep are spread evenly
        over all entries that have them, and so over layers, deterministically.

    Raises:
        SelectionError: no scores, or layers that the pattern does not fit.
        ScoreError: scores that are NaN or +inf.
        AmountError: no amount, two, or one out of range; more is pruned already; an impossible `min_per_layer`.
        ArgumentError: of `scope` or `pattern`.

    Warns:
        LayerCollapseWarning: layers keep less than a tenth of the share of entries that all layers keep together.

    >>> from torch import nn
    >>> scores = {(nn.Linear(4, 1), "weight"): torch.tensor([[0.5, 2.0, -1.0, 3.0]])}
    >>> select(scores, sparsity=0.5)[next(iter(scores))]
    tensor([[False,  True, False,  True]])
    >>> select(scores, pattern=NofM(1, 2))[next(iter(scores))]
    tensor([[False,  True, False,  True]])
    """
    if not any(score.numel() for score in scores.values()):
        raise SelectionError(
            "There must be scores to select by.", "an empty mapping", "pass scores of the tensors that are to be pruned"
        )
    for where, score in scores.items():
        bad = int((score.isnan() | (score == math.inf)).sum())
        if bad:
            raise ScoreError(
                "Scores must be finite; only -inf is allowed, and means an entry that is pruned already.",
                f"{described(where, score)}: {bad} NaN or infinite scores",
                "score a model that has not diverged",
            )
    if pattern is not None:
        others = {"sparsity": sparsity, "count": count, "scope": scope, "min_per_layer": min_per_layer}
        _check_pattern(pattern, scores, others)
        return {where: pattern.mask(score) for where, score in scores.items()}
    if scope not in ("global", "layer", "erk"):
        raise ArgumentError(
            '`scope` must be "global", "layer" or "erk".',
            f"{scope!r}",
            '"global" puts all layers under one threshold, "layer" gives each the same sparsity',
        )
    values = [_flat(score) for score in scores.values()]
    sizes = [len(value) for value in values]
    keep = sum(sizes) - pruned(sparsity, count, sum(sizes))
    left = [int((value > -math.inf).sum()) for value in values]
    if keep > sum(left):
        raise AmountError(
            "Entries that are pruned already (score -inf) stay pruned, so no more than the rest can be kept.",
            f"{keep} entries to keep, {sum(left)} that are not pruned",
            "ask for a higher sparsity, or score the model without masks",
        )
    bounds = least(min_per_layer, left, keep)
    if scope == "global":
        ranked = [
            v.masked_fill(keep_largest([v], n)[0], math.inf) if n else v for v, n in zip(values, bounds, strict=True)
        ]
        kept = keep_largest([value.to(values[0].device) for value in ranked], keep)
    else:
        weights = sizes if scope == "layer" else [sum(score.shape) for score in scores.values()]
        counts = rounded(_shares(weights, bounds, left, Fraction(keep)))
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
        masks: {target: mask}. A target stays valid when its tensor has been pruned since: ``(conv, "weight")`` works.

    Returns:
        The model.

    Raises:
        SelectionError: a target of another model; the model is as it was.
        MaskError: a mask of another shape; the model is as it was.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model = apply_masks(model, {(model, "weight"): torch.tensor([[True, False]])})
    """
    names = {layer.target: layer.module_name for layer in prunable_tensors(model)}
    for module, tensor_name in masks:
        if TensorRef(module, tensor_name).target not in names:
            raise SelectionError(
                "Everything in `masks` must be a target of the model, one of `ip_plugin.prunable(model)`.",
                f"{tensor_name!r} of a {type(module).__name__} that is no target of this model",
                "compute the scores for this model, after it was copied, converted or baked",
            )
    return set_masks(model, {names[TensorRef(*where).target]: mask for where, mask in masks.items()})


def erk(shapes: Iterable[Sequence[int]], density: float) -> list[float]:
    """Densities of layers by the Erdos-Renyi-kernel rule: proportional to ``sum(shape) / prod(shape)``.

    Where that is above 1, the layer is dense, and the rule is applied to the others again (Evci et al. 2020, arXiv
    1911.11134).

    Args:
        shapes: of the tensors.
        density: of all tensors together.

    Returns:
        One density for each shape; their average over all entries is `density`.

    Raises:
        SelectionError: no shapes.
        AmountError: the density is not in [0, 1].

    >>> erk([(2, 2), (4, 16), (4, 8)], 0.36)
    [1.0, 0.3125, 0.375]
    """
    shapes = [tuple(shape) for shape in shapes]
    if not shapes:
        raise SelectionError("There must be shapes.", "an empty iterable", "pass the shapes of the prunable tensors")
    sizes = [math.prod(shape) for shape in shapes]
    total = Fraction(check_fraction(density, "density")) * sum(sizes)
    shares = _shares([sum(shape) for shape in shapes], [0] * len(sizes), sizes, total)
    return [float(share / size) if size else 0.0 for share, size in zip(shares, sizes, strict=True)]


def _shares(weights: Sequence[int], least: Sequence[int], most: Sequence[int], total: Fraction) -> list[Fraction]:
    """Split `total` in proportion to `weights`, each share within its bounds; the bounds must allow it.

    While shares are out of bounds, those of the side with the larger total violation are fixed at their bound, and the
    rest is split again. This moves the other shares away from that side, so a fixed share never has to be released.
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


def rounded(shares: Sequence[Fraction]) -> list[int]:
    """Shares as whole numbers of the same sum: the largest remainders are rounded up, of equal ones the first."""
    counts = [math.floor(share) for share in shares]
    missing = round(sum(shares)) - sum(counts)
    for i in sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])[:missing]:
        counts[i] += 1
    return counts


def _flat(score: Tensor) -> Tensor:
    """As a vector, in a dtype that every device can sort and that has an infinity."""
    wide = torch.promote_types(score.dtype, torch.float32) if score.is_floating_point() else torch.float64
    return score.detach().flatten().to(wide)


def pruned(sparsity: object, count: object, size: int) -> int:
    """The number of entries to prune, of `size` in all; raises as `select`."""
    if (sparsity is None) == (count is None):
        raise AmountError(
            "Either `sparsity` or `count` must say how much to prune.",
            f"sparsity={sparsity!r}, count={count!r}",
            f"pass sparsity=, a fraction in [0, 1], or count=, an int between 0 and {size}; not both",
        )
    return check_count(count, size) if sparsity is None else round(check_fraction(sparsity) * size)


def least(min_per_layer: object, left: Sequence[int], keep: int) -> list[int]:
    """The least number of entries that each layer keeps, of those that are not pruned yet; raises as `select`."""
    if not is_count(min_per_layer):
        raise AmountError(
            "`min_per_layer` must be a whole number of at least 0.", f"{min_per_layer!r}", "pass a count of entries"
        )
    bounds = [min(int(min_per_layer), n) for n in left]
    if sum(bounds) > keep:
        raise AmountError(
            "Every layer must be able to keep `min_per_layer` entries within the count that is kept in all.",
            f"{min_per_layer} for each of {len(left)} layers, {keep} entries kept in all",
            "lower min_per_layer or the sparsity",
        )
    return bounds


def _check_pattern(pattern: object, scores: Mapping[Target, Tensor], others: Mapping[str, object]) -> None:
    alone = others == {"sparsity": None, "count": None, "scope": "global", "min_per_layer": 0}
    if not isinstance(pattern, NofM) or not alone:
        raise ArgumentError(
            "`pattern` must be a NofM, given without sparsity, count, scope and min_per_layer.",
            f"{pattern!r} and {others}",
            'pass pattern=NofM(2, 4, along="input") alone',
        )
    misfits = [described(where, score) for where, score in scores.items() if not pattern.fits(score.shape)]
    if misfits:
        raise SelectionError(
            f"The dimension along which {pattern} is to hold must be divisible by m.",
            f"not so in {listed(misfits)}",
            "leave these out: {where: s for where, s in scores.items() if pattern.fits(s.shape)}",
        )
