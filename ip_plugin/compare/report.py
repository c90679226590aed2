"""Showing results: a table, a plot of accuracy over sparsity, a self-contained HTML page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from ip_plugin.adapters import cuts_channels

from . import costs as deployed
from . import criteria
from . import pairs as variety
from .cell import Result
from .config import Run, Space, Study
from .spread import Spread
from .store import versions
from .tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

SHORT: dict[Space, str] = {"spatial": "SP", "interspace": "IP"}


@dataclass(frozen=True)
class Line:
    """One criterion at one sparsity, over the seeds.

    Attributes:
        criterion, sparsity: which.
        accuracy: by space, in percent; None where nothing has been run.
        difference: interspace minus spatial, of pairs with equal seed, in percentage points.
        parameters_left: of the runs, the trained bases included; more than one number only if runs differ.
        spatial_layers: convolutions that stayed spatial in the interspace runs.
        macs_left: shares of the multiply-adds, of the runs; empty unless channels were cut.
    """

    criterion: str
    sparsity: float
    accuracy: Mapping[Space, Spread | None]
    difference: Spread | None
    parameters_left: tuple[int, ...]
    spatial_layers: tuple[str, ...]
    macs_left: tuple[float, ...] = ()


def summarize(study: Study, results: Mapping[Run, Result]) -> list[Line]:
    """The lines of a study's table, from those of its runs that are there."""
    lines = []
    for criterion in study.criteria:
        for sparsity in study.sparsities:
            cells: dict[Space, dict[int, Result]] = {}
            for space in study.spaces:
                runs = {seed: Run(criterion, sparsity, space, seed) for seed in study.seeds}
                cells[space] = {seed: results[run] for seed, run in runs.items() if run in results}
            spatial, inter = cells.get("spatial", {}), cells.get("interspace", {})
            found = [result for by_seed in cells.values() for result in by_seed.values()]
            pairs = [
                inter[seed].accuracy - spatial[seed].accuracy
                for seed in study.seeds
                if seed in inter and seed in spatial
            ]
            lines.append(
                Line(
                    criterion,
                    sparsity,
                    {space: Spread.of([r.accuracy for r in by_seed.values()]) for space, by_seed in cells.items()},
                    Spread.of(pairs),
                    tuple(sorted({result.parameters_left for result in found})),
                    tuple(dict.fromkeys(name for result in found for name in result.spatial_layers)),
                    tuple(sorted({r.macs_left / r.macs for r in found if r.macs and r.macs_left is not None})),
                )
            )
    return lines


def cells(line: Line, study: Study) -> list[str]:
    """A line of the table as text."""
    accuracies = [str(line.accuracy[space] or "–") for space in study.spaces]
    difference = [] if len(study.spaces) < 2 else ["–" if line.difference is None else line.difference.signed]
    left = " or ".join(f"{count:,}" for count in line.parameters_left) or "–"
    macs = [" or ".join(f"{share:.1%}" for share in line.macs_left) or "–"] if shows_macs(study) else []
    return [line.criterion, f"{line.sparsity:.4g}", *accuracies, *difference, left, *macs]


def shows_macs(study: Study) -> bool:
    """Whether a criterion of the study cuts channels."""
    return any(cuts_channels(criteria.load(name)) for name in study.criteria)


def headers(study: Study) -> list[str]:
    """The heads of the table's columns."""
    accuracies = [f"{SHORT[space]} %" for space in study.spaces]
    difference = [] if len(study.spaces) < 2 else ["IP − SP"]
    macs = ["MACs left"] if shows_macs(study) else []
    return ["criterion", "sparsity", *accuracies, *difference, "parameters left", *macs]


def table(study: Study, lines: Sequence[Line]) -> Table:
    """The table for a terminal."""
    from rich import box
    from rich.table import Table

    seeds = len(study.seeds)
    found = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=f"Accuracy, {seeds} seed{'s' if seeds > 1 else ''}: mean ± standard deviation",
        caption="parameters left: trained bases included, equally many in both spaces",
    )
    for index, header in enumerate(headers(study)):
        if index == 0:
            found.add_column(header, overflow="fold")
        else:
            found.add_column(header.replace("s left", "s\nleft"), justify="right", no_wrap=True)
    for index, line in enumerate(lines):
        if index and line.criterion != lines[index - 1].criterion:
            found.add_section()
        found.add_row(*cells(line, study))
    return found


def variety_table(pairs: Sequence[variety.Pair]) -> Table:
    """The table of criteria with variety and without, for a terminal."""
    title = "With filter variety and without: accuracy, pairs of equal seed, a paired t-test"
    return _table(title, variety.HEADERS, [variety.cells(pair) for pair in pairs])


def cost_table(study: Study, costs: Sequence[deployed.Cost]) -> Table:
    """The table of bytes and latencies, for a terminal."""
    return _table(deployed.title(study), deployed.HEADERS, [deployed.cells(cost) for cost in costs])


def _table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table

    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title)
    found.add_column(headers[0], overflow="fold", min_width=len(headers[0]))
    for header in headers[1:]:
        found.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        found.add_row(*row)
    return found


def remarks(lines: Sequence[Line]) -> list[str]:
    """What a reader must know to read the table rightly, where interspace pruning loses included."""
    found = []
    compared = [(line, line.difference) for line in lines if line.difference is not None]
    losses = [f"{line.criterion} at {line.sparsity:g}" for line, difference in compared if difference.mean < 0]
    unclear = [difference for _, difference in compared if abs(difference.mean) < difference.deviation]
    if compared:
        found.append(
            f"On average over the seeds interspace pruning is below ordinary pruning in {len(losses)} of "
            f"{len(compared)} lines{': ' + '; '.join(losses) if losses else ''}."
        )
    if unclear:
        found.append(
            f"In {len(unclear)} of {len(compared)} lines the mean difference is smaller than its standard deviation "
            "over the seeds."
        )
    cutting = dict.fromkeys(line.criterion for line in lines if line.macs_left)
    if cutting:
        found.append(
            f"{', '.join(cutting)}: sparsity is the share of the channels that are cut. The networks of both spaces "
            "are equally large, as that of the interspace is baked and needs no basis then."
        )
    found.extend(
        f"{line.criterion} at {line.sparsity:g}: {', '.join(line.spatial_layers)} stayed spatial in the interspace "
        "runs, as the budget would not pay for the basis."
        for line in lines
        if line.spatial_layers
    )
    return found


def plot(study: Study, lines: Sequence[Line]) -> Figure:
    """Accuracy over sparsity, one panel for each criterion."""
    from matplotlib.figure import Figure

    count = len(study.criteria)
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(1.2 + 4.2 * columns, 3.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in panels[count:]:
        unused.set_axis_off()
    positions = {sparsity: place for place, sparsity in enumerate(sorted(study.sparsities))}
    style = {"spatial": ("tab:gray", "s", "--"), "interspace": ("tab:blue", "o", "-")}
    for panel, criterion in zip(panels[:count], study.criteria, strict=True):
        for offset, space in zip((-0.03, 0.03), study.spaces, strict=False):
            points = [
                (positions[line.sparsity] + offset, spread.mean, spread.deviation)
                for line in sorted(lines, key=lambda line: line.sparsity)
                if line.criterion == criterion and (spread := line.accuracy[space]) is not None
            ]
            if points:
                color, marker, dashes = style[space]
                x, mean, deviation = zip(*points, strict=True)
                panel.errorbar(
                    x, mean, deviation, color=color, marker=marker, linestyle=dashes, capsize=3,
                    label=f"{space} ({SHORT[space]})",
                )  # fmt: skip
        panel.set_title(criteria.load(criterion).title, fontsize="medium")
        panel.set_xticks(list(positions.values()), [f"{100 * sparsity:.4g} %" for sparsity in positions])
        panel.set_xlabel("share of channels cut" if cuts_channels(criteria.load(criterion)) else "sparsity")
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


def page(
    study: Study,
    lines: Sequence[Line],
    pairs: Sequence[variety.Pair],
    costs: Sequence[deployed.Cost],
    svg: str,
    command: str,
) -> str:
    """The HTML page: tables, plot, settings and remarks, nothing outside of it needed."""
    from jinja2 import Environment

    template = files("ip_plugin.compare").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        task=TASKS[study.settings.task].title,
        headers=headers(study),
        rows=[cells(line, study) for line in lines],
        svg=svg[svg.index("<svg") :],
        remarks=remarks(lines) + variety.remarks(pairs) + deployed.remarks(costs),
        variety_headers=variety.HEADERS,
        variety_rows=[variety.cells(pair) for pair in pairs],
        cost_title=deployed.title(study),
        cost_headers=deployed.HEADERS,
        cost_rows=[deployed.cells(cost) for cost in costs],
        settings=vars(study.settings),
        seeds=study.seeds,
        criteria={name: criteria.load(name) for name in study.criteria},
        versions=versions(),
        command=command,
    )
