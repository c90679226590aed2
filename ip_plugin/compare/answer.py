"""What the results of a study say, in words. Nothing is called a difference that no test has shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from .analysis import Analysis
from .config import DENSE
from .statistics import ENOUGH_SEEDS

COMPARISONS = {
    "space": "IP − SP",
    "shuffled": "shuffled mask",
    "reinit": "values drawn anew",
    "variety": "filter variety",
    "frozen": "frozen basis",
}


def answer(analysis: Analysis) -> list[str]:
    """At most five lines: overall, by cell, the probability, the dense networks' share, and what weakens the answer."""
    lines = [headline(analysis), _by_cell(analysis), _probability(analysis), _dense(analysis), caution(analysis)]
    return [line for line in lines if line]


def headline(analysis: Analysis) -> str:
    """The answer in one sentence."""
    overall = spaces(analysis)
    if not analysis.interspaces or "spatial" not in analysis.spaces:
        return "One kind of space was run alone, so there is nothing to compare: these are accuracies."
    if overall.empty or not (overall["count"] > 0).any():
        return "No seed has every cell of the study in both spaces yet, so there is no overall answer."
    best = _best(overall)
    if len(overall) > 1:
        better, worse = ((overall["significant"] & (sign * overall["mean"] > 0)).sum() for sign in (1, -1))
        return (
            f"Of {len(overall)} interspace settings {better} {_are(better)} more accurate than spatial pruning (SP) "
            f"overall and {worse} {_are(worse)} less accurate; the largest mean difference is that of "
            f"{analysis.label(str(best.name))}: {_effect(best)}."
        )
    if best["significant"]:
        word = "more" if best["mean"] > 0 else "less"
        return f"Interspace pruning (IP) is {word} accurate than spatial pruning (SP): {_effect(best)}."
    if best["count"] < 2:
        return (
            f"One seed cannot answer the question: IP − SP is {points(best['mean'])} points on average over "
            f"{cells(best['cells'])}, without a test."
        )
    return f"No overall difference is shown between interspace (IP) and spatial pruning (SP): {_effect(best)}."


def spaces(analysis: Analysis) -> pd.DataFrame:
    """The overall effect of every interspace value, by space."""
    frame = analysis.overall
    return frame.loc["space"] if "space" in frame.index.get_level_values(0) else frame.iloc[:0]


def _effect(row: pd.Series) -> str:
    text = f"{points(row['mean'])} points on average over {cells(row['cells'])}"
    if pd.isna(row["low"]):
        return text
    return f"{text} (95 % interval {interval(row)}, {p_text(row['p_holm'])})"


def _by_cell(analysis: Analysis) -> str:
    frame = analysis.differences
    tested = frame[(frame["family"] == "cells") & (frame["count"] >= 2)]
    tested = tested[tested.index.get_level_values("criterion") != DENSE]
    if tested.empty:
        return ""
    up, down = ((tested["significant"] & (sign * tested["mean"] > 0)).sum() for sign in (1, -1))
    wins, ties, losses = (int(spaces(analysis)[name].sum()) for name in ("wins", "ties", "losses"))
    return (
        f"Cell by cell the tests show IP to be more accurate in {up} of {len(tested)} and less accurate in {down}. "
        f"By means alone, with a margin of {analysis.margin:g} points: {count(wins, 'win')}, "
        f"{count(ties, 'tie')}, {count(losses, 'loss', 'losses')}."
    )


def _probability(analysis: Analysis) -> str:
    overall = spaces(analysis)
    if not (overall["count"] >= 2).any():
        return ""
    best = _best(overall)
    text = f"{100 * best['better']:.0f} %"
    if best["better_low"] < best["better_high"]:
        text += f" (bootstrap interval {100 * best['better_low']:.0f} to {100 * best['better_high']:.0f} %)"
    pairs = count(int(best["cells"] * best["count"]), "pair")
    name = analysis.label(str(best.name))
    return f"Probability that {name} is more accurate in a pair of runs, estimated from {pairs}: {text}."


def _dense(analysis: Analysis) -> str:
    overall = spaces(analysis)
    if not overall["beyond_dense"].notna().any():
        return ""
    best = _best(overall)
    dense, name = analysis.differences.loc["space", DENSE, 0.0, best.name], analysis.label(str(best.name))
    beyond = {"low": best["beyond_low"], "high": best["beyond_high"]}
    return (
        f"Networks that are not pruned differ, {name} − SP, by {points(dense['mean'])}{_brackets(dense)} points; "
        "pruned "
        f"networks by {points(best['beyond_dense'])}{_brackets(beyond)} more than that."
    )


def _best(overall: pd.DataFrame) -> pd.Series:
    """The interspace value with the largest mean difference."""
    return overall.loc[overall["mean"].idxmax()]


def caution(analysis: Analysis) -> str:
    """What weakens the answer: few seeds, runs that are missing; empty if nothing does."""
    seeds, texts = len(analysis.seeds), []
    if 1 < seeds < ENOUGH_SEEDS:
        texts.append(
            f"{seeds} seeds: with fewer than {ENOUGH_SEEDS} no rank test can reach p = 0.05 (least: "
            f"{2 / 2**seeds:.2g}), so everything rests on normally distributed differences."
        )
    elif seeds == 1:
        texts.append(f"1 seed: nothing can be tested; run at least {ENOUGH_SEEDS}.")
    if missing := analysis.missing():
        texts.append(
            f"{missing} of {missing + len(analysis.results)} runs are missing; tests hold if the number of "
            "seeds was fixed before the first look."
        )
    return " ".join(texts)


def remarks(analysis: Analysis) -> list[str]:
    """What a reader must know to read the tables rightly."""
    return [*_losses(analysis), *_control_remarks(analysis), *_network_remarks(analysis)]


def _losses(analysis: Analysis) -> Iterable[str]:
    frame = analysis.differences[analysis.differences["family"] == "cells"].dropna(subset="mean")
    below = frame[frame["mean"] < 0]
    if len(frame):
        names = [f"{c} at {100 * s:g} %" if c != DENSE else "dense networks" for _, c, s, _ in below.index]
        text = f": {listed(list(dict.fromkeys(names)), 8)}" if names else ""
        yield f"The mean of IP is below that of SP in {len(below)} of {len(frame)} rows{text}."


def _control_remarks(analysis: Analysis) -> Iterable[str]:
    for (comparison, space), row in analysis.overall.iterrows():
        if comparison == "space" or pd.isna(row["mean"]):
            continue
        shown = "a difference is shown" if row["significant"] else "no difference is shown"
        name = COMPARISONS.get(comparison, comparison)
        yield f"{name[:1].upper()}{name[1:]}, {analysis.label(space)}: {_effect(row)}; {shown}."


def _network_remarks(analysis: Analysis) -> Iterable[str]:
    results = analysis.results
    if "spatial_layers" not in results:
        return
    unpaid = results[results["spatial_layers"].fillna("") != ""]
    for (criterion, sparsity), texts in unpaid.groupby(["criterion", "sparsity"], sort=False)["spatial_layers"]:
        names = dict.fromkeys(" ".join(texts).split())
        yield (
            f"{criterion} at {100 * sparsity:g} %: layer {', '.join(names)} stayed spatial in the interspace runs, "
            "as the "
            "budget would not pay for the basis."
        )


def points(value: float, digits: int = 1) -> str:
    """A difference in points, with its sign.

    >>> points(-0.25, 2), points(0.04), points(float("nan"))
    ('−0.25', '0.0', '–')
    """
    if pd.isna(value):
        return "–"
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def interval(row: pd.Series | dict[str, float], digits: int = 1) -> str:
    """An interval by its ends.

    >>> interval({"low": -0.5, "high": 1.25})
    '−0.5 to +1.2'
    """
    if pd.isna(row["low"]):
        return "–"
    return f"{points(row['low'], digits)} to {points(row['high'], digits)}"


def _brackets(row: pd.Series | dict[str, float]) -> str:
    return "" if pd.isna(row["low"]) else f" ({interval(row)})"


def probability(p: float) -> str:
    """A p-value.

    >>> probability(0.0004), probability(0.25), probability(float("nan"))
    ('< 0.001', '0.25', '–')
    """
    return "–" if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.2g}"


def p_text(p: float) -> str:
    """A corrected p-value in a sentence."""
    if pd.isna(p):
        return "no test"
    return "p < 0.001 after correction" if p < 0.001 else f"p = {p:.2g} after correction"


def cells(number: float) -> str:
    """A number of cells."""
    return count(int(number), "cell")


def count(number: int, one: str, more: str | None = None) -> str:
    """A number and its noun.

    >>> count(1, "tie"), count(2, "loss", "losses")
    ('1 tie', '2 losses')
    """
    return f"{number} {one if number == 1 else more or one + 's'}"


def listed(names: Sequence[str], most: int = 4) -> str:
    """Names in a sentence.

    >>> listed(["a", "b", "c"]), listed("abcdef")
    ('a, b and c', 'a, b, c, d and 2 more')
    """
    shown = [*names[:most], *[f"{len(names) - most} more"] * (len(names) > most)]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _are(number: int) -> str:
    return "is" if number == 1 else "are"
