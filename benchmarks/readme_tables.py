"""Write the documents' tables of accuracies from what was measured: those of README.md and docs/results.md.

    python benchmarks/readme_tables.py

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->`` and is made from the folder
``benchmarks/results/NAME``, which ``ip-plugin compare --output`` has written, or ``benchmarks/fitted.py``.
``<!-- variety: NAME -->`` stands before that of criteria with filter variety and without.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path

from ip_plugin.compare import criteria
from ip_plugin.compare.cell import Result
from ip_plugin.compare.config import SPACES, Run, Study
from ip_plugin.compare.pairs import pairs, shown
from ip_plugin.compare.report import SHORT, summarize
from ip_plugin.compare.spread import Spread
from ip_plugin.compare.store import read

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def table(folder: Path) -> str:
    """A study's table in Markdown: one row for each criterion, two columns for each sparsity; losses are bold."""
    study, rows = measured(folder)
    lines = {(line.criterion, line.sparsity): line for line in summarize(study, rows)}
    heads = ["criterion", *(f"{head} {100 * s:g} %" for s in study.sparsities for head in ("SP at", "IP − SP at"))]
    body = []
    for name in study.criteria:
        found = [lines[name, sparsity] for sparsity in study.sparsities]
        cells = [cell for line in found for cell in (str(line.accuracy["spatial"] or "–"), signed(line.difference))]
        body.append([criteria.load(name).title, *cells])
    return markdown(heads, body)


def variety_table(folder: Path) -> str:
    """One row for each criterion in each space: without variety, what variety adds, and p of a paired t-test."""
    study, rows = measured(folder)
    found = {(pair.criterion, pair.space, pair.sparsity): pair for pair in pairs(study, rows)}
    heads = ["criterion", *(head for s in study.sparsities for head in (f"at {100 * s:g} %", "with variety", "p"))]
    body = []
    for name, space in dict.fromkeys(key[:2] for key in found):
        row = [f"{criteria.load(name).title}, {SHORT[space]}"]
        for sparsity in study.sparsities:
            pair = found.get((name, space, sparsity))
            row += ["–"] * 3 if pair is None else [str(pair.without), signed(pair.difference), shown(pair.p)]
        body.append(row)
    return markdown(heads, body)


def measured(folder: Path) -> tuple[Study, Mapping[Run, Result]]:
    """The grid that a folder holds, and its results."""
    rows = read(folder / "results.csv")
    study = Study(
        criteria=tuple(dict.fromkeys(run.criterion for run in rows)),
        sparsities=tuple(sorted({run.sparsity for run in rows})),
        seeds=tuple(sorted({run.seed for run in rows})),
        spaces=SPACES,
    )
    return study, rows


def markdown(heads: list[str], body: list[list[str]], names: int = 1) -> str:
    """A table in Markdown, of numbers but for the first columns."""
    marks = ["---"] * names + ["--:"] * (len(heads) - names)
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, marks, *body])


def fitted_table(folder: Path) -> str:
    """What ``benchmarks/fitted.py`` measured: two rows for each way to prune, one column for each sparsity.

    Networks that not everything has been done with yet are left out.
    """
    cells: dict[tuple[str, str, float], dict[str, float]] = {}
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            for column in ("pruned", "finetuned"):
                place = line["variant"], column, float(line["sparsity"])
                cells.setdefault(place, {})[line["seed"]] = float(line[column])
    seeds = set.intersection(*(set(cell) for cell in cells.values()))
    sparsities = sorted({sparsity for _, _, sparsity in cells})
    body = []
    for variant in dict.fromkeys(name for name, _, _ in cells):
        for column, title in (("pruned", "no training"), ("finetuned", "fine-tuned")):
            found = [[cells[variant, column, sparsity][seed] for seed in seeds] for sparsity in sparsities]
            texts = [str(Spread.of(values)) for values in found]
            body.append([variant if column == "pruned" else "", title, *texts])
    return markdown(["", "", *(f"{100 * s:g} %" for s in sparsities)], body, names=2)


def signed(spread: Spread | None) -> str:
    """A difference; bold if it is a loss."""
    if spread is None:
        return "–"
    text = f"{spread.mean:+.1f} ± {spread.deviation:.1f}".replace("-", "−")
    return f"**{text}**" if round(spread.mean, 1) < 0 else text.replace("−0.0", "+0.0", 1)


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
