"""Write the README's tables of accuracies from what was measured.

    python benchmarks/readme_tables.py

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->`` and is made from the folder
``benchmarks/results/NAME``, which ``ip-plugin compare --output`` has written.
"""

from __future__ import annotations

import re
from pathlib import Path

from ip_plugin.compare import criteria
from ip_plugin.compare.config import SPACES, Study
from ip_plugin.compare.report import Spread, summarize
from ip_plugin.compare.results import read

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def table(folder: Path) -> str:
    """A study's table in Markdown: one row for each criterion, two columns for each sparsity; losses are bold."""
    rows = read(folder / "results.csv")
    study = Study(
        criteria=tuple(dict.fromkeys(run.criterion for run in rows)),
        sparsities=tuple(sorted({run.sparsity for run in rows})),
        seeds=tuple(sorted({run.seed for run in rows})),
        spaces=SPACES,
    )
    lines = {(line.criterion, line.sparsity): line for line in summarize(study, rows)}
    heads = ["criterion", *(f"{head} {100 * s:g} %" for s in study.sparsities for head in ("SP at", "IP − SP at"))]
    body = []
    for name in study.criteria:
        found = [lines[name, sparsity] for sparsity in study.sparsities]
        cells = [cell for line in found for cell in (str(line.accuracy["spatial"] or "–"), signed(line.difference))]
        body.append([criteria.load(name).title, *cells])
    marks = ["---", *["--:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, marks, *body])


def signed(spread: Spread | None) -> str:
    """A difference; bold if it is a loss."""
    if spread is None:
        return "–"
    text = f"{spread.mean:+.1f} ± {spread.deviation:.1f}".replace("-", "−")
    return f"**{text}**" if round(spread.mean, 1) < 0 else text.replace("−0.0", "+0.0", 1)


def filled(readme: str) -> str:
    """The README with its tables made anew."""
    pattern = re.compile(r"(<!-- table: (\w+) -->\n).*?(\n<!-- end of table -->)", flags=re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}{table(RESULTS / found[2])}{found[3]}", readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text()))
