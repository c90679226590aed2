"""Show an analysis: the answer and tables on the console, a self-contained HTML page with figures and their data."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from ip_plugin.errors import StudyError
from ip_plugin.utils.atomic import write_whole

from . import criteria
from .analysis import Analysis
from .answer import answer, caution, headline, remarks
from .plots.accuracies import accuracy_plot, bytes_plot, macs_plot
from .plots.differences import control_plot, difference_plot
from .plots.figure import COLORS, FAINT, HOLLOW, INK, NARROW, WIDE, Plot
from .plots.networks import basis_plot, curve_plot, density_plot, singular_plot
from .tables import Table, tables

if TYPE_CHECKING:
    from markupsafe import Markup
    from rich.console import Console


def plots(analysis: Analysis) -> list[Plot]:
    """The figures that a study has something for; the first one is the answer."""
    makers = (
        difference_plot, accuracy_plot, bytes_plot, macs_plot, control_plot, density_plot, basis_plot, singular_plot,
        curve_plot,
    )  # fmt: skip
    return [plot for make in makers if (plot := make(analysis)) is not None]


def write(analysis: Analysis, folder: Path, command: str = "") -> None:
    """Write ``report.html``, which names the command that started the study, and ``accuracy.png`` and ``.svg``."""
    figures = plots(analysis)
    for plot in figures:
        if plot.name == "accuracy":
            for kind, image in zip(("png", "svg"), plot.images("png", "svg"), strict=True):
                write_whole(folder / f"accuracy.{kind}", image)
    write_whole(folder / "report.html", page(analysis, figures, command))


def show(analysis: Analysis, console: Console) -> None:
    """Print the tables, and the answer in at most five lines below them."""
    from rich import box
    from rich.table import Table as Grid

    timed = analysis.costs["latency_ms", "mean"].notna().any()
    wanted = {"accuracy": True, "overall": len(analysis.overall) > 1, "controls": True, "costs": timed}
    for table in (table for table in reversed(tables(analysis)) if wanted[table.name]):
        widths, gap = _widths(table, console.width)
        grid = Grid(
            box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, gap - 1, 0, 0), title=table.title, title_justify="left",
            title_style="bold",
        )  # fmt: skip
        for i, width in widths.items():
            side: Literal["left", "right"] = "left" if i < table.texts else "right"
            grid.add_column(table.headers[i], justify=side, overflow="fold", width=width)
        for row, after in zip(table.rows, [*table.rows[1:], None], strict=True):
            grid.add_row(*(row[i].text for i in widths), end_section=after is not None and after[0] != row[0])
        console.print(grid)
    for line in answer(analysis):
        console.print(f"- {line}", markup=False, highlight=False)


def _widths(table: Table, width: int) -> tuple[dict[int, int], int]:
    """The columns that fit a console, their widths and the gap: extra columns go first, then names are folded."""
    sizes = {
        i: max(*(len(row[i].text) for row in table.rows), *map(len, header.split()))
        for i, header in enumerate(table.headers)
    }

    def excess(gap: int) -> int:
        return sum(sizes.values()) + gap * len(sizes) - width

    for header in table.extra:
        if excess(2) > 0:
            del sizes[table.headers.index(header)]
    gap = 2 if excess(2) <= 0 else 1
    for i in sorted(range(table.texts), key=sizes.__getitem__, reverse=True):
        sizes[i] = max(min(sizes[i], 8), sizes[i] - max(0, excess(gap)))
    return sizes, gap


def inline(plot: Plot, width: float) -> Markup:
    """A figure as an element of the page: ids of its own, colours of the page, a name for screen readers."""
    from markupsafe import Markup

    (svg,) = plot.images("svg", width=width)
    text = svg.decode()
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*\n\s*", " ", text[text.index("<svg") :]).replace("> <", "><")
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)
    # Only ids that something refers to; text in the page's font, and not turned by nothing.
    text = re.sub(r"""\sid="[^"]*_\d+"|\sfont-family: '[^']*';|\stransform="rotate\(-?0 [^"]*\)\"""", "", text)
    prefix = f"{plot.name}-{width:g}-"
    text = re.sub(r"""(\bid="|xlink:href="#|url\(#)""", rf"\g<1>{prefix}", text).replace("xlink:href", "href")
    text = text.replace("fill: #ffffff", "fill: none", 1)  # the background
    for variable, color in PALETTE.items():
        text = text.replace(color, f"var(--{variable})")
    box = re.findall(r'viewBox="([^"]*)"', text)[0]
    size = f'style="max-width: {1.6 * float(box.split()[2]):.0f}px"'
    head = f'<svg viewBox="{box}" {size} role="img" aria-label="{Markup.escape(plot.alt)}"'
    return Markup(re.sub(r"<svg[^>]*", lambda _: head, text, count=1))


#: Colours of figures by their names on the page, which has others for dark screens.
PALETTE = {"ink": INK, "faint": FAINT, "page": HOLLOW} | {f"space-{n}": color for n, color in enumerate(COLORS)}


def data_uri(text: str, kind: str) -> str:
    """A file inside of a page."""
    return f"data:{kind};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"


def downloads(plot_or_table: Plot | Table) -> list[tuple[str, str, str]]:
    """Name of the file, what it is, and its content as a data URI."""
    if isinstance(plot_or_table, Plot):
        texts = [("csv", "data (CSV)", _csv(plot_or_table.data))]
    else:
        texts = [("csv", "CSV", _csv(plot_or_table.frame())), ("md", "Markdown", plot_or_table.markdown()),
                 ("tex", "LaTeX", plot_or_table.latex())]  # fmt: skip
    return [
        (f"{plot_or_table.name}.{end}", kind, data_uri(text, "text/csv" if end == "csv" else "text/plain"))
        for end, kind, text in texts
    ]


def _csv(frame: pd.DataFrame) -> str:
    text: str = frame.to_csv(index=False, float_format="%.10g")
    return text


_TITLE = "spatial and interspace pruning compared"


def page(analysis: Analysis, figures: Sequence[Plot], command: str = "") -> str:
    """The HTML page, with no reference to anything outside of it."""
    from jinja2 import Environment

    template = files("ip_plugin.compare").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    lines = answer(analysis)
    made = {table.name: table for table in tables(analysis)}
    frames = {
        "results": analysis.results, "differences": analysis.differences.reset_index(),
        "overall": analysis.overall.reset_index(), "curves": analysis.curves, "density": analysis.density,
    }  # fmt: skip
    texts = {name: _csv(frame) for name, frame in frames.items() if len(frame)}
    return environment.from_string(template).render(
        title=f"{name}: {_TITLE}" if (name := getattr(analysis.study, "name", "")) else _TITLE.capitalize(),
        headline=headline(analysis),
        lines=[line for line in lines[1:] if line != caution(analysis)],
        caution=caution(analysis),
        remarks=remarks(analysis),
        figures={plot.name: plot for plot in figures},
        inline={plot.name: (inline(plot, WIDE), inline(plot, NARROW)) for plot in figures},
        tables=made,
        downloads_of=downloads,
        palette=PALETTE | {"page": "#ffffff"},
        criteria=[(name, *described(name)) for name in analysis.criteria],
        analysis=analysis,
        command=command,
        facts=list(facts(analysis)),
        study_downloads=[
            (f"{name}.csv", name, data_uri(text, "text/csv")) for name, text in texts.items() if len(text) < MOST_BYTES
        ],
    )


#: Larger tables of all runs are not part of the page; they are in the folder of the results.
MOST_BYTES = 300_000


def described(criterion: str) -> tuple[str, bool]:
    """The title of a criterion and whether it removes channels; empty where its library is not installed."""
    try:
        known = criteria.load(criterion)
    except StudyError:
        return "", False
    return known.title, known.removes_channels


def facts(analysis: Analysis) -> Iterator[tuple[str, str]]:
    """What was run, with which settings and versions, on what machine, in how much time."""
    seconds = analysis.results["seconds"].sum()
    yield "runs", f"{len(analysis.results)} of {len(analysis.results) + analysis.missing()}"
    yield "time of all runs together", f"{seconds / 60:,.1f} minutes"
    yield "seeds", ", ".join(map(str, analysis.seeds))
    yield "spaces", ", ".join(analysis.spaces)
    yield from analysis.made.items()
    dump = getattr(analysis.study, "model_dump", None)
    if dump is not None:
        axes = {"name", "criteria", "sparsities", "spaces", "seeds"}
        yield from _flat(dump(mode="json", exclude=axes))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings by their dotted names, as in the study's TOML file; what is empty is left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value not in (None, [], ()):
            yield f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
