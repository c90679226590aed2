"""Show an analysis: tables and remarks on the console, plots of accuracy over sparsity, a self-contained HTML page."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from ip_plugin.utils.atomic import write_whole

from . import criteria
from .analysis import Analysis, mean, p_value, std
from .deployment import ROUNDS
from .record import versions
from .tasks import task_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

SHORT: dict[str, str] = {"spatial": "SP", "interspace": "IP"}


class TextTable(NamedTuple):
    """A table as text; the console shows the caption below it."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str | None = None


def write(analysis: Analysis, folder: Path, command: str = "") -> None:
    """Write ``accuracy.png``, ``accuracy.svg`` and ``report.html``, which names the command that started the study."""
    figure = plot(analysis)
    svg = image(figure, "svg")
    write_whole(folder / "accuracy.png", image(figure, "png"))
    write_whole(folder / "accuracy.svg", svg)
    write_whole(folder / "report.html", page(analysis, svg.decode(), command))


def show(analysis: Analysis, console: Console) -> None:
    """Print the tables and remarks."""
    from rich import box
    from rich.table import Table

    sparsities = len(analysis.study.sparsities)
    for number, (title, headers, rows, caption) in enumerate(tables(analysis)):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title, caption=caption)
        table.add_column(headers[0], overflow="fold", min_width=len(headers[0]))
        for header in headers[1:]:
            table.add_column(header.replace("s left", "s\nleft"), justify="right", no_wrap=True)
        for index, row in enumerate(rows, start=1):
            table.add_row(*row, end_section=number == 0 and index % sparsities == 0 and index < len(rows))
        console.print(table)
    for remark in remarks(analysis):
        console.print(f"- {remark}")


def tables(analysis: Analysis) -> list[TextTable]:
    """The tables of a study: accuracies, and what filter variety and deployment bring where they were measured."""
    others = [(analysis.variety, variety_table), (analysis.deployment, deployment_table)]
    return [accuracy_table(analysis), *(make(analysis) for frame, make in others if len(frame))]


def accuracy_table(analysis: Analysis) -> TextTable:
    """One row for each criterion and sparsity."""
    study, seeds = analysis.study, len(analysis.study.seeds)
    compares = len(study.spaces) == 2
    removes = any(criteria.load(name).removes_channels for name in study.criteria)
    rows = []
    for criterion, sparsity in product(study.criteria, study.sparsities):
        row = [criterion, f"{sparsity:.4g}"]
        row += [plus_minus(analysis.accuracy.loc[criterion, sparsity, space]) for space in study.spaces]
        if compares:
            row.append(plus_minus(analysis.space_difference.loc[criterion, sparsity], "+.1f"))
        runs = analysis.results[analysis.results["criterion"].eq(criterion) & analysis.results["sparsity"].eq(sparsity)]
        row.append(_alternatives(runs["parameters_left"], ","))
        if removes:
            row.append(_alternatives((runs["macs_left"] / runs["macs"]).dropna(), ".1%"))
        rows.append(row)
    return TextTable(
        f"Accuracy, {seeds} seed{'s' if seeds > 1 else ''}: mean ± standard deviation",
        [
            "criterion", "sparsity", *(f"{SHORT[space]} %" for space in study.spaces), *["IP − SP"] * compares,
            "parameters left", *["MACs left"] * removes,
        ],
        rows,
        "parameters left: trained bases included, equally many in both spaces",
    )  # fmt: skip


def variety_table(analysis: Analysis) -> TextTable:
    """One row for each criterion, sparsity and space that was run with filter variety and without."""
    return TextTable(
        "With filter variety and without: accuracy, pairs of equal seed, a paired t-test",
        ("criterion", "sparsity", "space", "without %", "with variety %", "difference", "p"),
        [
            [*_names(key), plus_minus(row["without"]), plus_minus(row["varied"]), plus_minus(row["difference"], "+.1f"),
             probability(row["difference"]["p_value"])]
            for key, row in analysis.variety.iterrows()
        ],
    )  # fmt: skip


def deployment_table(analysis: Analysis) -> TextTable:
    """One row for each criterion, sparsity and space whose deployment was measured; 1 KB are 1,000 bytes."""
    threads = analysis.study.measure.deploy_threads
    return TextTable(
        f"Deployed: compact file, and latency of one image on the CPU with {threads} thread{'s' * (threads != 1)}",
        ("criterion", "sparsity", "space", "file KB", "sparse µs", "dense µs", "times faster"),
        [
            [*_names(key), plus_minus(1e-3 * row["file_bytes"], ",.1f"), plus_minus(1e3 * row["latency_ms"], ",.0f"),
             plus_minus(1e3 * row["dense_latency_ms"], ",.0f"), plus_minus(row["speedup"], ".2f")]
            for key, row in analysis.deployment.iterrows()
        ],
    )  # fmt: skip


def _names(key: tuple[str, float, str]) -> list[str]:
    criterion, sparsity, space = key
    return [criterion, f"{sparsity:.4g}", SHORT[space]]


def _alternatives(values: pd.Series, spec: str) -> str:
    """The values that occur: one, unless the cells of a row differ."""
    return " or ".join(f"{value:{spec}}" for value in sorted(set(values))) or "–"


def plus_minus(row: Mapping[str, float], spec: str = ".1f") -> str:
    """Mean and standard deviation, both in one format.

    >>> plus_minus({"mean": -1.5, "std": 0.25}, "+.2f")
    '−1.50 ± 0.25'
    """
    if pd.isna(row["mean"]):
        return "–"
    return f"{row['mean']:{spec}} ± {row['std']:{spec.lstrip('+')}}".replace("-", "−")


def probability(p: float) -> str:
    """A p-value.

    >>> probability(0.0004), probability(0.25), probability(float("nan"))
    ('< 0.001', '0.25', '–')
    """
    return "–" if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.2g}"


def remarks(analysis: Analysis) -> list[str]:
    """What a reader must know to read the tables rightly, including where interspace pruning loses."""
    kinds = (_space_remarks, _network_remarks, _variety_remarks, _cost_remarks)
    return [remark for kind in kinds for remark in kind(analysis)]


def _space_remarks(analysis: Analysis) -> Iterable[str]:
    differences = analysis.space_difference.dropna()
    losses = [f"{criterion} at {sparsity:g}" for criterion, sparsity in differences.index[differences["mean"] < 0]]
    unclear = int((differences["mean"].abs() < differences["std"]).sum())
    if len(differences):
        yield (
            f"On average over the seeds interspace pruning is below ordinary pruning in {len(losses)} of "
            f"{len(differences)} lines{': ' + '; '.join(losses) if losses else ''}."
        )
    if unclear:
        yield (
            f"In {unclear} of {len(differences)} lines the mean difference is smaller than its standard deviation "
            "over the seeds."
        )


def _network_remarks(analysis: Analysis) -> Iterable[str]:
    results = analysis.results
    removing = results.loc[results["macs_left"].notna(), "criterion"].unique()
    if len(removing):
        yield (
            f"{', '.join(removing)}: sparsity is the share of the channels that are removed. The networks of both "
            "spaces are equally large, as that of the interspace is baked and needs no basis then."
        )
    unpaid = results[results["spatial_layers"] != ""]
    for (criterion, sparsity), texts in unpaid.groupby(["criterion", "sparsity"], sort=False)["spatial_layers"]:
        names = dict.fromkeys(" ".join(texts).split())
        yield (
            f"{criterion} at {sparsity:g}: {', '.join(names)} stayed spatial in the interspace runs, as the budget "
            "would not pay for the basis."
        )


def _variety_remarks(analysis: Analysis) -> Iterable[str]:
    if analysis.variety.empty:
        return
    difference = analysis.variety["difference"]
    higher, clear = difference["mean"] > 0, difference["p_value"] < 0.05
    text = (
        f"With filter variety the mean is higher in {higher.sum()} of {len(difference)} lines. A paired t-test has "
        f"p < 0.05 in {(clear & higher).sum()} lines where it is higher and in {(clear & ~higher).sum()} where it is "
        "lower; by chance alone that is one line in twenty."
    )
    by_seed = analysis.variety_by_seed()
    if len(by_seed) > 1:
        overall = plus_minus({"mean": mean(by_seed), "std": std(by_seed)}, "+.1f")
        text += f" Mean over all lines, by seed: {overall} (p = {probability(p_value(by_seed))})."
    yield text


def _cost_remarks(analysis: Analysis) -> Iterable[str]:
    costs = analysis.deployment
    if costs.empty:
        return
    slow = costs.index[costs["speedup", "mean"] < 1]
    slower = [f"{criterion} at {sparsity:g}, {space}" for criterion, sparsity, space in slow]
    yield (
        f"Latencies are medians of {ROUNDS} calls: of the pruned network by ip_plugin.sparse, and in turns with it of "
        "the network that was not pruned, by torch as it is. Run sparse, the pruned network is slower in "
        f"{len(slower)} of {len(costs)} lines{': ' + '; '.join(slower) if slower else ''}."
    )


def plot(analysis: Analysis) -> Figure:
    """Accuracy over sparsity, one panel for each criterion."""
    from matplotlib.figure import Figure

    study = analysis.study
    columns = min(len(study.criteria), 4)
    rows = -(-len(study.criteria) // columns)
    figure = Figure(figsize=(1.2 + 4.2 * columns, 3.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in panels[len(study.criteria) :]:
        unused.set_axis_off()
    positions = {sparsity: position for position, sparsity in enumerate(sorted(study.sparsities))}
    style = {"spatial": {"color": "tab:gray", "fmt": "s--"}, "interspace": {"color": "tab:blue", "fmt": "o-"}}
    for panel, name in zip(panels, study.criteria, strict=False):
        criterion = criteria.load(name)
        for offset, space in zip((-0.03, 0.03), study.spaces, strict=False):
            points = analysis.accuracy.xs((name, space), level=("criterion", "space")).dropna().sort_index()
            if len(points):
                places = [positions[sparsity] + offset for sparsity in points.index]
                label = f"{space} ({SHORT[space]})"
                panel.errorbar(places, points["mean"], points["std"], capsize=3, label=label, **style[space])
        panel.set_title(criterion.title, fontsize="medium")
        panel.set_xticks(list(positions.values()), [f"{100 * sparsity:.4g} %" for sparsity in positions])
        panel.set_xlabel("share of channels removed" if criterion.removes_channels else "sparsity")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy in %")
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(loc="lower left")
    return figure


def image(figure: Figure, kind: str) -> bytes:
    """A figure as PNG or SVG."""
    import matplotlib

    out = io.BytesIO()
    # Equal results give equal files: no date, no random ids.
    with matplotlib.rc_context({"svg.hashsalt": "ip-plugin", "svg.fonttype": "path"}):
        figure.savefig(out, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return out.getvalue()


def page(analysis: Analysis, svg: str, command: str) -> str:
    """The HTML page: tables, plot, remarks and settings, with no reference to anything outside of it."""
    from jinja2 import Environment

    study = analysis.study
    template = files("ip_plugin.compare").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        task=task_of(study)[0].title,
        seeds=study.seeds,
        tables=tables(analysis),
        svg=svg[svg.index("<svg") :],
        remarks=remarks(analysis),
        command=command,
        criteria={name: criteria.load(name) for name in study.criteria},
        facts=study.training.model_dump() | versions(),
    )
