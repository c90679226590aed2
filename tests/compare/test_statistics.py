"""Statistics against scipy, statsmodels and cases by hand, and how often studies without any effect make a claim."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ip_plugin.compare.analysis import RUN, Analysis
from ip_plugin.compare.statistics import LEVEL, bootstrap, family_weights, holm, mean, paired, std

FIRST, SECOND = np.array([61.2, 63.0, 60.5, 64.1, 62.2, 61.7]), np.array([62.0, 62.9, 61.9, 64.8, 63.3, 61.9])


def test_interval_and_test_are_those_of_scipy() -> None:
    result, expected = paired(SECOND - FIRST), stats.ttest_rel(SECOND, FIRST)
    interval = expected.confidence_interval(0.95)
    assert result.p == pytest.approx(expected.pvalue)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high))
    assert (result.count, result.mean) == (6, pytest.approx(np.mean(SECOND - FIRST)))
    assert result.std == pytest.approx(np.std(SECOND - FIRST, ddof=1))


def test_the_paired_test_by_hand() -> None:
    t = 2 / (1 / math.sqrt(3))
    assert paired([1, 2, 3]).p == pytest.approx(1 - t / math.sqrt(2 + t * t))  # two degrees of freedom, in closed form
    # One degree of freedom: Cauchy's distribution, whose quantile of 97.5 % is tan(0.475 pi).
    assert paired([1.0, 3.0]).high == pytest.approx(2 + math.tan(0.475 * math.pi))


def test_rows_are_independent_and_missing_seeds_are_left_out() -> None:
    rows = np.array([[1.0, 2.0, 3.0, np.nan], [4.0, np.nan, np.nan, np.nan], [np.nan] * 4, [5.0, 5.1, 4.0, 6.0]])
    together = paired(rows)
    for i, row in enumerate(rows):
        alone = paired(row[~np.isnan(row)]) if i != 2 else paired([math.nan])
        for name, values in vars(together).items():
            assert values[i] == pytest.approx(getattr(alone, name), nan_ok=True), (i, name)
    assert list(together.count) == [3, 1, 0, 4]


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [90.1 - 88.1, 91.3 - 89.3, 2.0], [0.0, 0.0, 0.0]])
def test_equal_differences_are_not_tested(values: list[float]) -> None:
    result = paired(values)
    assert math.isnan(result.p) and math.isnan(result.low) and result.mean == pytest.approx(np.mean(values))


def test_holm_by_hand() -> None:
    # 0.01 * 4; 0.02 * 3; 0.03 * 2 is below 0.06 and is lifted to it; 0.9.
    assert holm([0.03, 0.9, 0.01, 0.02], [1] * 4) == pytest.approx([0.06, 0.9, 0.04, 0.06])
    # Weights of 1/2, 1/4, 1/4: 0.02 / (1/2); then 0.02 * (1/2) / (1/4); then 0.5.
    assert holm([0.02, 0.02, 0.5], [0.5, 0.25, 0.25]) == pytest.approx([0.04, 0.04, 0.5])
    # A test that cannot be made is never rejected and keeps its weight.
    assert holm([0.01, math.nan], [1, 1]) == pytest.approx([0.02, math.nan], nan_ok=True)
    assert holm([], []).size == 0


def test_holm_with_equal_weights_is_that_of_statsmodels() -> None:
    # statsmodels.stats.multitest.multipletests(p, method="holm")[1] of statsmodels 0.15
    p = [0.001, 0.008, 0.039, 0.041, 0.042, 0.06, 0.074, 0.205]
    assert holm(p, np.ones(8)) == pytest.approx([0.008, 0.056, 0.234, 0.234, 0.234, 0.234, 0.234, 0.234])


def test_families_share_the_level_equally() -> None:
    assert family_weights(["a", "b", "b", "c"]).tolist() == [1 / 3, 1 / 6, 1 / 6, 1 / 3]


def test_the_bootstrap_by_hand() -> None:
    assert bootstrap([[2.0, 2.0], [4.0, 4.0, 4.0]]) == (3.0, 3.0)
    low, high = bootstrap([[0.0, 1.0]])
    assert (low, high) == (0.0, 1.0)
    values = np.random.default_rng(1).normal(size=200)
    expected = stats.bootstrap((values,), np.mean, method="percentile", rng=0, n_resamples=4000).confidence_interval
    assert bootstrap([values]) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert bootstrap([values, [math.nan, 1.0]])[0] < bootstrap([values, [1.0]])[1]


def test_mean_and_deviation_of_one_value() -> None:
    assert mean([0.1] * 10) == 0.1 and std([1.0, 3.0]) == pytest.approx(math.sqrt(2)) and math.isnan(std([1.0]))


def without_effect(studies: int, seeds: int, random: np.random.Generator) -> np.ndarray:
    """Accuracies of both spaces without any effect: studies, 2 criteria by 3 sparsities, 2 spaces, seeds.

    Cells of a seed depend on each other, deviations differ by a factor of 20, and images are counted, as on digits.
    """
    spread = np.array([0.3, 0.7, 6.0, 0.3, 0.3, 1.2])[:, None, None]
    shared = random.normal(size=(studies, 1, 2, seeds)) + random.normal(size=(studies, 1, 1, seeds))
    return np.round((90 + spread * (random.normal(size=(studies, 6, 2, seeds)) + shared)) * 8.99) / 8.99


def claims(accuracies: np.ndarray) -> np.ndarray:
    """Whether each study makes any claim: the pooled effect or any cell, as `Analysis` tests them."""
    differences = accuracies[:, :, 1] - accuracies[:, :, 0]
    p = np.concatenate([paired(differences.mean(1)).p[:, None], paired(differences).p], axis=1)
    return (holm(p, family_weights(["overall", *["cells"] * 6])) <= LEVEL).any(1)


@pytest.mark.parametrize("seeds", range(2, 9))
def test_at_most_one_study_in_twenty_without_effect_makes_any_claim(seeds: int) -> None:
    share = claims(without_effect(1000, seeds, np.random.default_rng(seeds))).mean()
    assert share <= 0.064, share  # 5 % and two standard errors of 1,000 studies


def test_a_test_that_claims_too_much_would_be_noticed() -> None:
    differences = np.diff(without_effect(1000, 6, np.random.default_rng(6)), axis=2)[:, :, 0]
    assert (paired(differences).p <= LEVEL).any(1).mean() > 0.15


def test_the_page_makes_the_claims_of_the_simulation() -> None:
    studies = without_effect(20, 3, np.random.default_rng(0))
    studies[::2, :3, 1] += 8  # some claims to compare
    names = [(c, s) for c in ("a:x", "a:y") for s in (0.9, 0.95, 0.98)]
    made = []
    for accuracies in studies:
        rows = [
            (*names[cell], ("spatial", "interspace")[space], seed, value)
            for (cell, space, seed), value in np.ndenumerate(accuracies)
        ]
        analysis = Analysis(None, pd.DataFrame(rows, columns=[*RUN, "accuracy"]))
        made.append(analysis.overall["significant"].any() or analysis.differences["significant"].any())
    assert made == claims(studies).tolist() and 2 < sum(made) < 18
