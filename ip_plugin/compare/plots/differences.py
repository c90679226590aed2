"""Figures of paired differences: a forest plot of cells, or a heat map where there are many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..analysis import KEYS, Analysis
from ..answer import COMPARISONS, interval, points
from ..config import DENSE
from .figure import HOLLOW, INK, WIDE, Plot, add_legend, look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: With more rows a heat map takes the place of the forest plot.
MOST_ROWS = 40


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
            color, marker = look(analysis, space)
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
        add_legend(figure, analysis, shown, lines=False)
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
