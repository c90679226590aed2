"""Criteria with filter variety against those without: which runs are paired, and what is said of them."""

from __future__ import annotations

import io
import math
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from scipy.stats import ttest_rel

from ip_plugin.compare import pairs as variety
from ip_plugin.compare.cell import Result, one_by_one
from ip_plugin.compare.config import Run, Settings, Study
from ip_plugin.compare.pairs import overall, p_value, pairs, remarks
from ip_plugin.compare.study import compare

pytest.importorskip("torch_pruning")

STUDY = Study(
    settings=Settings(epochs=1),
    criteria=("tp:l1+variety", "tp:l1", "tp:random", "torch:l1"),
    sparsities=(0.3, 0.5),
    seeds=(0, 1, 2),
)


def made_up(run: Run, settings: Settings = STUDY.settings, epoch_done: Callable[[], None] = lambda: None) -> Result:
    """Without variety 80, 81, 82; with it 1, 2, 3 more at 0.3, and 3, 2, 4 less at 0.5 in the interspace."""
    accuracy = 80.0 + run.seed
    if run.criterion.endswith("+variety"):
        loses = run.sparsity == 0.5 and run.space == "interspace"
        accuracy += -(3, 2, 4)[run.seed] if loses else 1 + run.seed
    return Result(run, accuracy, None, 1000, 100, 0, (), 0.5, 200, 31)


RESULTS = {run: made_up(run) for run in STUDY.runs()}


def test_the_pairs_by_hand() -> None:
    found = pairs(STUDY, RESULTS)
    assert [variety.cells(pair) for pair in found] == [
        ["tp:l1", "0.3", "SP", "81.0 ± 1.0", "83.0 ± 2.0", "+2.0 ± 1.0", "0.074"],
        ["tp:l1", "0.3", "IP", "81.0 ± 1.0", "83.0 ± 2.0", "+2.0 ± 1.0", "0.074"],
        ["tp:l1", "0.5", "SP", "81.0 ± 1.0", "83.0 ± 2.0", "+2.0 ± 1.0", "0.074"],
        # t = 3 / (1 / sqrt(3)) = 5.196 with two degrees of freedom.
        ["tp:l1", "0.5", "IP", "81.0 ± 1.0", "78.0 ± 1.0", "−3.0 ± 1.0", "0.035"],
    ]
    assert overall(found) == [(1 + 1 + 1 - 3) / 4, (2 + 2 + 2 - 2) / 4, (3 + 3 + 3 - 4) / 4]
    (remark,) = remarks(found)
    assert "higher in 3 of 4 lines" in remark and "0 lines where it is higher and in 1 where it is lower" in remark
    assert "by seed: +0.8 ± 0.7 (p = 0.19)" in remark


def test_the_paired_test() -> None:
    first, second = [61.2, 63.0, 60.5, 64.1], [62.0, 62.9, 61.9, 64.8]
    found = p_value([b - a for a, b in zip(first, second, strict=True)])
    assert found == pytest.approx(ttest_rel(second, first).pvalue)
    t = 2 / (1 / math.sqrt(3))
    assert p_value([1, 2, 3]) == pytest.approx(1 - t / math.sqrt(2 + t * t))  # two degrees of freedom, in closed form
    assert p_value([1.0]) is p_value([]) is p_value([2.0, 2.0]) is None
    assert (variety.shown(0.0009), variety.shown(0.001), variety.shown(0.0512)) == ("< 0.001", "0.001", "0.051")


def test_only_pairs_of_equal_seed_count() -> None:
    some = {run: result for run, result in RESULTS.items() if run != Run("tp:l1", 0.3, "spatial", 1)}
    del some[Run("tp:l1+variety", 0.5, "spatial", 0)], some[Run("tp:l1+variety", 0.5, "spatial", 2)]
    found = {(pair.sparsity, pair.space): pair for pair in pairs(STUDY, some)}
    assert found[0.3, "spatial"].differences == {0: 1.0, 2: 3.0} and found[0.3, "spatial"].without.mean == 81
    one = found[0.5, "spatial"]
    assert one.differences == {1: 2.0} and one.p is None and variety.cells(one)[-2:] == ["+2.0 ± 0.0", "–"]
    assert overall(list(found.values())) == []
    assert "Mean over all lines" not in remarks(list(found.values()))[0]
    alone = replace(STUDY, spaces=("interspace",))
    assert {pair.space for pair in pairs(alone, RESULTS)} == {"interspace"}
    assert pairs(STUDY, {}) == pairs(replace(STUDY, criteria=("tp:l1", "tp:random")), RESULTS) == remarks([]) == []


def test_the_table_of_the_readme(tmp_path: Path) -> None:
    compare(STUDY, tmp_path, Console(file=io.StringIO()), engine=one_by_one(made_up))
    tables = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "readme_tables.py"))
    title = "channels by group magnitude (L1), after training"
    assert tables["variety_table"](tmp_path).splitlines() == [
        "| criterion | at 30 % | with variety | p | at 50 % | with variety | p |",
        "| --- | --: | --: | --: | --: | --: | --: |",
        f"| {title}, SP | 81.0 ± 1.0 | +2.0 ± 1.0 | 0.074 | 81.0 ± 1.0 | +2.0 ± 1.0 | 0.074 |",
        f"| {title}, IP | 81.0 ± 1.0 | +2.0 ± 1.0 | 0.074 | 81.0 ± 1.0 | **−3.0 ± 1.0** | 0.035 |",
    ]


def test_they_are_shown_where_there_are_any(tmp_path: Path) -> None:
    out = io.StringIO()
    compare(STUDY, tmp_path / "a", Console(file=out, width=150), engine=one_by_one(made_up))
    page = (tmp_path / "a" / "report.html").read_text()
    for text in (out.getvalue(), page):
        assert "−3.0 ± 1.0" in text and "with variety %" in text and "higher in 3 of 4 lines" in text
    out = io.StringIO()
    without = replace(STUDY, criteria=("tp:l1", "tp:random"))
    compare(without, tmp_path / "b", Console(file=out, width=150), engine=one_by_one(made_up))
    for text in (out.getvalue(), (tmp_path / "b" / "report.html").read_text()):
        assert "with variety %" not in text
