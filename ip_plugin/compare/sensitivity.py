"""Sensitivity of the layers of a study's dense network, in each of its spaces; what `ip-plugin sensitivity` runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from ip_plugin.errors import AmountError
from ip_plugin.methods import Sensitivity
from ip_plugin.utils.atomic import write_whole

from .report import image

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

#: {space: {total sparsity: {layer: sparsity}}}
Suggestions = dict[str, dict[float, dict[str, float]]]


def suggestions(results: Mapping[str, Sensitivity], totals: Sequence[float]) -> Suggestions:
    """Sparsities of layers for total sparsities, by space; those that the bases of a space leave no entries for are left out."""
    suggested: Suggestions = {}
    for space, result in results.items():
        suggested[space] = {}
        for total in totals:
            try:
                suggested[space][total] = result.suggest(total)
            except AmountError:
                continue
    return suggested


def frame(results: Mapping[str, Sensitivity]) -> pd.DataFrame:
    """The measurements of all spaces: those of `Sensitivity.frame` with a column ``space``."""
    frames = {space: result.frame() for space, result in results.items()}
    return pd.concat(frames, names=["space"]).droplevel(1).reset_index()


def plot(results: Mapping[str, Sensitivity]) -> Figure:
    """The measurements of each space side by side, on one scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(results), 4), layout="constrained")
    (axes,) = figure.subplots(1, len(results), sharey=True, squeeze=False)
    for (space, result), place in zip(results.items(), axes, strict=True):
        result.plot(place)
        place.set_title(space)
    return figure


def write(results: Mapping[str, Sensitivity], totals: Sequence[float], folder: Path) -> None:
    """Write ``sensitivity.csv``, ``sensitivity.png``, ``sensitivity.svg`` and ``suggested.json`` into a folder."""
    figure = plot(results)
    contents = {
        "sensitivity.csv": frame(results).to_csv(index=False),
        "sensitivity.png": image(figure, "png"),
        "sensitivity.svg": image(figure, "svg"),
        "suggested.json": json.dumps(suggestions(results, totals), indent=2) + "\n",
    }
    for name, content in contents.items():
        write_whole(folder / name, content)


def table(results: Mapping[str, Sensitivity], totals: Sequence[float]) -> Table:
    """The suggested sparsities: a row for each layer, a column for each space and total."""
    from rich.table import Table

    suggested = suggestions(results, totals)
    columns = [(space, total) for total in totals for space in results if total in suggested[space]]
    shown = Table("layer", *(f"{space}\n{total:g}" for space, total in columns), title="Suggested sparsities of layers")
    for name in next(iter(results.values())).curves:
        shown.add_row(name, *(f"{suggested[space][total][name]:.3f}" for space, total in columns))
    return shown
