"""Paired comparisons over seeds: intervals and tests, the correction for many tests, a stratified bootstrap.

Functions of arrays whose last axis is the seeds; NaN where a seed has not been run. Any leading axes are batches.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating[Any]]

#: The level of all tests of a study together, and the confidence of every interval.
LEVEL, CONFIDENCE = 0.05, 0.95
#: With fewer seeds no rank test can reach the level: the least p-value of a signed-rank test is 2 / 2 ** seeds.
ENOUGH_SEEDS = 6


@dataclass(frozen=True)
class Paired:
    """Differences over seeds: how many, their mean and standard deviation, the t interval of the mean, p of a t-test.

    Interval and p-value are NaN where all differences are equal: a t-test says nothing of them.
    """

    count: Floats
    mean: Floats
    std: Floats
    low: Floats
    high: Floats
    p: Floats


def paired(differences: ArrayLike) -> Paired:
    """The 95 % t interval and the two-sided paired t-test of differences over the last axis.

    >>> result = paired([1.0, 2.0, 3.0])
    >>> round(float(result.p), 4), round(float(result.low), 3), round(float(result.high), 3)
    (0.0742, -0.484, 4.484)
    """
    from scipy.stats import t

    values = np.asarray(differences, dtype=float)
    known = ~np.isnan(values)
    count = known.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, values, 0.0).sum(-1) / count
        squares = np.where(known, (values - mean[..., None]) ** 2, 0.0).sum(-1)
        std = np.sqrt(squares / np.where(count > 1, count - 1, np.nan))
        # Differences of equal floats are equal up to rounding only.
        error = np.where(std > 1e-9, std / np.sqrt(count), np.nan)
        p = 2 * t.sf(np.abs(mean) / error, count - 1)
        reach = t.ppf((1 + CONFIDENCE) / 2, count - 1) * error
    return Paired(count, mean, std, mean - reach, mean + reach, p)


def holm(p: ArrayLike, weights: ArrayLike) -> Floats:
    """Adjusted p-values of Holm's sequential method with weights (Holm 1979), over the last axis.

    Rejecting where they are at most `LEVEL` makes any false claim at all with at most that probability, however the
    tests depend on each other. A NaN stays NaN, and keeps its weight as a test that is never rejected.

    >>> holm([0.01, 0.04, 0.03], [1, 1, 1]).round(6).tolist()
    [0.03, 0.06, 0.06]
    """
    values, share = np.broadcast_arrays(np.asarray(p, dtype=float), np.asarray(weights, dtype=float))
    filled = np.where(np.isnan(values), 1.0, values)
    order = np.argsort(filled / share, axis=-1, kind="stable")
    ratio, share = (np.take_along_axis(array, order, -1) for array in (filled / share, share))
    remaining = np.flip(np.cumsum(np.flip(share, -1), -1), -1)
    stepped = np.minimum(np.maximum.accumulate(ratio * remaining, axis=-1), 1.0)
    adjusted = np.take_along_axis(stepped, np.argsort(order, axis=-1), -1)
    return np.where(np.isnan(values), np.nan, adjusted)


def family_weights(families: Sequence[str]) -> Floats:
    """Weights for `holm`: families share the level equally, and so do the tests of a family.

    >>> family_weights(["overall", "cells", "cells"]).tolist()
    [0.5, 0.25, 0.25]
    """
    _, members, sizes = np.unique(np.asarray(families, dtype=str), return_inverse=True, return_counts=True)
    return 1.0 / (len(sizes) * sizes[members])


def bootstrap(values: Sequence[ArrayLike], draws: int = 10_000) -> tuple[float, float]:
    """The 95 % percentile interval of the mean over strata, each resampled over its own last axis.

    It is too narrow for few seeds, and takes strata as independent: it describes, and claims rest on `paired`.
    """
    generator = np.random.default_rng(0)
    means = np.zeros(draws)
    for stratum in values:
        known = np.asarray(stratum, dtype=float)
        known = known[~np.isnan(known)]
        means += known[generator.integers(len(known), size=(draws, len(known)))].mean(1) / len(values)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def mean(values: Iterable[float]) -> float:
    """The mean, correctly rounded, so that printed digits do not depend on the order of the values."""
    return statistics.fmean(values)


def std(values: Sequence[float]) -> float:
    """The sample standard deviation, correctly rounded; NaN for one value."""
    return statistics.stdev(values) if len(values) > 1 else float("nan")
