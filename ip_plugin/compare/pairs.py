"""Criteria with filter variety against the same ones without it: pairs of runs with equal seed, and a paired test."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ip_plugin.adapters import VARIED

from .cell import Result
from .config import Run, Space, Study
from .spread import Spread


@dataclass(frozen=True)
class Pair:
    """One criterion with variety and without, at one sparsity in one space, over the seeds that have both.

    Attributes:
        criterion, sparsity, space: which; the criterion by its name without variety.
        without, varied: accuracies in percent.
        differences: with variety minus without, by seed, in percentage points.
    """

    criterion: str
    sparsity: float
    space: Space
    without: Spread
    varied: Spread
    differences: Mapping[int, float]

    @property
    def difference(self) -> Spread:
        """Of the differences."""
        found = Spread.of(list(self.differences.values()))
        assert found is not None
        return found

    @property
    def p(self) -> float | None:
        """Of a paired t-test, two-sided."""
        return p_value(list(self.differences.values()))


def p_value(differences: Sequence[float]) -> float | None:
    """How likely differences of this mean or more, to either side, are by chance (t-test); None if none can be said.

    >>> round(p_value([1.0, 2.0, 3.0]), 4)
    0.0742
    """
    if len(differences) < 2 or len(set(differences)) < 2:
        return None
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(differences, 0.0).pvalue)


def pairs(study: Study, results: Mapping[Run, Result]) -> list[Pair]:
    """Of a study's criteria those that it has with variety and without, where both have been run."""
    found = []
    for criterion in study.criteria:
        for sparsity in study.sparsities if criterion + VARIED in study.criteria else ():
            for space in study.spaces:
                cells = {seed: Run(criterion, sparsity, space, seed) for seed in study.seeds}
                both = {
                    seed: (results[run].accuracy, results[varied].accuracy)
                    for seed, run in cells.items()
                    if run in results and (varied := run._replace(criterion=criterion + VARIED)) in results
                }
                without, with_it = (Spread.of([pair[n] for pair in both.values()]) for n in (0, 1))
                if without is not None and with_it is not None:
                    differences = {seed: varied - plain for seed, (plain, varied) in both.items()}
                    found.append(Pair(criterion, sparsity, space, without, with_it, differences))
    return found


def overall(found: Sequence[Pair]) -> list[float]:
    """The mean difference over all lines, of each seed that has them all: one number for each training."""
    seeds = [seed for seed in found[0].differences if all(seed in pair.differences for pair in found)] if found else []
    return [statistics.fmean(pair.differences[seed] for pair in found) for seed in seeds]


HEADERS = ("criterion", "sparsity", "space", "without %", "with variety %", "difference", "p")


def cells(pair: Pair) -> list[str]:
    """A pair as text, for a table."""
    short = {"spatial": "SP", "interspace": "IP"}[pair.space]
    numbers = [str(pair.without), str(pair.varied), pair.difference.signed, shown(pair.p)]
    return [pair.criterion, f"{pair.sparsity:.4g}", short, *numbers]


def shown(p: float | None) -> str:
    """As it is printed.

    >>> shown(0.0004), shown(0.25), shown(None)
    ('< 0.001', '0.25', '–')
    """
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def remarks(found: Sequence[Pair]) -> list[str]:
    """What the pairs say together; losses, and how much chance could do, included."""
    if not found:
        return []
    ahead = sum(pair.difference.mean > 0 for pair in found)
    clear = [pair for pair in found if pair.p is not None and pair.p < 0.05]
    gains = sum(pair.difference.mean > 0 for pair in clear)
    text = (
        f"With filter variety the mean is higher in {ahead} of {len(found)} lines. A paired t-test has p < 0.05 in "
        f"{gains} lines where it is higher and in {len(clear) - gains} where it is lower; by chance alone that is one "
        "line in twenty."
    )
    means = overall(found)
    spread = Spread.of(means)
    if spread is not None and spread.count > 1:
        text += f" Mean over all lines, by seed: {spread.signed} (p = {shown(p_value(means))})."
    return [text]
