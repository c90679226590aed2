"""Draw the pictures of docs/concepts.md: ``python docs/draw_concepts.py`` writes them to docs/pictures.

Text and lines are black or white as the reader's colour scheme asks.
"""

import argparse
import io
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, GREY, BLUE, ORANGE = "#010203", "#808080", "#3b82c4", "#d97b29"
KERNEL = np.array([[0.7, 0.6, 0.1], [0.3, 0.4, -0.3], [-0.2, -0.6, -0.5]])
mpl.rcParams |= {
    "svg.hashsalt": "ip_plugin", "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "font.size": 12, "font.family": "DejaVu Sans",
}  # fmt: skip


def dct():
    """The nine filters of the two-dimensional DCT-II, ``(9, 3, 3)``."""
    rows = np.array([[np.cos(np.pi * (i + 0.5) * k / 3) for i in range(3)] for k in range(3)])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return np.einsum("ai,bj->abij", rows, rows).reshape(9, 3, 3)


def tile(axis, values, title="", numbers=None):
    """A kernel or a filter as coloured squares, with numbers if their font size is given."""
    axis.imshow(values, cmap="RdBu", vmin=-1, vmax=1)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize="medium")
    for (row, column), value in np.ndenumerate(values) if numbers else ():
        text = f"{value:.1f}".replace("-0.0", "0.0").replace("-", "−")
        color = "white" if abs(value) > 0.55 else "black"
        axis.text(column, row, text, ha="center", va="center", color=color, fontsize=numbers)


def bars(axis, values, kept=None):
    """Coefficients as bars; those that are pruned are outlines."""
    for place, value in enumerate(values):
        full = kept is None or kept[place]
        axis.bar(place, value, color=BLUE if full else "none", edgecolor=BLUE if full else GREY, width=0.8)
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.set(xlim=(-0.6, len(values) - 0.4), ylim=(-1.1, 2.1), xticks=[], yticks=[])
    axis.set_frame_on(False)


def spaces():
    """One kernel, written in the standard basis and in another one."""
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    halves = figure.subfigures(2, 1, hspace=0.06)
    names = ("Spatial: the standard basis, coefficients are weights", "Interspace: another basis, here the DCT")
    for half, name, basis in zip(halves, names, (np.eye(9).reshape(9, 3, 3), dct()), strict=True):
        half.suptitle(name, fontsize="medium")
        axes = half.subplots(2, 10, width_ratios=(2.2, *[1] * 9), height_ratios=(1, 1.1))
        grid = axes[0, 0].get_gridspec()
        for axis in axes[:, 0]:
            axis.remove()
        tile(half.add_subplot(grid[:, 0]), KERNEL, "kernel", numbers="x-small")
        coefficients = np.einsum("nij,ij->n", basis, KERNEL)
        for number in range(9):
            tile(axes[0, 1 + number], basis[number])
            axis = axes[1, 1 + number]
            bars(axis, coefficients[number : number + 1])
            text = f"{coefficients[number]:.2f}".replace("-0.00", "0.00").replace("-", "−")
            axis.set_xlabel(text, fontsize="small")
        axes[0, 1].set_ylabel("filter", fontsize="small")
        axes[1, 1].set_ylabel("coefficient", fontsize="small")
    return figure


def pruning():
    """The same kernel with three of nine numbers kept, in both spaces."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots(2, 3, width_ratios=(2.4, 1, 1))
    for row, name, basis in zip(
        axes, ("weights (SP)", "coefficients (IP)"), (np.eye(9).reshape(9, 3, 3), dct()), strict=True
    ):
        coefficients = np.einsum("nij,ij->n", basis, KERNEL)
        kept = np.abs(coefficients) >= np.sort(np.abs(coefficients))[-3]
        result = np.einsum("n,nij->ij", coefficients * kept, basis)
        bars(row[0], coefficients, kept)
        row[0].set_title(f"{name}: three of nine kept", fontsize="medium")
        tile(row[1], result, "pruned kernel", numbers="medium")
        tile(row[2], result - KERNEL, "error", numbers="medium")
        row[2].set_xlabel(f"norm {np.linalg.norm(result - KERNEL):.2f}")
    return figure


def box(axis, x, y, text, color, width=1.5):
    """A rounded box with a text; returns its top and bottom centre."""
    axis.add_patch(FancyBboxPatch((x, y), width, 0.5, boxstyle="round,pad=0.06", facecolor="none", edgecolor=color))
    axis.text(x + width / 2, y + 0.25, text, ha="center", va="center", fontsize="small")
    return (x + width / 2, y + 0.56), (x + width / 2, y - 0.06)


def sharing():
    """Which layers have one basis, for the values of ``sharing``."""
    layers = ("conv1 3×3", "conv2 3×3", "conv3 3×3", "conv4 5×5")
    ways = (
        ('sharing="layer"', ("9 × 9", "9 × 9", "9 × 9", "25 × 25"), (0, 1, 2, 3)),
        ('sharing="model"', ("9 × 9", "25 × 25"), (0, 0, 0, 1)),
        ("sharing=by_stage, a function of yours", ("9 × 9", "9 × 9", "25 × 25"), (0, 0, 1, 2)),
    )
    figure = Figure(figsize=(7.2, 5.6), layout="constrained")
    for axis, (name, bases, owners) in zip(figure.subplots(3, 1), ways, strict=True):
        axis.set(xlim=(-0.2, 7.8), ylim=(-0.2, 2.1))
        axis.axis("off")
        axis.set_title(name, fontsize="medium", family="DejaVu Sans Mono")
        ends = []
        for number, text in enumerate(bases):
            users = [place for place, owner in enumerate(owners) if owner == number]
            ends.append(box(axis, 2 * sum(users) / len(users), 1.4, f"basis {text}", ORANGE)[1])
        for place, text in enumerate(layers):
            top, _ = box(axis, 2 * place, 0, text, BLUE)
            axis.add_patch(
                FancyArrowPatch(ends[owners[place]], top, arrowstyle="-|>", mutation_scale=12, color=GREY, shrinkA=0)
            )
    return figure


def scale():
    """Two ways to write the same kernels: magnitudes of coefficients differ until filters have one norm."""
    coefficients, norms = np.array([1.4, 0.9, 0.6]), np.array([0.5, 1.0, 2.0])
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    for axis, values, title, labels in zip(
        figure.subplots(1, 2, sharey=True),
        (coefficients, coefficients * norms),
        ("filters of different norm", "the same kernel, filters of norm 1"),
        (norms, np.ones(3)),
        strict=True,
    ):
        smallest = values.argmin()
        colors = [ORANGE if place == smallest else BLUE for place in range(3)]
        drawn = axis.bar(range(3), values, color=colors, width=0.6)
        axis.bar_label(drawn, [f"{value:.1f}" for value in values], color=INK, padding=3)
        axis.set_title(title, fontsize="medium")
        axis.set_xticks(range(3), [f"norm {norm:g}" for norm in labels])
        axis.set(ylim=(0, 1.7), yticks=[])
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.axes[0].set_ylabel("coefficient")
    return figure


def svg(figure):
    """A figure as SVG whose text and lines follow the reader's colour scheme."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    style = "<style>:root{color:#111}@media(prefers-color-scheme:dark){:root{color:#eee}}</style>"
    head, mark, rest = out.getvalue().replace(INK, "currentColor").partition("<defs>")
    return "\n".join(line.rstrip() for line in f"{head}{style}\n {mark}{rest}".splitlines()) + "\n"


PICTURES = (spaces, pruning, sharing, scale)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "pictures")
    output = parser.parse_args().output
    for draw in PICTURES:
        (output / f"{draw.__name__}.svg").write_text(svg(draw()), encoding="utf-8")


if __name__ == "__main__":
    main()
