"""The tables of a study, with one content for console, page, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd

from .analysis import SPATIAL, Analysis
from .answer import COMPARISONS, count, interval, points, probability
from .deployment import ROUNDS


class Entry(NamedTuple):
    """One entry of a table: how it is written, and the number by which rows are sorted (None for text)."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """A table of a study; `extra` are columns that narrow consoles leave out, the first ones first."""

    name: str
    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    caption: str = ""
    extra: Sequence[str] = ()

    def frame(self) -> pd.DataFrame:
        """The table as text."""
        return pd.DataFrame([[entry.text for entry in row] for row in self.rows], columns=list(self.headers), dtype=str)

    def markdown(self) -> str:
        """The table in Markdown."""
        return markdown(self.headers, [[entry.text for entry in row] for row in self.rows], self.texts)

    def latex(self) -> str:
        """The table in LaTeX, for the package booktabs."""
        columns = "l" * self.texts + "r" * (len(self.headers) - self.texts)
        text: str = self.frame().to_latex(
            index=False, escape=True, column_format=columns, caption=self.title, label=f"tab:{self.name}"
        )
        for character, command in (("−", "$-$"), ("±", r"$\pm$"), ("–", "--"), ("µ", r"$\mu$"), ("<", "$<$")):
            text = text.replace(character, command)
        return text

    @property
    def texts(self) -> int:
        """How many of the first columns hold names."""
        numeric = [any(row[i].value is not None for row in self.rows) for i in range(len(self.headers))]
        return numeric.index(True) if True in numeric else len(numeric)


def tables(analysis: Analysis) -> list[Table]:
    """The tables that a study has something for."""
    every = [accuracy_table(analysis), overall_table(analysis), control_table(analysis), cost_table(analysis)]
    return [table for table in every if table.rows]


def accuracy_table(analysis: Analysis) -> Table:
    """One row for each criterion, sparsity and interspace value; accuracies alone where there are no pairs."""
    compares = SPATIAL in analysis.spaces and bool(analysis.interspaces)
    names_space = not compares or len(analysis.interspaces) > 1
    rows = []
    for criterion, sparsity in dict.fromkeys((c, s) for c, s, _ in analysis.accuracy.index):
        for space in analysis.interspaces if compares else analysis.spaces:
            row = [Entry(criterion), *[Entry(analysis.label(space))] * names_space, percent(sparsity)]
            if compares:
                row.append(accuracy(analysis.accuracy.loc[criterion, sparsity, SPATIAL]))
            row.append(accuracy(analysis.accuracy.loc[criterion, sparsity, space]))
            if compares:
                change = analysis.differences.loc["space", criterion, sparsity, space]
                row += [*difference_entries(change), Entry(points(change["beyond_dense"]), change["beyond_dense"])]
            left = analysis.costs["parameters_left"].loc[criterion, sparsity, space]["mean"]
            row.append(Entry("–" if pd.isna(left) else f"{left:,.0f}", left))
            rows.append(row)
    headers = [
        "criterion", *["interspace" if compares else "space"] * names_space, "sparsity",
        *(["SP %", "IP %", "IP − SP", "95 % interval", "p (Holm)", "beyond dense"] if compares else ["accuracy %"]),
        "parameters left",
    ]  # fmt: skip
    text = "Accuracies: mean ± standard deviation over the seeds."
    if compares:
        text += (
            " IP − SP: mean difference of runs with the same seed, in points, with its 95 % t interval, and p of a "
            "paired t-test after Holm's correction for all tests of the study; * where that is at most 0.05. Beyond "
            "dense: the difference without that of the networks that are not pruned. Parameters left: trained bases "
            "included."
        )
    seeds = count(len(analysis.seeds), "seed")
    return Table("accuracy", f"Test accuracy, {seeds}", headers, rows, text, ("beyond dense", "parameters left"))


def overall_table(analysis: Analysis) -> Table:
    """One row for each comparison and space: the mean over all cells."""
    rows = [
        [Entry(COMPARISONS.get(comparison, comparison)), Entry(analysis.label(space)), *difference_entries(row),
         Entry(points(row["beyond_dense"]), row["beyond_dense"]),
         Entry(interval({"low": row["boot_low"], "high": row["boot_high"]}), row["boot_low"]),
         Entry(f"{100 * row['better']:.0f} %" if pd.notna(row["better"]) else "–", row["better"]),
         Entry(f"{row['wins']:.0f} / {row['ties']:.0f} / {row['losses']:.0f}", row["wins"]),
         Entry(f"{row['count']:.0f}", row["count"])]
        for (comparison, space), row in analysis.overall.iterrows() if row["count"]
    ]  # fmt: skip
    return Table(
        "overall", "All cells together",
        ("comparison", "space", "difference", "95 % interval", "p (Holm)", "beyond dense", "bootstrap", "more accurate",
         "wins / ties / losses", "seeds"), rows,
        "Mean over the criteria of the mean over their sparsities, for each seed that has every cell; interval and "
        "test are those of Student's t over these seeds. Bootstrap: 95 % interval by drawing seeds anew within each "
        "criterion, from six seeds on; it is too narrow for few seeds, and no claim rests on it. More accurate: share "
        f"of the pairs of runs. Wins, ties and losses: cells by their mean difference, with a margin of "
        f"{analysis.margin:g} points.",
        ("bootstrap", "beyond dense", "more accurate"),
    )  # fmt: skip


def control_table(analysis: Analysis) -> Table:
    """One row for each criterion, sparsity and space that was run with a suffix (or a frozen basis) and without."""
    frame = analysis.differences[analysis.differences.index.get_level_values("comparison") != "space"]
    rows = [
        [Entry(COMPARISONS.get(comparison, comparison)), Entry(criterion), Entry(analysis.label(space)),
         percent(sparsity),
         Entry(f"{row['first']:.1f}", row["first"]), Entry(f"{row['second']:.1f}", row["second"]),
         *difference_entries(row)]
        for (comparison, criterion, sparsity, space), row in frame.iterrows()
    ]  # fmt: skip
    return Table(
        "controls", "Controls and variety: with and without, accuracy in %",
        ("change", "criterion", "space", "sparsity", "without", "with", "difference", "95 % interval",
         "p (Holm)"), rows,
        "Means over pairs of runs with the same seed; difference, interval and p as in the table of accuracies.",
        ("without", "with"),
    )  # fmt: skip


def cost_table(analysis: Analysis) -> Table:
    """One row for each criterion, sparsity and space: what was measured of its costs."""
    measured = {name: column for name, column in _COSTS.items() if analysis.costs[name, "mean"].notna().any()}
    timed = "latency_ms" in measured
    if len(measured) == 1:
        measured = {}
    rows = [
        [Entry(key[0]), Entry(analysis.label(key[2])), percent(key[1]),
         *(_cost(scale * row[name], spec) for name, (_, scale, spec) in measured.items())]
        for key, row in analysis.costs.iterrows() if measured
    ]  # fmt: skip
    latency = (
        f" Latencies are medians of {ROUNDS} calls with one image on the CPU: of the pruned network by "
        "ip_plugin.sparse, and in turns with it of the network that was not pruned, by torch."
    )
    return Table(
        "costs", "Parameters, multiply-adds and files",
        ["criterion", "space", "sparsity", *(title for title, _, _ in measured.values())], rows,
        "Mean ± standard deviation over the seeds; one number where all are equal. 1 KB are 1,000 bytes of the compact "
        "checkpoint; multiply-adds are those of one image." + latency * timed,
    )  # fmt: skip


#: Costs by column of the results: title, factor, format.
_COSTS = {
    "parameters_left": ("parameters left", 1.0, ",.0f"), "macs_left": ("multiply-adds left", 1.0, ",.0f"),
    "file_bytes": ("file KB", 1e-3, ",.1f"), "latency_ms": ("sparse µs", 1e3, ",.0f"),
    "dense_latency_ms": ("dense µs", 1e3, ",.0f"), "speedup": ("times faster", 1.0, ".2f"),
}  # fmt: skip


def _cost(row: pd.Series, spec: str) -> Entry:
    """A cost over the seeds: one number where all are equal as it is written."""
    varies = f"{row['std']:{spec}}".strip("0.") not in ("", "nan")
    return Entry(plus_minus(row if varies else {"mean": row["mean"], "std": float("nan")}, spec), row["mean"])


def difference_entries(row: pd.Series) -> list[Entry]:
    """Mean difference, interval, and corrected p-value."""
    star = " *" if row["significant"] else ""
    return [
        Entry(points(row["mean"]), row["mean"]), Entry(interval(row), row["low"]),
        Entry(probability(row["p_holm"]) + star, row["p_holm"]),
    ]  # fmt: skip


def accuracy(row: Mapping[str, float]) -> Entry:
    """An accuracy over the seeds."""
    return Entry(plus_minus(row), row["mean"])


def percent(sparsity: float) -> Entry:
    """A sparsity."""
    return Entry(f"{100 * sparsity:.4g} %", sparsity)


def plus_minus(row: Mapping[str, float], spec: str = ".1f") -> str:
    """Mean and standard deviation, both in one format; the mean alone where there is no deviation.

    >>> plus_minus({"mean": -1.5, "std": 0.25}, "+.2f"), plus_minus({"mean": 1.0, "std": float("nan")})
    ('−1.50 ± 0.25', '1.0')
    """
    if pd.isna(row["mean"]):
        return "–"
    deviation = "" if pd.isna(row["std"]) else f" ± {row['std']:{spec.lstrip('+')}}"
    return f"{row['mean']:{spec}}{deviation}".replace("-", "−")


def markdown(heads: Sequence[str], body: Iterable[Sequence[str]], names: int = 1) -> str:
    """A table in Markdown, of numbers but for the first columns."""
    marks = ["---"] * names + ["--:"] * (len(heads) - names)
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, marks, *body])
