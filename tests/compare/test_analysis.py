"""What an analysis says of results: which runs are paired, and what tables and sentences say of them."""

from __future__ import annotations

import io
import math
import runpy
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_up import analysis as made_up
from made_up import results
from rich.console import Console
from scipy.stats import ttest_rel

from ip_plugin.compare.analysis import RUN, Analysis
from ip_plugin.compare.answer import answer, caution, headline, interval, points, probability, remarks
from ip_plugin.compare.report import show
from ip_plugin.compare.store import Results
from ip_plugin.compare.tables import accuracy_table, control_table, cost_table, overall_table, tables

ROOT = Path(__file__).parents[2]
CRITERIA = ("tp:l1+variety", "tp:l1", "torch:l1")
GRID = [*product(CRITERIA, (0.3, 0.5), ("spatial", "interspace"), range(3)),
        *product(("dense",), (0.0,), ("spatial", "interspace"), range(3))]  # fmt: skip


def made(criterion: str, sparsity: float, space: str, seed: int) -> float:
    """80, 81, 82 without variety; with it 1, 2, 3 more at 0.3, and 3, 2, 4 less at 0.5 in the interspace."""
    accuracy = 80.0 + seed
    if criterion.endswith("+variety"):
        return accuracy - (3, 2, 4)[seed] if sparsity == 0.5 and space == "interspace" else accuracy + 1 + seed
    if criterion == "torch:l1" and space == "interspace":
        accuracy += (2.0, 4.0, 3.0)[seed]
    return accuracy + 10 * (criterion == "dense") + (criterion == "dense" and space == "interspace")


def frame(rows: list[tuple[Any, ...]] = GRID) -> pd.DataFrame:
    return pd.DataFrame([(*row, made(*row)) for row in rows], columns=[*RUN, "accuracy"])


def study(**changes: Any) -> SimpleNamespace:
    axes = {"criteria": CRITERIA, "sparsities": (0.3, 0.5), "spaces": ("spatial", "interspace"), "seeds": (0, 1, 2)}
    return SimpleNamespace(**axes | changes)


def texts(rows: Any) -> list[list[str]]:
    return [[entry.text for entry in row] for row in rows]


def test_the_results_are_a_tidy_frame_in_the_order_of_the_study() -> None:
    shuffled = frame().sample(frac=1, random_state=0)
    ordered = Analysis(study(), shuffled).results
    expected = frame([*GRID[-6:], *GRID[:-6]])  # dense networks come first
    pd.testing.assert_frame_equal(ordered[[*RUN, "accuracy"]], expected, check_dtype=False)
    assert ordered["macs_left"].isna().all()
    assert len(Analysis(study(seeds=(1,)), shuffled).results) == len(GRID) / 3
    assert Analysis(None, shuffled).criteria == list(
        dict.fromkeys(shuffled["criterion"].drop(shuffled.index[shuffled["criterion"] == "dense"]))
    )


def test_spaces_are_paired_by_criterion_sparsity_and_seed() -> None:
    analysis = Analysis(study(), frame())
    row = analysis.differences.loc["space", "torch:l1", 0.3, "interspace"]
    assert (row["first"], row["second"], row["mean"], row["std"], row["count"]) == (81, 84, 3, 1, 3)
    expected = ttest_rel([82, 85, 85], [80, 81, 82])
    assert row["p"] == pytest.approx(expected.pvalue)
    ends = expected.confidence_interval()
    assert (row["low"], row["high"]) == pytest.approx((ends.low, ends.high))
    # Dense networks differ by 1 with every seed; 2, 4, 3 less 1.
    assert row["beyond_dense"] == 2 and row["beyond_low"] == pytest.approx(ends.low - 1)
    assert math.isnan(analysis.differences.loc[("space", "dense", 0.0, "interspace"), "p"])


def test_the_overall_effect_by_hand() -> None:
    analysis = Analysis(study(), frame())
    row = analysis.overall.loc["space", "interspace"]
    # By seed: tp:l1+variety (0 - 4) / 2, (0 - 4) / 2, (0 - 7) / 2; tp:l1 0; torch:l1 2, 4, 3.
    by_seed = [(-2 + 0 + 2) / 3, (-2 + 0 + 4) / 3, (-3.5 + 0 + 3) / 3]
    expected = ttest_rel(by_seed, [0, 0, 0])
    assert row["mean"] == pytest.approx(np.mean(by_seed)) and row["p"] == pytest.approx(expected.pvalue)
    assert (row["count"], row["cells"]) == (3, 6)
    assert (row["wins"], row["ties"], row["losses"]) == (2, 3, 1)
    # tp:l1+variety: three ties and three losses; tp:l1: six ties; torch:l1: six wins.
    assert row["better"] == pytest.approx((0.25 + 0.5 + 1) / 3)
    assert math.isnan(row["boot_low"]) and row["beyond_dense"] == pytest.approx(row["mean"] - 1)
    wide = Analysis(study(), frame(), margin=3.5).overall.loc["space", "interspace"]
    assert (wide["wins"], wide["ties"], wide["losses"]) == (0, 5, 1)


def test_variety_and_controls_are_paired_with_the_criterion_without_them() -> None:
    analysis = Analysis(study(), frame())
    assert analysis.differences.loc["variety"]["mean"].tolist() == [2, 2, 2, -3]
    assert texts(control_table(analysis).rows)[3][:7] == [
        "filter variety",
        "tp:l1",
        "IP",
        "50 %",
        "81.0",
        "78.0",
        "−3.0",
    ]
    made = made_up(
        criteria=("torch:l1", "torch:l1+shuffled", "torch:l1+reinit"),
        spaces=("spatial", "interspace", "interspace(frozen=true)"),
    )
    comparisons = made.pairs.groupby("comparison", sort=False)
    assert comparisons.size().to_dict() == {"space": 2 * 10 * 6, "frozen": 10 * 6, "shuffled": 54, "reinit": 54}
    one = made.pairs[made.pairs["comparison"] == "frozen"].iloc[7]
    runs = made.results.set_index(RUN)["accuracy"]
    assert one["second"] == runs[one["criterion"], one["sparsity"], "interspace(frozen=true)", one["seed"]]
    assert one["first"] == runs[one["criterion"], one["sparsity"], "interspace", one["seed"]]
    # Controls are no proposals: they are not part of the answer.
    assert made.overall.loc[("space", "interspace"), "cells"] == 3
    assert set(made.differences.loc["space"].loc["torch:l1+shuffled"]["family"]) == {"control cells"}


def test_only_pairs_of_equal_seed_count() -> None:
    some = [row for row in GRID if row not in (("tp:l1", 0.3, "spatial", 1), ("tp:l1+variety", 0.5, "spatial", 0))]
    analysis = Analysis(study(), frame(some))
    assert analysis.differences.loc["variety", "tp:l1", 0.3, "spatial"][["mean", "count"]].tolist() == [2.0, 2.0]
    assert analysis.differences.loc[("space", "tp:l1", 0.3, "interspace"), "count"] == 2
    overall = analysis.overall.loc["space", "interspace"]
    assert (overall["count"], overall["cells"]) == (1, 6) and math.isnan(overall["p"])  # seed 2 alone has all cells
    assert analysis.missing() == 2 and "2 of 42 runs are missing" in caution(analysis)
    failed = frame()
    failed.loc[3, "accuracy"] = np.nan
    assert len(Analysis(study(), failed).results) == len(GRID) - 1


def test_one_space_and_nothing_at_all_are_shown() -> None:
    alone = Analysis(study(spaces=("interspace",)), frame())
    assert accuracy_table(alone).headers == ["criterion", "space", "sparsity", "accuracy %", "parameters left"]
    assert "nothing to compare" in headline(alone) and set(alone.overall.index) == {("variety", "interspace")}
    nothing = Analysis(study(), frame([]))
    assert texts(accuracy_table(nothing).rows)[0] == ["tp:l1+variety", "30 %", *"–––––––"]
    assert "no overall answer" in headline(nothing) and [table.name for table in tables(nothing)] == ["accuracy"]
    assert Analysis(None, frame([])).accuracy.empty


def test_the_table_by_hand() -> None:
    analysis = Analysis(study(criteria=("torch:l1",), sparsities=(0.3,)), frame())
    p = ttest_rel([82, 85, 85], [80, 81, 82]).pvalue
    assert texts(accuracy_table(analysis).rows) == [
        ["dense", "0 %", "91.0 ± 1.0", "92.0 ± 1.0", "+1.0", "–", "–", "–", "–"],
        # Weights: overall 1/2, cells 1/4 each. The overall effect is first: p / (1/2); then p / (1/4) * (1/4 + 1/4).
        ["torch:l1", "30 %", "81.0 ± 1.0", "84.0 ± 1.7", "+3.0", "+0.5 to +5.5", probability(2 * p), "+2.0", "–"],
    ]  # fmt: skip
    table = accuracy_table(analysis)
    assert table.markdown().splitlines()[3] == "| " + " | ".join(texts(table.rows)[1]) + " |"
    assert r"torch:l1 & 30 \% & 81.0 $\pm$ 1.0" in table.latex() and r"IP $-$ SP" in table.latex()


@pytest.mark.parametrize("seeds", [1, 2, 6])
def test_no_deviation_and_no_interval_of_one_seed(seeds: int) -> None:
    analysis = made_up(seeds=seeds)
    words = " ".join(entry.text for table in tables(analysis) for row in table.rows for entry in row)
    assert ("±" in words) == (seeds > 1) and "nan" not in words
    assert (" to " in words) == (seeds > 1)
    assert ("One seed cannot answer" in headline(analysis)) == (seeds == 1)
    said = (
        "1 seed: nothing"
        if seeds == 1
        else "2 seeds: with fewer than 6 no rank test can reach p = 0.05 (least: 0.5)"
        if seeds == 2
        else ""
    )
    assert caution(analysis).startswith(said if seeds < 6 else "") and bool(caution(analysis)) == (seeds < 6)
    assert analysis.overall["boot_low"].notna().any() == (seeds == 6)


@pytest.mark.parametrize(
    ("effect", "words"),
    [(1.0, "(IP) is more accurate"), (-1.0, "(IP) is less accurate"), (0.0, "No overall difference is shown")],
)
def test_the_answer_says_what_the_tests_show(effect: float, words: str) -> None:
    analysis = made_up(effect=effect)
    lines = answer(analysis)
    assert words in lines[0] and len(lines) <= 5
    cells = analysis.differences[analysis.differences["family"] == "cells"].drop("dense", level="criterion")
    up, down = ((cells["significant"] & (sign * cells["mean"] > 0)).sum() for sign in (1, -1))
    assert f"more accurate in {up} of 6 and less accurate in {down}." in lines[1]
    assert points(analysis.overall.loc[("space", "interspace"), "mean"]) in lines[0]
    dense = analysis.differences.loc["space", "dense", 0.0, "interspace"]
    assert f"by {points(dense['mean'])} ({interval(dense)})" in lines[3]
    if effect == -1.0:
        assert "below that of SP in 6 of 7 rows" in remarks(analysis)[0] or "in 7 of 7 rows" in remarks(analysis)[0]


def test_several_settings_of_the_interspace_are_told_apart() -> None:
    analysis = made_up(spaces=("spatial", "interspace", "interspace(basis=dct, sharing=layer)"))
    assert "Of 2 interspace settings 2 are more accurate" in headline(analysis)
    assert {row[1].text for row in accuracy_table(analysis).rows} == {"IP", "IP(basis=dct, sharing=layer)"}
    assert len(answer(analysis)) <= 5


def test_costs_of_every_space() -> None:
    arguments = results(seeds=2)
    frame = arguments["results"]
    frame["latency_ms"] = np.where(frame["space"] == "spatial", 0.5, 0.25)
    frame["dense_latency_ms"] = 1.0 + frame["seed"]
    table = cost_table(Analysis(**arguments))
    assert table.headers[3:] == [
        "parameters left",
        "multiply-adds left",
        "file KB",
        "sparse µs",
        "dense µs",
        "times faster",
    ]
    assert texts(table.rows)[3][:7] == ["torch:random", "IP", "90 %", "5,622", "232,511", "23.8", "250"]
    assert texts(table.rows)[3][-1] == "6.00 ± 2.83" and "medians of 200 calls" in table.caption
    assert not cost_table(Analysis(study(), frame[["accuracy", *RUN]])).rows


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_console_shows_whole_numbers_and_the_answer_last(width: int) -> None:
    out = io.StringIO()
    analysis = made_up(
        spaces=("spatial", "interspace", "interspace(basis=dct, sharing=layer)")
        if width > 100
        else ("spatial", "interspace")
    )
    show(analysis, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    if width >= 80:
        row = analysis.differences.loc["space", "torch:random", 0.98, "interspace"]
        assert any(f"{points(row['mean'])} {interval(row)}" in " ".join(line.split()) for line in lines)
    assert " ".join(" ".join(lines).split()).endswith(" ".join(f"- {line}" for line in answer(analysis)))


def test_folders_of_the_repository_are_read() -> None:
    analysis = Results.read(ROOT / "benchmarks" / "results" / "digits").analysis()
    assert len(analysis.results) == 60 and "more accurate than spatial" in headline(analysis)
    assert [row[4].text for row in accuracy_table(analysis).rows][2] == "+17.3"


def test_the_table_of_the_readme(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme_tables.py"))
    script["variety_table"].__globals__["measured"] = lambda folder: Analysis(study(), frame())
    title = "channels by group magnitude (L1), after training"
    assert script["variety_table"](tmp_path).splitlines() == [
        "| criterion | at 30 % | with variety | p | at 50 % | with variety | p |",
        "| --- | --: | --: | --: | --: | --: | --: |",
        f"| {title}, SP | 81.0 ± 1.0 | +2.0 ± 1.0 | 0.074 | 81.0 ± 1.0 | +2.0 ± 1.0 | 0.074 |",
        # t = 3 / (1 / sqrt(3)) = 5.196 with two degrees of freedom.
        f"| {title}, IP | 81.0 ± 1.0 | +2.0 ± 1.0 | 0.074 | 81.0 ± 1.0 | **−3.0 ± 1.0** | 0.035 |",
    ]


def test_words_for_p_values() -> None:
    assert [probability(p) for p in (0.0009, 0.001, 0.0512, math.nan)] == ["< 0.001", "0.001", "0.051", "–"]
    assert overall_table(made_up()).rows[0][4].text == "< 0.001 *"
