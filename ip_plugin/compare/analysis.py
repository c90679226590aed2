"""What the results of a study say, as pandas tables: read by the console, the report, the README and Python users."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import pandas as pd

from ip_plugin.adapters import VARIED

from .config import DENSE, Study

_KEYS = ["criterion", "sparsity", "space"]


class Analysis:
    """The results of a study and what they say, in tidy tables.

    In tables over the seeds, ``mean`` and ``std`` are the mean and the sample standard deviation (0 for one value), and
    ``count`` is the number of seeds. Rows are in the order of the study.

    Args:
        study: the grid; results outside of it are left out.
        results: one row for each cell that has been run, as `Results.frame` gives them.

    Attributes:
        results: one row for each cell that has been run; the columns of ``results.csv``.
        accuracy: test accuracy in percent, by criterion, sparsity and space; NaN where nothing has been run.
        space_pairs: accuracies of cells that differ in the space alone, by criterion, sparsity and seed, and the
            ``difference`` interspace minus spatial.
        space_difference: that difference over the seeds, by criterion and sparsity; NaN where there are no pairs.
        variety_pairs: accuracies of cells that differ in filter variety alone, by criterion (without variety),
            sparsity, space and seed, and the ``difference`` with variety minus without.
        variety: the same over the seeds, where there are pairs; the difference with ``p_value``.
        deployment: bytes and latencies over the seeds, by criterion, sparsity and space, where they were measured;
            ``speedup`` is that of each cell, dense over pruned.
    """

    def __init__(self, study: Study, results: pd.DataFrame, *more: object) -> None:  # noqa: ARG002
        self.study = study
        self.results = runs = results[results["criterion"] != DENSE].astype(
            dict.fromkeys(("macs", "macs_left", "file_bytes"), float)
        )

        grid = pd.MultiIndex.from_product([study.criteria, study.sparsities, study.spaces], names=_KEYS)
        self.accuracy = _over_seeds(runs.set_index(_KEYS)["accuracy"], _KEYS).reindex(grid)

        spatial, inter = (runs[runs["space"] == space] for space in ("spatial", "interspace"))
        self.space_pairs = _paired({"spatial": spatial, "interspace": inter}, _KEYS[:2])
        grid = pd.MultiIndex.from_product([study.criteria, study.sparsities], names=_KEYS[:2])
        self.space_difference = _over_seeds(self.space_pairs["difference"], _KEYS[:2]).reindex(grid)

        has_variety = runs["criterion"].str.endswith(VARIED)
        varied = runs[has_variety].assign(criterion=runs["criterion"].str.removesuffix(VARIED))
        self.variety_pairs = _paired({"without": runs[~has_variety], "varied": varied}, _KEYS)
        self.variety = self.variety_pairs.groupby(level=_KEYS, sort=False).agg(
            {"without": [mean, std], "varied": [mean, std], "difference": [mean, std, p_value]}
        )

        costs = runs.dropna(subset="file_bytes").set_index(_KEYS)[["file_bytes", "latency_ms", "dense_latency_ms"]]
        costs["speedup"] = costs["dense_latency_ms"] / costs["latency_ms"]
        self.deployment = costs.groupby(level=_KEYS, sort=False).agg([mean, std])

    def variety_by_seed(self) -> pd.Series:
        """The difference that variety makes, averaged over all rows of `variety`, for each seed that has them all."""
        by_seed = self.variety_pairs.groupby(level="seed", sort=False)["difference"].agg([mean, "count"])
        return by_seed.loc[by_seed["count"] == len(self.variety), "mean"]


def mean(values: Iterable[float]) -> float:
    """The mean, correctly rounded, so that printed digits do not depend on the order of the values."""
    return statistics.fmean(values)


def std(values: Sequence[float]) -> float:
    """The sample standard deviation, correctly rounded; 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def p_value(differences: Sequence[float]) -> float:
    """The two-sided p-value of a paired t-test, from the differences of the pairs; NaN if there is none.

    >>> round(p_value([1.0, 2.0, 3.0]), 4)
    0.0742
    """
    if len(set(differences)) < 2:
        return math.nan
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(differences, 0.0).pvalue)


def _over_seeds(values: pd.Series, keys: list[str]) -> pd.DataFrame:
    return values.groupby(level=keys, sort=False).agg([mean, std, "count"])


def _paired(runs: dict[str, pd.DataFrame], keys: list[str]) -> pd.DataFrame:
    """The accuracies of two sets of runs that agree in the keys and the seed, and second minus first."""
    keys = [*keys, "seed"]
    first, second = (rows.rename(columns={"accuracy": name})[[*keys, name]] for name, rows in runs.items())
    pairs = first.merge(second, on=keys).set_index(keys)
    return pairs.assign(difference=pairs.iloc[:, 1] - pairs.iloc[:, 0])
