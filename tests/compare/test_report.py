"""The page of a study: its numbers, its files, and how it behaves in a browser."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
from made_up import analysis as made_up
from made_up import results

from ip_plugin.compare.analysis import Analysis
from ip_plugin.compare.plots.figure import WIDE
from ip_plugin.compare.report import inline, page, plots, write
from ip_plugin.compare.tables import accuracy_table

SMALL: dict[str, Any] = {"criteria": ("torch:random", "torch:l1", "torch:l1+shuffled"), "sparsities": (0.9, 0.98)}


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    made = {"torch": "2.14", "machine": "<two cores>"}
    return Analysis(**results(**SMALL), made=made, failures={"torch:l1 at 0.9, seed 9": "Traceback\nValueError: <x>"})


@pytest.fixture(scope="module")
def report(analysis: Analysis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write(analysis, folder, "ip-plugin compare --criteria '<x>'")
    return folder / "report.html"


def data(text: str, file: str) -> pd.DataFrame:
    """A table that is part of the page."""
    uri = re.search(rf'<a href="data:text/csv;charset=utf-8;base64,([^"]*)" download="{file}"', text)
    assert uri, file
    return pd.read_csv(io.BytesIO(base64.b64decode(uri[1])))


# The file


def test_the_page_stands_alone_and_equal_results_give_equal_files(analysis: Analysis, report: Path) -> None:
    html = report.read_text()
    once, again = (page(Analysis(**results(**SMALL)), plots(analysis)[:2]) for _ in range(2))
    assert once == again
    references = re.findall(r"""(?:src|href|action)\s*=\s*["']([^"']*)|url\(([^)]*)\)|(@import)""", html)
    assert {one[:1] if one[:1] == "#" else one[:5] for reference in references for one in reference if one} == {
        "#",
        "data:",
    }
    ids = re.findall(r'\sid="([^"]*)"', html)
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'href="#([^"]*)"', html)) | set(re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)
    assert all(
        text in html for text in ("&lt;x&gt;", "&lt;two cores&gt;", "ValueError: &lt;x&gt;", "torch:l1+shuffled")
    )
    assert (report.parent / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(report.parent / "accuracy.svg").getroot().tag.endswith("svg")


def test_data_of_every_figure_and_table_are_those_of_the_analysis(analysis: Analysis, report: Path) -> None:
    html = report.read_text()
    names = [plot.name for plot in plots(analysis)]
    assert names == ["differences", "accuracy", "file_bytes", "macs_left", "controls", "density", "bases",
                     "singular_values", "curves"]  # fmt: skip
    for plot in plots(analysis):
        assert len(data(html, f"{plot.name}.csv")) == len(plot.data) > 0, plot.name
    runs = data(html, "results.csv")
    means = runs.groupby(["criterion", "sparsity", "space"])["accuracy"].mean()
    for row in accuracy_table(analysis).rows:
        key = (row[0].text, row[1].value)
        assert row[2].text.startswith(f"{means[(*key, 'spatial')]:.1f} ±")
        assert row[4].value == pytest.approx(means[(*key, "interspace")] - means[(*key, "spatial")])
    forest = data(html, "differences.csv")
    assert forest["mean"].tolist() == pytest.approx(
        analysis.differences.loc["space"].query("family == 'cells'")["mean"].tolist()
    )
    # Singular values of the bases are those of numpy, and bases are square.
    assert len(data(html, "bases.csv")) % 81 == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seeds": 1}, "One seed cannot answer"),
        ({"spaces": ("interspace",), "seeds": 2}, "nothing to compare"),
        (
            {"criteria": tuple(f"a:{i}" for i in range(11)), "sparsities": (0.8, 0.9, 0.95, 0.98), "seeds": 2},
            "colour is full from",
        ),
        (
            {"spaces": ("spatial", "interspace", "interspace(basis=dct)", "interspace(frozen=true)"), "seeds": 2},
            "Of 3 interspace",
        ),
    ],
    ids=["one seed", "one space", "many cells", "several settings"],
)
def test_other_studies_have_a_page_too(options: dict[str, Any], words: str) -> None:
    made = made_up(**(SMALL | options))
    shown = plots(made)
    # Two figures stand for all, so that the test is fast.
    html = page(made, [plot for plot in shown if plot.name in ("differences", "bases")])
    assert words in html and "nan" not in re.sub(r"base64,[^\"]*", "", html)
    assert len(html) < 4e6 and [bool(plot.data.empty) for plot in shown] == [False] * len(shown)


def test_a_study_without_results_and_without_records_has_a_page() -> None:
    runs = results(**SMALL)
    nothing = Analysis(runs["study"], runs["results"][:0])
    assert "there is no overall answer" in page(nothing, plots(nothing))
    old = Analysis(None, runs["results"][["criterion", "sparsity", "space", "seed", "accuracy"]])
    assert [plot.name for plot in plots(old)] == ["differences", "accuracy", "controls"]


def test_the_page_stays_below_four_megabytes(report: Path) -> None:
    assert report.stat().st_size < 1e6
    made = made_up(criteria=tuple(f"a:{i}" for i in range(12)), sparsities=(0.8, 0.9, 0.95, 0.98), seeds=2)
    by_name = {plot.name: plot for plot in plots(made)}
    # Every criterion has a panel in one figure, and eight have one in six others; each is drawn twice.
    assert len(inline(by_name["accuracy"], WIDE)) < 12 * 11_000
    assert by_name["file_bytes"].images("svg", width=WIDE)[0].count(b"a:7<") == 1
    assert by_name["file_bytes"].images("svg", width=WIDE)[0].count(b"a:8<") == 0


def test_spaces_have_one_colour_in_every_figure(analysis: Analysis, report: Path) -> None:
    figures = re.findall(r'<figure id="figure-(\w+)">(.*?)</figure>', report.read_text(), flags=re.DOTALL)
    assert len(figures) == len(plots(analysis)) == 9
    for name, text in figures:
        spaces = {"differences": {"1"}, "singular_values": {"1"}, "bases": set()}.get(name, {"0", "1"})
        assert set(re.findall(r"var\(--space-(\d)\)", text)) == spaces, name
        assert not set(re.findall(r"#[0-9a-f]{6}\b", text)) or name == "bases", name
        assert text.count('role="img" aria-label="') == 2 and "<strong>" in text


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        names = ("chromium", "chromium-browser", "google-chrome")
        path = next(filter(None, map(shutil.which, names)), None)
        if path is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium here")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, report: Path, width: int = 1280, scheme: str = "light") -> tuple[Any, list[str]]:
    """The page in a window of some width, and what it asked for or complained about."""
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True)
    events: list[str] = []
    tab.on("request", lambda request: events.append(request.url[:60]) if request.url[:5] != "data:" else None)
    tab.on("console", lambda message: events.append(message.text))
    tab.on("pageerror", lambda error: events.append(str(error)))
    tab.goto(report.as_uri())
    return tab, events[1:]


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1600, "light")])
def test_nothing_overflows_nothing_is_asked_for_and_axe_finds_nothing(
    browser: Any, report: Path, width: int, scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    tab, events = opened(browser, report, width, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    shown = "narrow" if width < 700 else "wide"
    assert tab.locator(f"figure .{shown} svg").count() == tab.locator("figure svg >> visible=true").count() == 9
    edges = tab.evaluate("[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().right)")
    assert max(edges) <= width
    found = axe.run(tab)
    assert found.violations_count == 0, found.generate_report()
    for other in (820, 700, 320):
        tab.set_viewport_size({"width": other, "height": 900})
        assert tab.evaluate("document.documentElement.scrollWidth") <= other
    assert events == []
    tab.close()


def test_tables_are_sorted_by_mouse_and_keyboard(browser: Any, report: Path, analysis: Analysis) -> None:
    tab, _ = opened(browser, report)
    table = tab.locator("#table-accuracy")
    cells = lambda column: table.locator(f"tbody tr > :nth-child({column})").all_inner_texts()  # noqa: E731
    assert cells(5) == [row[4].text for row in accuracy_table(analysis).rows]
    header = table.locator("thead th").nth(4)
    header.locator("button").click()
    values = [row[4].value for row in accuracy_table(analysis).rows]
    texts = dict(zip(values, cells(5), strict=False))
    assert header.get_attribute("aria-sort") == "ascending" and len(texts) == len(values)
    numbers = [float(text.replace("−", "-")) for text in cells(5)]
    assert numbers == sorted(numbers)
    tab.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert [float(text.replace("−", "-")) for text in cells(5)] == sorted(numbers, reverse=True)
    assert table.locator("thead th[aria-sort]").count() == 1
    table.locator("thead th button").first.click()
    assert cells(1) == sorted(cells(1))
    # What cannot be compared is last, both ways.
    for _ in range(2):
        table.locator("thead th button").nth(7).click()
        assert cells(8)[-1] == "–"
    tab.close()


def test_figures_are_downloaded_in_the_colours_of_light_pages(browser: Any, report: Path) -> None:
    tab, events = opened(browser, report, scheme="dark")
    for kind in ("SVG", "PNG"):
        with tab.expect_download() as download:
            tab.locator("#figure-accuracy button", has_text=kind).click()
        content = Path(download.value.path()).read_bytes()
        assert download.value.suggested_filename == f"accuracy.{kind.lower()}"
        if kind == "SVG":
            ElementTree.fromstring(content)
            assert b"var(" not in content and b"#0072b2" in content
        else:
            assert content.startswith(b"\x89PNG") and len(content) > 20_000
    assert events == []
    tab.close()
