"""Figures of accuracies: over sparsity, over the size of the file, over multiply-adds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..analysis import Analysis
from ..config import DENSE
from .figure import MOST_PANELS, Plot, add_legend, look, panels_of, plain_log_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def accuracy_plot(analysis: Analysis) -> Plot | None:
    """Accuracy over sparsity, one panel for each criterion."""
    frame = analysis.accuracy.dropna(subset="mean").reset_index()
    if frame.empty:
        return None
    positions = {sparsity: number for number, sparsity in enumerate(sorted(analysis.sparsities))}

    def draw(width: float) -> Figure:
        figure, panels = panels_of(analysis.criteria, width, "test accuracy in %")
        for panel, criterion in panels:
            for space in analysis.spaces:
                rows = frame[(frame["criterion"] == criterion) & (frame["space"] == space)].sort_values("sparsity")
                color, marker = look(analysis, space)
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
        add_legend(figure, analysis, analysis.spaces)
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
        figure, panels = panels_of(criteria, width, "test accuracy in %")
        for panel, criterion in panels:
            for space in analysis.spaces:
                rows = frame[(frame["criterion"] == criterion) & (frame["space"] == space)].sort_values("cost")
                color, marker = look(analysis, space)
                panel.fill_between(rows["cost"], rows["low"], rows["high"], color=color, alpha=0.18, linewidth=0)
                panel.plot(rows["cost"], rows["mean"], marker=marker, color=color)
            panel.set_ylim(max(panel.get_ylim()[0], -2), min(panel.get_ylim()[1], 102))
            panel.set_xscale("log")
            plain_log_ticks(panel.xaxis, frame["cost"], "{:g}")
        figure.supxlabel(label, fontsize=9)
        add_legend(figure, analysis, analysis.spaces)
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
