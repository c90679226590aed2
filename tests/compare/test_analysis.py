"""What an analysis says of results: which cells are paired, and what the tables and remarks say of them."""

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

from ip_plugin.compare.analysis import Analysis, p_value
from ip_plugin.compare.cell import Result
from ip_plugin.compare.config import Cell, Settings, Study
from ip_plugin.compare.engines.local import one_by_one
from ip_plugin.compare.report import probability, remarks, tables, variety_table
from ip_plugin.compare.study import compare

pytest.importorskip("torch_pruning")

STUDY = Study(
    settings=Settings(epochs=1),
    criteria=("tp:l1+variety", "tp:l1", "tp:random", "torch:l1"),
    sparsities=(0.3, 0.5),
    seeds=(0, 1, 2),
)


def made_up(cell: Cell, settings: Settings = STUDY.settings, epoch_done: Callable[[], None] = lambda: None) -> Result:
    """Without variety 80, 81, 82; with it 1, 2, 3 more at 0.3, and 3, 2, 4 less at 0.5 in the interspace."""
    accuracy = 80.0 + cell.seed
    if cell.criterion.endswith("+variety"):
        loses = cell.sparsity == 0.5 and cell.space == "interspace"
        accuracy += -(3, 2, 4)[cell.seed] if loses else 1 + cell.seed
    return Result(cell, accuracy, None, 1000, 100, 0, (), 0.5, 200, 31)


RESULTS = {cell: made_up(cell) for cell in STUDY.cells()}


def test_the_results_are_a_tidy_frame_in_the_order_of_the_study() -> None:
    frame = Analysis(STUDY, dict(reversed(RESULTS.items()))).results
    cells = [Cell(*row) for row in frame[["criterion", "sparsity", "space", "seed"]].itertuples(index=False)]
    assert set(cells) == set(RESULTS) and len(cells) == len(RESULTS)
    assert cells == sorted(
        cells, key=lambda c: (STUDY.criteria.index(c.criterion), c.sparsity, c[2] != "spatial", c.seed)
    )
    assert list(frame["accuracy"]) == [RESULTS[cell].accuracy for cell in cells]
    assert len(Analysis(replace(STUDY, seeds=(1,)), RESULTS).results) == len(RESULTS) / 3


def test_variety_by_hand() -> None:
    analysis = Analysis(STUDY, RESULTS)
    assert variety_table(analysis).rows == [
        ["tp:l1", "0.3", "SP", "81.0 ± 1.0", "83.0 ± 2.0", "+2.0 ± 1.0", "0.074"],
        ["tp:l1", "0.3", "IP", "81.0 ± 1.0", "83.0 ± 2.0", "+2.0 ± 1.0", "0.074"],
        ["tp:l1", "0.5", "SP", "81.0 ± 1.0", "83.0 ± 2.0", "+2.0 ± 1.0", "0.074"],
        # t = 3 / (1 / sqrt(3)) = 5.196 with two degrees of freedom.
        ["tp:l1", "0.5", "IP", "81.0 ± 1.0", "78.0 ± 1.0", "−3.0 ± 1.0", "0.035"],
    ]
    assert list(analysis.variety_by_seed()) == [(1 + 1 + 1 - 3) / 4, (2 + 2 + 2 - 2) / 4, (3 + 3 + 3 - 4) / 4]
    remark = remarks(analysis)[-1]
    assert "higher in 3 of 4 lines" in remark and "0 lines where it is higher and in 1 where it is lower" in remark
    assert "by seed: +0.8 ± 0.7 (p = 0.19)" in remark


def test_the_paired_test() -> None:
    first, second = [61.2, 63.0, 60.5, 64.1], [62.0, 62.9, 61.9, 64.8]
    p = p_value([b - a for a, b in zip(first, second, strict=True)])
    assert p == pytest.approx(ttest_rel(second, first).pvalue)
    t = 2 / (1 / math.sqrt(3))
    assert p_value([1, 2, 3]) == pytest.approx(1 - t / math.sqrt(2 + t * t))  # two degrees of freedom, in closed form
    assert all(math.isnan(p_value(values)) for values in ([1.0], [], [2.0, 2.0]))
    assert (probability(0.0009), probability(0.001), probability(0.0512)) == ("< 0.001", "0.001", "0.051")


def test_only_pairs_of_equal_seed_count() -> None:
    some = {cell: result for cell, result in RESULTS.items() if cell != Cell("tp:l1", 0.3, "spatial", 1)}
    del some[Cell("tp:l1+variety", 0.5, "spatial", 0)], some[Cell("tp:l1+variety", 0.5, "spatial", 2)]
    analysis = Analysis(STUDY, some)
    differences = analysis.variety_pairs["difference"].sort_index()
    assert differences.loc["tp:l1", 0.3, "spatial"].to_dict() == {0: 1.0, 2: 3.0}
    assert differences.loc["tp:l1", 0.5, "spatial"].to_dict() == {1: 2.0}
    assert variety_table(analysis).rows[0][3] == "81.0 ± 1.4" and variety_table(analysis).rows[2][-2:] == [
        "+2.0 ± 0.0",
        "–",
    ]
    assert len(analysis.variety_by_seed()) == 0 and "Mean over all lines" not in remarks(analysis)[-1]
    assert analysis.space_pairs.sort_index().loc["tp:l1", 0.3].index.tolist() == [0, 2]
    assert analysis.space_difference.loc[("tp:l1+variety", 0.5), "count"] == 1
    alone = Analysis(replace(STUDY, spaces=("interspace",)), RESULTS)
    assert set(alone.variety.index.get_level_values("space")) == {"interspace"} and alone.space_pairs.empty
    without = Analysis(replace(STUDY, criteria=("tp:l1", "tp:random")), RESULTS)
    assert [len(tables(analysis)) for analysis in (alone, without, Analysis(STUDY, {}))] == [2, 1, 1]


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
