"""Write the tables of accuracies in README.md and docs/results.md from measured results.

    python benchmarks/readme_tables.py

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->`` and is made from the folder
``benchmarks/results/NAME``, which ``ip-plugin compare --output`` has written, or ``benchmarks/fitted.py``.
``<!-- variety: NAME -->`` stands before a table of criteria with filter variety and without.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from ip_plugin.compare import criteria
from ip_plugin.compare.analysis import KEYS, Analysis
from ip_plugin.compare.answer import probability
from ip_plugin.compare.statistics import mean, std
from ip_plugin.compare.store import Results
from ip_plugin.compare.tables import markdown, plus_minus

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def table(folder: Path) -> str:
    """A study's table in Markdown: one row for each criterion, two columns for each sparsity; losses are bold."""
    analysis = measured(folder)
    sparsities, (inter,) = analysis.sparsities, analysis.interspaces
    heads = ["criterion", *(f"{head} {100 * s:g} %" for s in sparsities for head in ("SP at", "IP − SP at"))]
    body = []
    for name in analysis.criteria:
        row = [criteria.load(name).title]
        for sparsity in sparsities:
            row.append(plus_minus(analysis.accuracy.loc[name, sparsity, "spatial"]))
            row.append(difference(analysis.differences.loc["space", name, sparsity, inter]))
        body.append(row)
    return markdown(heads, body)


def variety_table(folder: Path) -> str:
    """One row for each criterion in each space: without variety, what variety adds, and p of a paired t-test."""
    analysis = measured(folder)
    variety = analysis.differences.loc["variety"]
    without = analysis.pairs[analysis.pairs["comparison"] == "variety"].set_index(KEYS)["first"]
    heads = ["criterion", *(head for s in analysis.sparsities for head in (f"at {100 * s:g} %", "with variety", "p"))]
    body = []
    for name, space in dict.fromkeys((name, space) for name, _, space in variety.index):
        row = [f"{criteria.load(name).title}, {analysis.label(space)}"]
        for key in ((name, sparsity, space) for sparsity in analysis.sparsities):
            if key in variety.index:
                first = without.loc[[key]].tolist()
                row += [plus_minus({"mean": mean(first), "std": std(first)}), difference(variety.loc[key])]
                row.append(probability(variety.loc[key, "p"]))
            else:
                row += ["–"] * 3
        body.append(row)
    return markdown(heads, body)


def measured(folder: Path) -> Analysis:
    """The analysis of the results in a folder."""
    return Results.read(folder).analysis()


def fitted_table(folder: Path) -> str:
    """The results of ``benchmarks/fitted.py``: two rows for each way to prune, one column for each sparsity.

    Networks that do not have all results yet are left out.
    """
    frame = pd.read_csv(folder / "results.csv")
    complete = frame.groupby("seed").size() == len(frame.drop_duplicates(["variant", "sparsity"]))
    frame = frame[frame["seed"].map(complete)]
    body = []
    for variant, rows in frame.groupby("variant", sort=False):
        for column, title in (("pruned", "no training"), ("finetuned", "fine-tuned")):
            over_seeds = rows.groupby("sparsity")[column].agg([mean, std])
            body.append([variant if column == "pruned" else "", title, *map(plus_minus, over_seeds.to_dict("records"))])
    return markdown(["", "", *(f"{100 * s:g} %" for s in sorted(set(frame["sparsity"])))], body, names=2)


def difference(row: Mapping[str, float]) -> str:
    """A difference; bold if it is a loss."""
    text = plus_minus(row, "+.1f")
    return f"**{text}**" if round(row["mean"], 1) < 0 else text.replace("−0.0", "+0.0", 1)


def filled(readme: str) -> str:
    """The README with its tables made anew."""
    kinds = {"table": _made, "variety": variety_table}
    pattern = re.compile(r"(<!-- (table|variety): ([\w/-]+) -->\n).*?(\n<!-- end of table -->)", flags=re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}{kinds[found[2]](RESULTS / found[3])}{found[4]}", readme)


def _made(folder: Path) -> str:
    return table(folder) if (folder / "study.json").exists() else fitted_table(folder)


if __name__ == "__main__":
    for path in (ROOT / "README.md", ROOT / "docs" / "results.md"):
        path.write_text(filled(path.read_text()))
