"""README and examples: what they say runs, and is true."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import sklearn.datasets
import torch

import ip_plugin

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n")[0][:40])
def test_code_in_the_readme_runs(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"torch": torch, "nn": torch.nn})


def test_tables_of_the_readme_are_made_of_what_was_measured() -> None:
    filled = runpy.run_path(str(ROOT / "benchmarks" / "readme_tables.py"))["filled"]
    assert README.count("<!-- table: ") == 4
    assert filled(README) == README
    spoilt = README.replace("| 98.2 ± 0.3 |", "| 99.2 ± 0.3 |", 1)
    assert spoilt != README and filled(spoilt) == README


def test_links_and_pictures_of_the_readme_are_there() -> None:
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)]+)\)", README) if not t.startswith(("http", "#"))]
    assert targets and [t for t in targets if not (ROOT / t).exists()] == []


def test_the_readme_names_every_public_verb() -> None:
    verbs = [name for name in ip_plugin.__all__ if name != "Report"]
    assert [name for name in verbs if name not in README] == []


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


def test_the_picture_of_the_readme_is_drawn(example: Example, tmp_path: Path) -> None:
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
    digits = sklearn.datasets.load_digits()
    few = SimpleNamespace(images=digits.images[:300], target=digits.target[:300])
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: few)
    printed = example("deploy.py", "--epochs", "1", "--finetune-epochs", "0", *arguments)
    dense, sparse, factor = re.search(r"bytes +([\d,]+) +([\d,]+) +([\d.]+) times smaller", printed).groups()  # type: ignore[union-attr]
    sizes = [int(each.replace(",", "")) for each in (dense, sparse)]
    # 592,032 weights, and biases and norms
    assert 4 * 592_000 < sizes[0] < 4 * 605_000
    assert sizes[1] < sizes[0] / 10 and float(factor) == round(sizes[0] / sizes[1], 1)
    assert "loaded: outputs differ by " in printed
    measured = re.search(r"latency +([\d.]+) ms +([\d.]+) ms +[\d.]+ times (faster|slower)", printed)
    assert (measured is not None) == numba
    if measured is not None:
        assert (float(measured[2]) < float(measured[1])) == (measured[3] == "faster") or measured[1] == measured[2]
        assert "run sparse: outputs differ by " in printed
        layers = re.findall(r"layer (\d+): [\d.]+% zeros, run (?:direct|fused|winograd|dense)", printed)
        assert layers == ["0", "3", "7", "10", "15"]
    else:
        assert "The latency is not measured: sparse networks need numba (not installed); run: pip install" in printed
