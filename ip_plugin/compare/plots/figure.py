"""One figure of a study, `Plot`, and what figures share: widths, colours, panels, legends."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..analysis import SPATIAL, Analysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.typing import LineStyleType

#: Widths of figures in inches: on a page, and on a phone.
WIDE, NARROW = 9.6, 4.0
#: Colours of the spaces (after Okabe and Ito, safe for colour-blind readers), with markers; spatial comes first.
COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b87d00", "#3a8fc0")
MARKERS = ("s", "o", "^", "D", "v", "P")
#: Colours that the page replaces: of text and axes, and of grids and faint lines.
INK, FAINT = "#1b1f24", "#c9ced6"
#: Inside of a mark that is not filled; the page replaces it, too.
HOLLOW = "#fefefe"
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


def look(analysis: Analysis, space: str) -> tuple[str, str]:
    """Colour and marker of a space, the same in every figure."""
    number = 0 if space == SPATIAL else 1 + analysis.interspaces.index(space)
    return COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]


def line_styles(sparsities: Iterable[float]) -> dict[float, LineStyleType]:
    """The lowest, a middle and the highest of some sparsities, each with the style of its lines."""
    values = sorted(set(sparsities))
    if len(values) > 3:
        values = [values[0], values[round((len(values) - 1) / 2)], values[-1]]
    return dict(zip(values, ("-", "--", ":"), strict=False))


def panels_of(
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


def add_legend(
    figure: Figure,
    analysis: Analysis,
    spaces: Sequence[str],
    styles: Mapping[float, LineStyleType] | None = None,
    lines: bool = True,
) -> None:
    """Spaces by colour and marker, and sparsities by line style, above the figure."""
    from matplotlib.lines import Line2D

    handles = []
    for space in spaces:
        color, marker = look(analysis, space)
        name = {"SP": "spatial (SP)", "IP": "interspace (IP)"}.get(analysis.label(space), analysis.label(space))
        handles.append(Line2D([], [], color=color, marker=marker, linestyle="-" if lines else "", label=name))
    if styles is not None and len(styles) > 1:
        handles += [
            Line2D([], [], color=INK, linestyle=style, linewidth=1.2, label=f"{100 * sparsity:.4g} %")
            for sparsity, style in styles.items()
        ]
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


def plain_log_ticks(axis: Axis, values: pd.Series, form: str, scale: float = 1.0) -> None:
    """A few round numbers on a logarithmic axis."""
    low, high = values.min(), values.max()
    steps = (1, 2, 5) if high / low < 50 else (1,)
    ticks = [m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in steps]
    ticks = [tick for tick in ticks if 0.7 * low <= tick <= 1.4 * high]
    axis.set_ticks([scale * tick for tick in ticks], [form.format(tick) for tick in ticks])
    axis.minorticks_off()
