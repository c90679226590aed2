"""README, documentation and examples: what they say runs, and is true."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import sklearn.datasets
import torch
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser

import ip_plugin

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CHECK = runpy.run_path(str(ROOT / "docs" / "prose.py"))
PAGES = [path for path in CHECK["documents"]() if "```python" in path.read_text()]


@pytest.fixture
def in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What a page writes goes into an empty folder, and the number of threads that numba sets goes."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("in_a_folder_of_its_own")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_runs_and_prints_something(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks of a page are one session, from its top to its end; those of the README are pasted alone."""
    document = Document.parse(str(page), PythonCodeBlockParser())
    silent = []
    for block in document.examples():
        if page.name == "README.md":
            document.namespace.clear()
        block.evaluate()
        if not capsys.readouterr().out and "from pathlib" not in block.parsed:
            silent.append(block.line)
    assert silent == [] or page.name == "checkpoint_format.md"


def test_no_line_begins_with_a_percent_sign() -> None:
    """It would be a comment, and missing from the page."""
    lines = [line for path in CHECK["documents"]() for line in path.read_text().splitlines()]
    assert [line for line in lines if line.lstrip().startswith("%")] == []


def test_every_block_names_its_language() -> None:
    """Else it would be neither highlighted nor run."""
    opened = [
        (path.name, fence)
        for path in CHECK["documents"]()
        for fence in re.findall(r"^```(.*)$", path.read_text(), flags=re.MULTILINE)[::2]
    ]
    known = {"bash", "diff", "json", "python", "toml", "{eval-rst}", "{toctree}"}
    assert [block for block in opened if block[1] not in known] == []


def test_tables_are_made_of_what_was_measured() -> None:
    filled = runpy.run_path(str(ROOT / "benchmarks" / "readme_tables.py"))["filled"]
    results = (ROOT / "docs" / "results.md").read_text()
    assert README.count("<!-- table: ") == 1 and results.count("<!-- table: ") + results.count("<!-- variety: ") == 6
    for text in (README, results):
        assert filled(text) == text
        spoilt = text.replace("| 98.2 ± 0.3 |", "| 99.2 ± 0.3 |", 1)
        assert spoilt != text and filled(spoilt) == text


def anchors(path: Path) -> set[str]:
    """Where links into a document can point: its headings, as GitHub and MyST name them, and labels before headings."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^\(([\w-]+)\)=$", text, flags=re.MULTILINE))


def broken_links(path: Path) -> list[str]:
    """Links of a document to files that are not there, or to headings that these do not have."""
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            file = (path.parent / name).resolve() if name else path
            if not file.is_file() or (anchor and anchor not in anchors(file)):
                wrong.append(link)
    return wrong


@pytest.mark.parametrize("path", CHECK["documents"](), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_are_there(path: Path) -> None:
    assert broken_links(path) == []


def test_broken_links_are_seen(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("# A (good) head\n[a](#a-good-head) [b](#bad) [c](none.md) [d](page.md#worse)\n")
    assert broken_links(tmp_path / "page.md") == ["#bad", "none.md", "page.md#worse"]


@pytest.mark.parametrize("path", CHECK["documents"](), ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_are_in_plain_english(path: Path) -> None:
    """Of the sources the same is checked by lint: ``python docs/prose.py``."""
    assert list(CHECK["findings"](path)) == []


def test_the_documents_are_short() -> None:
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in ("README.md", "CONTRIBUTING.md")}
    assert lengths["README.md"] <= 200 and lengths["CONTRIBUTING.md"] <= 120


def test_the_readme_names_every_public_verb() -> None:
    verbs = [name for name in ip_plugin.__all__ if name != "Report"]
    assert [name for name in verbs if name not in README] == []


@pytest.mark.parametrize(("page", "module"), [("core", "ip_plugin"), ("methods", "ip_plugin.methods")])
def test_the_reference_documents_every_public_name(page: str, module: str) -> None:
    """Of the pages that list names one by one; the others document all that a module has."""
    text = (ROOT / "docs" / "api" / f"{page}.md").read_text()
    documented = set(re.findall(r"auto(?:function|class):: (\w+)$", text, flags=re.MULTILINE))
    public = importlib.import_module(module)
    types = {"Batches", "Loss", "Masks", "Scope", "Score", "Scores", "errors"}  # aliases, and a page of its own
    assert documented == set(public.__all__) - types


def test_the_pictures_of_the_concepts_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["draw_concepts.py", "--output", str(tmp_path)])
    runpy.run_path(str(ROOT / "docs" / "draw_concepts.py"), run_name="__main__")
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs" / "pictures").iterdir()} and len(drawn) == 4
    assert all("prefers-color-scheme" in path.read_text() for path in tmp_path.iterdir())


def test_contributing_names_every_package() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    packages = [p.parent for folder in ("ip_plugin", "adapters") for p in (ROOT / folder).rglob("__init__.py")]
    missing = [p.name for p in packages if p.name != "ip_plugin" and f"`{p.name}/`" not in text]
    assert len(packages) > 15 and missing == []


PIPELINES = {
    "torch_prune_pipeline.py": (
        r"pruned: .* 53413 entries",
        ["from ip_plugin import bake, interspace", "from ip_plugin.adapters import torch_prune as prune"],
    ),
    "torch_pruning_pipeline.py": (
        r"step 2: .* 2\d% of the operations",
        [
            "from ip_plugin import bake, interspace",
            "from ip_plugin.adapters.torch_pruning import count_ops_and_params, pruner",
        ],
    ),
    "nni_pipeline.py": (
        r"pruned: .* 534(09|1[0-2]) entries",  # the host keeps what ties at its threshold
        [
            "from ip_plugin import bake, interspace",
            "from ip_plugin.adapters.nni import AGPPruner, LevelPruner, TorchEvaluator, finish",
        ],
    ),
}


Example = Callable[..., str]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Example:
    """Runs an example in this process, and returns what it has printed; it must end well."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(ROOT / "examples")  # as Python does where a script is run
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        try:
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        except SystemExit as ended:
            assert not ended.code
        return capfd.readouterr().out

    return run


@pytest.mark.parametrize("arguments", [[], ["--interspace"]])
@pytest.mark.parametrize("name", PIPELINES)
def test_the_example_pipelines_run_in_either_space(name: str, arguments: list[str], example: Example) -> None:
    steps = ["--pruning-steps", "5"] if name.startswith("nni") else []
    printed = example(name, "--epochs", "1", "--finetune-epochs", "1", *steps, *arguments)
    assert re.search(PIPELINES[name][0], printed)
    accuracies = re.findall(r": +([\d.]+) %", printed)
    assert accuracies[-2] == accuracies[-1]
    assert "baked:" in printed.splitlines()[-1]


@pytest.mark.parametrize("name", PIPELINES)
def test_the_example_is_switched_by_one_flag(name: str) -> None:
    lines = (ROOT / "examples" / name).read_text().split('"""', 2)[2].splitlines()
    ours = [line.strip() for line in lines if re.search(r"ip_plugin|interspace\(|args\.interspace|bake\(", line)]
    *imports, flag, convert, bake = ours
    assert imports == PIPELINES[name][1]
    assert (flag, convert) == ("if args.interspace:", "interspace(model)")
    assert bake.startswith("bake(model)  # an ordinary")


@pytest.mark.parametrize(("method", "arguments"), [("rigl", []), ("grasp", ["--interspace"])])
def test_the_example_of_sparse_training_keeps_equally_many_numbers(
    method: str, arguments: list[str], example: Example
) -> None:
    printed = example("sparse_training.py", "--method", method, "--epochs", "1", *arguments)
    assert re.fullmatch(rf"{method}: [\d.]+ %, 281[0-2] of 56224 numbers left\n", printed)


def few_digits() -> Callable[[], SimpleNamespace]:
    """What loads a sixth of scikit-learn's digits."""
    digits = sklearn.datasets.load_digits()
    few = SimpleNamespace(images=digits.images[:300], target=digits.target[:300])
    return lambda: few


def test_the_picture_of_the_readme_is_drawn(example: Example, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sklearn.datasets, "load_digits", few_digits())
    example("draw_filter.py", "--output", str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("arguments", "numba"), [([], False), (["--interspace"], True)], ids=str)
def test_the_example_of_deployment_measures_what_it_says(
    arguments: list[str], numba: bool, example: Example, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if numba:
        pytest.importorskip("numba")
    else:
        (tmp_path / "numba.py").write_text("raise ImportError('not installed')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # for the fresh process
    monkeypatch.setattr(sklearn.datasets, "load_digits", few_digits())
    printed = example("deploy.py", "--epochs", "1", "--finetune-epochs", "0", *arguments)
    dense, sparse, factor = re.search(r"bytes +([\d,]+) +([\d,]+) +([\d.]+) times smaller", printed).groups()  # type: ignore[union-attr]
    sizes = [int(size.replace(",", "")) for size in (dense, sparse)]
    # 592,032 weights, and biases and norms
    assert 4 * 592_000 < sizes[0] < 4 * 605_000
    assert sizes[1] < sizes[0] / 10 and float(factor) == round(sizes[0] / sizes[1], 1)
    assert "loaded: outputs differ by " in printed
    measured = re.search(r"latency +([\d.]+) ms +([\d.]+) ms +[\d.]+ times (faster|slower)", printed)
    assert (measured is not None) == numba
    if measured is not None:
        assert (float(measured[2]) < float(measured[1])) == (measured[3] == "faster") or measured[1] == measured[2]
        assert "run sparse: outputs differ by " in printed
        layers = re.findall(r"layer (\d+): [\d.]+% zeros, run (?:direct|columns|fused|winograd|dense)", printed)
        assert layers == ["0", "3", "7", "10", "15"]
    else:
        assert "The latency is not measured: sparse networks need numba (not installed); run: pip install" in printed
