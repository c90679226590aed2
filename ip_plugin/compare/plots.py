"""The figures of a study: what they show, in words and as data, and how they are drawn, wide or narrow."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .analysis import KEYS, SPATIAL, Analysis, is_control
from .answer import COMPARISONS, interval, points
from .config import DENSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

#: Widths of figures in inches: on a page, and on a phone.
WIDE, NARROW = 9.6, 4.0
#: Colours of the spaces (after Okabe and Ito, safe for colour-blind readers), with markers; spatial comes first.
COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b87d00", "#3a8fc0")
MARKERS = ("s", "o", "^", "D", "v", "P")
#: Colours that the page replaces: of text and axes, and of grids and faint lines.
INK, FAINT = "#1b1f24", "#c9ced6"
#: Inside of a mark that is not filled; the page replaces it, too.
HOLLOW = "#fefefe"
#: With more rows a heat map takes the place of the forest plot.
MOST_ROWS = 40
#: Criteria that are drawn where a figure looks inside of the networks; the data of a figure have all.
MOST_PANELS = 8

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9.5,
    "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.linewidth": 0.8,
    "grid.color": FAINT, "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True, "legend.frameon": False,
    "lines.linewidth": 1.6, "lines.markersize": 5, "axes.titlelocation": "left", "axes.facecolor": "none",
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """A figure of a study.

    Attributes:
        name: of its files.
        title: what it shows.
        text: how to read it.
        alt: what is seen, for those who do not see it.
        data: the numbers that are drawn.
        draw: makes the figure for a width in inches.
    """

    name: str
    title: str
    text: str
    alt: str
    data: pd.DataFrame
    draw: Callable[[float], Figure]

    def images(self, *kinds: str, width: float = WIDE) -> list[bytes]:
        """The figure as ``png`` or ``svg``; equal results give equal bytes."""
        import matplotlib

        images = []
        with matplotlib.rc_context(_STYLE | {"svg.hashsalt": f"{self.name}{width}"}):
            figure = self.draw(width)
            for kind in kinds:
                out = io.BytesIO()
                metadata = dict.fromkeys(("Date", "Creator", "Format", "Type")) if kind == "svg" else {"Software": None}
                figure.savefig(out, format=kind, dpi=110, metadata=metadata)
                figure.set_layout_engine("none")  # the layout is made once
                images.append(out.getvalue())
        return images


def plots(analysis: Analysis) -> list[Plot]:
    """The figures that a study has something for; the first one is the answer."""
    makers = (
        difference_plot,
        accuracy_plot,
        bytes_plot,
        macs_plot,
        control_plot,
        density_plot,
        basis_plot,
        singular_plot,
        curve_plot,
    )
    made = (make(analysis) for make in makers)
    return [plot for plot in made if plot is not None]


# Differences


def difference_plot(analysis: Analysis) -> Plot | None:
    """Paired differences of every cell: a forest plot, or a heat map where there are many."""
    frame = analysis.differences
    rows = frame[(frame["family"] == "cells") & frame["mean"].notna()]
    if rows.empty:
        return None
    many = len(rows) > MOST_ROWS
    wins, losses = (rows["significant"] & (rows["mean"] > 0)).sum(), (rows["significant"] & (rows["mean"] < 0)).sum()
    alt = (
        f"Mean differences, interspace minus spatial, of {len(rows)} cells, from {points(rows['mean'].min())} to "
        f"{points(rows['mean'].max())} points; the tests show {wins} above zero and {losses} below. All numbers are in "
        "the table of accuracies."
    )
    data = rows.reset_index()[[*KEYS, "count", "mean", "std", "low", "high", "p", "p_holm", "significant"]]
    if many:
        text = (
            "Mean paired difference in points of accuracy. Blue: the interspace is more accurate; orange: spatial is. "
            f"The colour is full from {_full(rows):.1f} points on. * p at most 0.05 after Holm's correction."
        )
        return Plot(
            "differences",
            "Interspace minus spatial, by cell",
            text,
            alt,
            data,
            lambda width: _heat_map(analysis, rows, width),
        )
    overall = analysis.overall[analysis.overall["family"] == "overall"]
    text = (
        "Mean paired difference in points of accuracy with its 95 % t interval; right of zero the interspace is more "
        "accurate. A filled mark: p at most 0.05 after Holm's correction for all tests of the study; intervals "
        "are for their cell alone."
    )
    return Plot(
        "differences",
        "Interspace minus spatial, by cell",
        text,
        alt,
        data,
        lambda width: _forest(analysis, rows, overall, width),
    )


def control_plot(analysis: Analysis) -> Plot | None:
    """Paired differences that suffixes and frozen bases make."""
    frame = analysis.differences
    rows = frame[(frame.index.get_level_values("comparison") != "space") & frame["mean"].notna()]
    if rows.empty or len(rows) > 2 * MOST_ROWS:
        return None
    names = dict.fromkeys(COMPARISONS.get(key[0], key[0]) for key in rows.index)
    overall = analysis.overall[analysis.overall["family"] == "controls"]
    return Plot(
        "controls",
        "What controls and variety change, by cell",
        "Mean paired difference, with the change minus without, in points of accuracy, with its 95 % t interval. A "
        "filled mark: p at most 0.05 after Holm's correction.",
        f"Differences from {points(rows['mean'].min())} to {points(rows['mean'].max())} points for: "
        f"{'; '.join(names)}. "
        "All numbers are in the table of controls.",
        rows.reset_index()[["comparison", *KEYS, "count", "mean", "std", "low", "high", "p", "p_holm", "significant"]],
        lambda width: _forest(analysis, rows, overall, width),
    )


def _forest(analysis: Analysis, rows: pd.DataFrame, overall: pd.DataFrame, width: float) -> Figure:
    """One line for each cell, with a mark for each space; the means over all cells below."""
    lines: dict[tuple[str, ...], list[tuple[str, pd.Series]]] = {}
    for (comparison, criterion, sparsity, space), row in rows.iterrows():
        group = criterion if comparison == "space" else f"{criterion} +{comparison}"
        name = "not pruned" if criterion == DENSE else f"{100 * sparsity:.4g} %"
        lines.setdefault((group, name), []).append((space, row))
    for (comparison, space), row in overall.iterrows():
        if pd.notna(row["mean"]):
            name = "" if comparison == "space" else f"+{comparison}"
            lines.setdefault(("overall", name), []).append((space, row))
    shown = list(dict.fromkeys(space for values in lines.values() for space, _ in values))
    numbers = width == WIDE and len(shown) == 1
    # Places from the top: a line for each title of a group, and one for each mark.
    place, places, ticks = 0.0, {}, []
    last = None
    for line, values in lines.items():
        if line[0] != last:
            place += 0.4 * (last is not None)
            ticks.append((place, line[0], True))
            place += 0.0 if (line[0] == "overall" and not line[1]) else 0.9
        last = line[0]
        if line[1]:
            ticks.append((place, line[1], False))
        places[line] = place
        place += 0.75 + 0.35 * max(len(values) - 1, 0)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 0.75 + 0.21 * place + 0.25 * (len(shown) > 1)), layout="constrained")
    axes = figure.subplots()
    everything = pd.concat([rows, overall])
    # Intervals of two or three seeds are so long that means could not be told apart; those may leave the picture.
    most = 3 * everything["mean"].abs().max() + 0.5
    left = min(0.0, max(everything[["low", "mean"]].min().min(), -most))
    right = max(0.0, min(everything[["high", "mean"]].max().max(), most))
    axes.set_xlim(left - 0.06 * (right - left), right + 0.06 * (right - left))
    axes.axvline(0, color=INK, linewidth=0.9)
    for line, values in lines.items():
        for number, (space, row) in enumerate(values):
            y = places[line] + 0.35 * number
            color, marker = _look(analysis, space)
            whole = line[0] == "overall"
            if pd.notna(row["low"]):
                axes.plot(
                    [row["low"], row["high"]],
                    [y, y],
                    color=color,
                    linewidth=2.4 if whole else 1.5,
                    solid_capstyle="butt",
                )
            face = color if row["significant"] else HOLLOW
            axes.plot([row["mean"]], [y], marker="D" if whole else marker, color=color, markerfacecolor=face,
                      markersize=8 if whole else 6, markeredgewidth=1.5, clip_on=True)  # fmt: skip
            if numbers:
                text = points(row["mean"]) + ("" if pd.isna(row["low"]) else f"  [{interval(row)}]")
                axes.text(1.01, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
    axes.set_ylim(place, -0.7)
    axes.set_yticks([y for y, _, _ in ticks], [name for _, name, _ in ticks])
    for label, (_, _, bold) in zip(axes.get_yticklabels(), ticks, strict=True):
        label.set_fontweight("bold" if bold else "normal")
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("difference in points of accuracy")
    if len(shown) > 1:
        _legend(figure, analysis, shown, lines=False)
    return figure


def _full(rows: pd.DataFrame) -> float:
    """The difference from which on a heat map has its full colour."""
    return max(0.5, float(np.nanquantile(rows["mean"].abs(), 0.9)))


def _heat_map(analysis: Analysis, rows: pd.DataFrame, width: float) -> Figure:
    """Criteria by sparsities, a panel for each interspace value."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    # Almost the colours of the spaces, which the page replaces: these and the text on them are the same on dark pages.
    colors = LinearSegmentedColormap.from_list("spaces", ["#d55e01", "#f4d9c6", "#f7f7f7", "#c6dcec", "#0072b1"])
    spaces = list(dict.fromkeys(rows.index.get_level_values("space")))
    names = list(dict.fromkeys(c for _, c, _, _ in rows.index if c != DENSE))
    sparsities = sorted({s for _, c, s, _ in rows.index if c != DENSE})
    columns = len(spaces) if width == WIDE and len(spaces) <= 3 else 1
    lines = -(-len(spaces) // columns)
    figure = Figure(figsize=(width, lines * (0.7 + 0.24 * len(names))), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    top = _full(rows)
    for panel, space in zip(panels, spaces, strict=False):
        part = rows.xs(space, level="space").droplevel("comparison")
        table, shown = (
            part[c].unstack("sparsity").reindex(index=names, columns=sparsities) for c in ("mean", "significant")
        )
        panel.pcolormesh(table.to_numpy(float), cmap=colors, vmin=-top, vmax=top, edgecolors=HOLLOW, linewidth=1)
        for y, x in np.argwhere(table.notna().to_numpy()):
            value = table.iloc[y, x]
            dark = value > 0.93 * top
            text = points(value) + (" *" if shown.iloc[y, x] is True or shown.iloc[y, x] == 1 else "")
            panel.text(
                x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8, color="#ffffff" if dark else "#111111"
            )
        panel.set_yticks(np.arange(len(names)) + 0.5, names)
        panel.set_xticks(np.arange(len(sparsities)) + 0.5, [f"{100 * s:.4g} %" for s in sparsities])
        panel.invert_yaxis()
        panel.tick_params(length=0)
        panel.grid(visible=False)
        for spine in panel.spines.values():
            spine.set_visible(False)
        if len(spaces) > 1:
            panel.set_title(analysis.label(space))
    for unused in panels[len(spaces) :]:
        unused.set_axis_off()
    return figure


# Accuracies


def accuracy_plot(analysis: Analysis) -> Plot | None:
    """Accuracy over sparsity, one panel for each criterion."""
    frame = analysis.accuracy.dropna(subset="mean").reset_index()
    if frame.empty:
        return None
    positions = {sparsity: number for number, sparsity in enumerate(sorted(analysis.sparsities))}

    def draw(width: float) -> Figure:
        figure, panels = _panels(analysis.criteria, width, "test accuracy in %")
        for panel, criterion in panels:
            for space in analysis.spaces:
                rows = frame[(frame["criterion"] == criterion) & (frame["space"] == space)].sort_values("sparsity")
                color, marker = _look(analysis, space)
                x = rows["sparsity"].map(positions)
                panel.fill_between(x, rows["low"], rows["high"], color=color, alpha=0.18, linewidth=0)
                panel.plot(x, rows["mean"], marker=marker, color=color)
                dense = frame[(frame["criterion"] == DENSE) & (frame["space"] == space)]["mean"]
                if len(dense):
                    panel.axhline(dense.iloc[0], color=color, linewidth=1, linestyle=(0, (2, 2)))
            panel.set_xticks(list(positions.values()), [f"{100 * s:.4g} %" for s in positions])
            panel.margins(x=0.08)
            panel.set_ylim(max(panel.get_ylim()[0], -2), min(panel.get_ylim()[1], 102))
        figure.supxlabel("sparsity", fontsize=9)
        _legend(figure, analysis, analysis.spaces)
        return figure

    dense = " Dotted: networks that are not pruned." if DENSE in set(frame["criterion"]) else ""
    return Plot(
        "accuracy",
        "Accuracy over sparsity",
        f"Mean over the seeds with its 95 % t interval as a band; none for one seed. Sparsities stand at equal "
        f"distances.{dense}",
        f"One panel for each of {len(analysis.criteria)} criteria, a line for each space; mean accuracies from "
        f"{frame['mean'].min():.1f} to {frame['mean'].max():.1f} %. All numbers are in the table of accuracies.",
        frame,
        draw,
    )


def bytes_plot(analysis: Analysis) -> Plot | None:
    """Accuracy over the size of the compact checkpoint."""
    return _trade_off(analysis, "file_bytes", 1e-3, "Accuracy over the size of the file", "compact checkpoint in KB")


def macs_plot(analysis: Analysis) -> Plot | None:
    """Accuracy over the multiply-adds that are left."""
    return _trade_off(
        analysis, "macs_left", 1e-6, "Accuracy over multiply-adds", "multiply-adds of one image, in millions"
    )


def _trade_off(analysis: Analysis, column: str, scale: float, title: str, label: str) -> Plot | None:
    costs = analysis.costs[column, "mean"].rename("cost") * scale
    frame = analysis.accuracy.join(costs).dropna(subset=["mean", "cost"]).reset_index()
    frame = frame[frame["criterion"] != DENSE]
    if frame.empty:
        return None
    criteria = [c for c in analysis.criteria if c in set(frame["criterion"])][:MOST_PANELS]

    def draw(width: float) -> Figure:
        figure, panels = _panels(criteria, width, "test accuracy in %")
        for panel, criterion in panels:
            for space in analysis.spaces:
                rows = frame[(frame["criterion"] == criterion) & (frame["space"] == space)].sort_values("cost")
                color, marker = _look(analysis, space)
                panel.fill_between(rows["cost"], rows["low"], rows["high"], color=color, alpha=0.18, linewidth=0)
                panel.plot(rows["cost"], rows["mean"], marker=marker, color=color)
            panel.set_ylim(max(panel.get_ylim()[0], -2), min(panel.get_ylim()[1], 102))
            panel.set_xscale("log")
            _plain_log_ticks(panel.xaxis, frame["cost"], "{:g}")
        figure.supxlabel(label, fontsize=9)
        _legend(figure, analysis, analysis.spaces)
        return figure

    return Plot(
        column,
        title,
        "Mean over the seeds, with the 95 % t interval of accuracy as a band; logarithmic scale. Left and above is "
        "better.",
        f"Mean accuracies from {frame['mean'].min():.1f} to {frame['mean'].max():.1f} % over {label} from "
        f"{frame['cost'].min():.3g} to {frame['cost'].max():.3g}. All numbers are in the tables of accuracies and "
        "costs.",
        frame,
        draw,
    )


def _plain_log_ticks(axis: Axis, values: pd.Series, form: str, scale: float = 1.0) -> None:
    """A few round numbers on a logarithmic axis."""
    low, high = values.min(), values.max()
    steps = (1, 2, 5) if high / low < 50 else (1,)
    ticks = [m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in steps]
    ticks = [tick for tick in ticks if 0.7 * low <= tick <= 1.4 * high]
    axis.set_ticks([scale * tick for tick in ticks], [form.format(tick) for tick in ticks])
    axis.minorticks_off()


# Inside of the networks


def density_plot(analysis: Analysis) -> Plot | None:
    """Share of entries that is kept, by layer."""
    frame = analysis.density[analysis.density["criterion"] != DENSE]
    if frame.empty:
        return None
    means = frame.groupby([*KEYS, "layer"], sort=False)["density"].mean().reset_index()
    sparsities = _few(sorted(set(means["sparsity"])), 3)
    layers = list(dict.fromkeys(means["layer"]))
    ticks = [name if len(name) < 15 else f"…{name[-13:]}" for name in layers]
    turned = len(layers) <= 12 and max(map(len, layers)) > 4
    criteria = [c for c in analysis.criteria if c in set(means["criterion"]) and not is_control(c)]
    criteria = criteria[:MOST_PANELS]

    def draw(width: float) -> Figure:
        below = 0.05 * max(map(len, ticks)) if turned else 0.0
        figure, panels = _panels(criteria, width, "entries kept", 2.1 + below, below=below)
        for panel, criterion in panels:
            for space in analysis.spaces:
                color, marker = _look(analysis, space)
                for sparsity, style in zip(sparsities, ("-", "--", ":"), strict=False):
                    rows = means[
                        means["criterion"].eq(criterion) & means["space"].eq(space) & means["sparsity"].eq(sparsity)
                    ]
                    x = [layers.index(layer) for layer in rows["layer"]]
                    panel.plot(
                        x, rows["density"], style, color=color, marker=marker if len(layers) <= 24 else "", markersize=4
                    )
            panel.set_yscale("log")
            inside = means.loc[means["criterion"].eq(criterion) & means["density"].gt(0), "density"]
            _plain_log_ticks(panel.yaxis, 100 * inside, "{:g} %", 0.01)
            if len(layers) <= 12:
                turn: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if turned else {}
                panel.set_xticks(range(len(layers)), ticks, **turn)
            else:
                panel.set_xlabel("number of the layer")
        if len(layers) <= 12:
            figure.supxlabel("layer", fontsize=9)
        styles = [(f"{100 * s:.4g} %", style) for s, style in zip(sparsities, ("-", "--", ":"), strict=False)]
        _legend(figure, analysis, analysis.spaces, styles)
        return figure

    return Plot(
        "density",
        "Where entries are kept",
        "Share of the entries of each layer that is kept, mean over the seeds; logarithmic scale. Layers in the "
        "order of "
        f"the network. {'The lowest, a middle and the highest sparsity.' if len(set(means['sparsity'])) > 3 else ''}",
        f"One panel for each of {len(criteria)} criteria, {len(layers)} layers from {layers[0]} to {layers[-1]}; "
        "shares "
        f"from {100 * means['density'].min():.2g} to {100 * means['density'].max():.2g} %. All numbers are in the "
        "data.",
        means,
        draw,
    )


def basis_plot(analysis: Analysis) -> Plot | None:
    """The filters of learned bases: of the first seed, at the highest sparsity, of the first layer that has a basis."""
    chosen: dict[tuple[str, str], tuple[tuple[Any, ...], str, np.ndarray[Any, Any]]] = {}
    for key, layers in analysis.bases.items():
        criterion, sparsity, space, _ = key
        if not layers or is_control(criterion):
            continue
        layer, matrix = next(iter(layers.items()))
        kept = chosen.get((space, criterion))
        if kept is None or sparsity > kept[0][1]:
            chosen[space, criterion] = (tuple(key), layer, np.asarray(matrix, dtype=float))
    shown = sorted(chosen, key=lambda pair: (analysis.spaces.index(pair[0]), pair[1] != DENSE))[:MOST_PANELS]
    if not shown:
        return None
    data = [
        (*chosen[pair][0], chosen[pair][1], n, i, value)
        for pair in shown for (n, i), value in np.ndenumerate(chosen[pair][2])
    ]  # fmt: skip

    def draw(width: float) -> Figure:
        figure, panels = _panels(shown, width, height=2.05, narrowest=1.9)
        for panel, (space, criterion) in panels:
            (_, sparsity, _, _), _, matrix = chosen[space, criterion]
            tiles = _tiles(matrix)
            top = np.nanmax(np.abs(matrix))
            panel.pcolormesh(tiles, cmap="PuOr_r", vmin=-top, vmax=top, edgecolors="face", linewidth=0.3)
            panel.invert_yaxis()
            panel.set_aspect("equal")
            panel.set_axis_off()
            where = DENSE if criterion == DENSE else f"{criterion} at {100 * sparsity:.4g} %"
            prefix = f"{analysis.label(space)}, " if len(analysis.interspaces) > 1 else ""
            panel.set_title(f"{prefix}{where}", fontsize=8.5)
            panel.set_anchor("NW")
        figure.subplots_adjust(0.01, 0.02, 0.99, hspace=0.25, wspace=0.1)
        return figure

    return Plot(
        "bases",
        "Learned bases",
        "The filters of one basis after training (first seed, highest sparsity, basis of the layer named in the data), "
        "in reading order. Purple is negative, orange positive, white zero; each panel has a scale of its own.",
        f"{len(shown)} bases, for: {'; '.join(f'{c}, {analysis.label(s)}' for s, c in shown)}. All numbers are in "
        "the data.",
        pd.DataFrame(data, columns=[*KEYS, "seed", "layer", "filter", "entry", "value"]),
        draw,
    )


def _tiles(matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The filters of a basis side by side, with gaps of NaN; filters that are no squares stand as rows."""
    size = math.isqrt(matrix.shape[1])
    filters = matrix.reshape(-1, size, size) if size * size == matrix.shape[1] else matrix[:, None, :]
    count, height, width = filters.shape
    columns = math.ceil(math.sqrt(count)) if height > 1 else 1
    lines = -(-count // columns)
    picture = np.full((lines * (height + 1) - 1, columns * (width + 1) - 1), np.nan)
    for number, values in enumerate(filters):
        y, x = divmod(number, columns)
        picture[y * (height + 1) : y * (height + 1) + height, x * (width + 1) : x * (width + 1) + width] = values
    return picture


def singular_plot(analysis: Analysis) -> Plot | None:
    """Singular values of the learned bases."""
    rows = [
        (*key, layer, number, value)
        for key, layers in analysis.bases.items() for layer, matrix in layers.items()
        for number, value in enumerate(np.linalg.svd(np.asarray(matrix, dtype=float), compute_uv=False), start=1)
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=[*KEYS, "seed", "layer", "number", "value"])
    frame = frame[~frame["criterion"].map(is_control)]
    if frame.empty:
        return None
    means = frame.groupby([*KEYS, "number"], sort=False)["value"].agg(["mean", "min", "max"]).reset_index()
    criteria = [c for c in [DENSE, *analysis.criteria] if c in set(means["criterion"])][:MOST_PANELS]

    def draw(width: float) -> Figure:
        figure, panels = _panels(criteria, width, "singular value")
        for panel, criterion in panels:
            inside = means[means["criterion"] == criterion]
            for space in analysis.interspaces:
                color, marker = _look(analysis, space)
                for sparsity, style in zip(_few(sorted(set(inside["sparsity"])), 3), ("-", "--", ":"), strict=False):
                    part = inside[inside["space"].eq(space) & inside["sparsity"].eq(sparsity)]
                    panel.fill_between(part["number"], part["min"], part["max"], color=color, alpha=0.12, linewidth=0)
                    panel.plot(part["number"], part["mean"], style, color=color, marker=marker, markersize=4)
            panel.set_ylim(bottom=0)
        figure.supxlabel("number of the singular value", fontsize=9)
        few = _few(sorted(set(means.loc[means["criterion"] != DENSE, "sparsity"])), 3)
        styles = [(f"{100 * s:.4g} %", style) for s, style in zip(few, ("-", "--", ":"), strict=False)]
        _legend(figure, analysis, analysis.interspaces, styles)
        return figure

    return Plot(
        "singular_values",
        "Singular values of the learned bases",
        "Mean over seeds and layers, from the lowest to the highest as a band. Equal values: the basis is "
        "orthonormal up "
        "to scale; a value near zero: a direction that filters can hardly take.",
        f"Singular values from {frame['value'].min():.2g} to {frame['value'].max():.2g} for {len(criteria)} "
        "criteria. All "
        "numbers are in the data.",
        means,
        draw,
    )


def curve_plot(analysis: Analysis) -> Plot | None:
    """Training curves at the highest sparsity: loss, and the accuracy on validation images where there are any."""
    frame = analysis.curves
    if frame.empty:
        return None
    highest = max(analysis.sparsities, default=0.0)
    frame = frame[(frame["criterion"] == DENSE) | (frame["sparsity"] == highest)]
    criteria = [c for c in [DENSE, *analysis.criteria] if c in set(frame["criterion"])][:MOST_PANELS]
    titles = {"accuracy": "validation accuracy in %", "train_accuracy": "training accuracy in %"}
    measured = [name for name in titles if name in frame and frame[name].notna().any()]
    names = {"loss": "training loss", **{name: titles[name] for name in measured[:1]}}
    over = frame.groupby([*KEYS, "phase", "epoch"], sort=False)[list(names)].agg(["mean", "min", "max"])
    over.columns = ["_".join(pair) for pair in over.columns]
    over = over.reset_index()

    def draw(width: float) -> Figure:
        pairs = [(c, name) for name in names for c in criteria]
        figure, panels = _panels(pairs, width, " ", 1.8, 1.9, new_line=len(criteria))
        for number, (panel, (criterion, name)) in enumerate(panels):
            inside = over[over["criterion"] == criterion]
            for space in analysis.spaces:
                rows = inside[inside["space"] == space].sort_values("epoch")
                color, _ = _look(analysis, space)
                panel.fill_between(
                    rows["epoch"], rows[f"{name}_min"], rows[f"{name}_max"], color=color, alpha=0.18, linewidth=0
                )
                panel.plot(rows["epoch"], rows[f"{name}_mean"], color=color)
            tuned = inside.loc[inside["phase"] == "finetune", "epoch"]
            if len(tuned):
                panel.axvline(tuned.min() - 0.5, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
            if name == "loss" and (over["loss_min"] > 0).all():
                panel.set_yscale("log")
                panel.minorticks_off()
            panel.set_title(criterion)
            if number % len(criteria) == 0:
                panel.set_ylabel(names[name])
        figure.supxlabel("epoch", fontsize=9)
        _legend(figure, analysis, analysis.spaces)
        return figure

    return Plot(
        "curves",
        "Training curves",
        "Mean over the seeds, from the lowest to the highest as a band; a dotted line where fine-tuning begins. "
        "Networks "
        f"that are not pruned, and sparsity {100 * highest:.4g} %; the data of all runs are in the folder of the "
        "results.",
        f"{' and '.join(names.values())} over the epochs, one panel for each of {len(criteria)} criteria, a line for "
        "each "
        "space. All numbers are in the data.",
        over,
        draw,
    )


# Shared


def _look(analysis: Analysis, space: str) -> tuple[str, str]:
    """Colour and marker of a space, the same in every figure."""
    number = 0 if space == SPATIAL else 1 + analysis.interspaces.index(space)
    return COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]


def _few(values: Sequence[float], most: int) -> list[float]:
    """At most so many values at equal distances, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _panels(
    names: Sequence[Any],
    width: float,
    label: str = "",
    height: float = 2.1,
    narrowest: float = 2.3,
    new_line: int | None = None,
    below: float = 0.0,
) -> tuple[Figure, Iterator[tuple[Axes, Any]]]:
    """A figure with a panel for each name, as many in a line as fit; titles are the names.

    Args:
        names: of the panels.
        width: of the figure in inches.
        label: of the vertical axes.
        height: of a panel with its title and ticks, in inches.
        narrowest: width of a panel from which one more fits.
        new_line: number of names after which a line begins anew.
        below: inches that tick labels need more than numbers.
    """
    from matplotlib.figure import Figure

    group = new_line or len(names)
    columns = max(1, min(group, int(width / narrowest)))
    lines = -(-group // columns) * (len(names) // group)
    if columns < 3 and width == WIDE:
        width = min(width, (columns + 0.25) * 3.4)
    # Margins in inches, by hand: matplotlib's layouts take as long as all of the drawing.
    left, right, top, bottom, between, gap = 0.66 if label else 0.5, 0.1, 0.3, 0.52 + below, 0.5, 0.55 + below
    tall = top + bottom + lines * height - gap
    across = (width - left - right - (columns - 1) * between) / columns
    figure = Figure(figsize=(width, tall))
    grid = figure.subplots(lines, columns, squeeze=False)
    figure.subplots_adjust(
        left / width, bottom / tall, 1 - right / width, 1 - top / tall, between / across, gap / (height - gap)
    )
    panels = list(grid.flatten())
    per = -(-group // columns) * columns
    used = [panels[i // group * per + i % group] for i in range(len(names))]
    for panel in set(panels) - set(used):
        panel.set_axis_off()
    for panel, name in zip(used, names, strict=True):
        if isinstance(name, str):
            panel.set_title(name)
        panel.locator_params(nbins=5)
    for panel in grid[:, 0]:
        panel.set_ylabel(label)
    return figure, zip(used, names, strict=True)


def _legend(
    figure: Figure,
    analysis: Analysis,
    spaces: Sequence[str],
    styles: Sequence[tuple[str, Any]] = (),
    lines: bool = True,
) -> None:
    """Spaces by colour and marker, and what line styles stand for, above the figure."""
    from matplotlib.lines import Line2D

    handles = []
    for space in spaces:
        color, marker = _look(analysis, space)
        name = {"SP": "spatial (SP)", "IP": "interspace (IP)"}.get(analysis.label(space), analysis.label(space))
        handles.append(Line2D([], [], color=color, marker=marker, linestyle="-" if lines else "", label=name))
    if len(styles) > 1:
        handles += [Line2D([], [], color=INK, linestyle=style, linewidth=1.2, label=label) for label, style in styles]
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, int(figure.get_figwidth() / (0.55 + 0.066 * longest)))
    columns = min(columns, len(handles))
    outside = figure.get_layout_engine() is not None
    place: dict[str, Any] = {"loc": "outside upper left"} if outside else {"loc": "upper left", "borderaxespad": 0.1}
    if not outside:  # the figure grows by the legend
        tall, above = figure.get_figheight(), 0.1 + 0.19 * -(-len(handles) // columns)
        margins, new = figure.subplotpars, tall + above
        figure.set_figheight(new)
        figure.subplots_adjust(bottom=margins.bottom * tall / new, top=1 - ((1 - margins.top) * tall + above) / new)
    figure.legend(handles=handles, ncols=columns, fontsize=8.5, **place)
