"""Figures that look inside of the networks: densities of layers, learned bases, training curves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..analysis import KEYS, Analysis, is_control
from ..config import DENSE
from .figure import INK, MOST_PANELS, Plot, add_legend, line_styles, look, panels_of, plain_log_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def density_plot(analysis: Analysis) -> Plot | None:
    """Share of entries that is kept, by layer."""
    frame = analysis.density[analysis.density["criterion"] != DENSE]
    if frame.empty:
        return None
    means = frame.groupby([*KEYS, "layer"], sort=False)["density"].mean().reset_index()
    styles = line_styles(means["sparsity"])
    few = " The lowest, a middle and the highest sparsity." if len(set(means["sparsity"])) > len(styles) else ""
    layers = list(dict.fromkeys(means["layer"]))
    ticks = [name if len(name) < 15 else f"…{name[-13:]}" for name in layers]
    turned = len(layers) <= 12 and max(map(len, layers)) > 4
    criteria = [c for c in analysis.criteria if c in set(means["criterion"]) and not is_control(c)]
    criteria = criteria[:MOST_PANELS]

    def draw(width: float) -> Figure:
        below = 0.05 * max(map(len, ticks)) if turned else 0.0
        figure, panels = panels_of(criteria, width, "entries kept", 2.1 + below, below=below)
        for panel, criterion in panels:
            for space in analysis.spaces:
                color, marker = look(analysis, space)
                for sparsity, style in styles.items():
                    rows = means[
                        means["criterion"].eq(criterion) & means["space"].eq(space) & means["sparsity"].eq(sparsity)
                    ]
                    x = [layers.index(layer) for layer in rows["layer"]]
                    panel.plot(
                        x, rows["density"], style, color=color, marker=marker if len(layers) <= 24 else "", markersize=4
                    )
            panel.set_yscale("log")
            inside = means.loc[means["criterion"].eq(criterion) & means["density"].gt(0), "density"]
            plain_log_ticks(panel.yaxis, 100 * inside, "{:g} %", 0.01)
            if len(layers) <= 12:
                turn: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if turned else {}
                panel.set_xticks(range(len(layers)), ticks, **turn)
            else:
                panel.set_xlabel("number of the layer")
        if len(layers) <= 12:
            figure.supxlabel("layer", fontsize=9)
        add_legend(figure, analysis, analysis.spaces, styles)
        return figure

    return Plot(
        "density",
        "Where entries are kept",
        "Share of the entries of each layer that is kept, mean over the seeds; logarithmic scale. Layers are in the "
        f"order of the network.{few}",
        f"One panel for each of {len(criteria)} criteria, {len(layers)} layers from {layers[0]} to {layers[-1]}; "
        f"shares from {100 * means['density'].min():.2g} to {100 * means['density'].max():.2g} %. All numbers are in "
        "the data.",
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
        figure, panels = panels_of(shown, width, height=2.05, narrowest=1.9)
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
        figure, panels = panels_of(criteria, width, "singular value")
        for panel, criterion in panels:
            inside = means[means["criterion"] == criterion]
            for space in analysis.interspaces:
                color, marker = look(analysis, space)
                for sparsity, style in line_styles(inside["sparsity"]).items():
                    part = inside[inside["space"].eq(space) & inside["sparsity"].eq(sparsity)]
                    panel.fill_between(part["number"], part["min"], part["max"], color=color, alpha=0.12, linewidth=0)
                    panel.plot(part["number"], part["mean"], style, color=color, marker=marker, markersize=4)
            panel.set_ylim(bottom=0)
        figure.supxlabel("number of the singular value", fontsize=9)
        pruned = means.loc[means["criterion"] != DENSE, "sparsity"]
        add_legend(figure, analysis, analysis.interspaces, line_styles(pruned))
        return figure

    return Plot(
        "singular_values",
        "Singular values of the learned bases",
        "Mean over seeds and layers, from the lowest to the highest as a band. Equal values: the basis is orthonormal "
        "up to scale; a value near zero: a direction that filters can hardly take.",
        f"Singular values from {frame['value'].min():.2g} to {frame['value'].max():.2g} for {len(criteria)} criteria. "
        "All numbers are in the data.",
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
        figure, panels = panels_of(pairs, width, " ", 1.8, 1.9, new_line=len(criteria))
        for number, (panel, (criterion, name)) in enumerate(panels):
            inside = over[over["criterion"] == criterion]
            for space in analysis.spaces:
                rows = inside[inside["space"] == space].sort_values("epoch")
                color, _ = look(analysis, space)
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
        add_legend(figure, analysis, analysis.spaces)
        return figure

    return Plot(
        "curves",
        "Training curves",
        "Mean over the seeds, from the lowest to the highest as a band; a dotted line where fine-tuning begins. "
        f"Networks that are not pruned, and sparsity {100 * highest:.4g} %; the data of all runs are in the folder of "
        "the results.",
        f"{' and '.join(names.values())} over the epochs, one panel for each of {len(criteria)} criteria, a line for "
        "each space. All numbers are in the data.",
        over,
        draw,
    )
