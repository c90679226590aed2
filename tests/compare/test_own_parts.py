"""Parts of a study that users bring: model, data, training function and criterion, from a file or from a package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from records import timeless

from ip_plugin.compare import Cell, Study, criteria, run
from ip_plugin.compare.cell import check_budgets, execute
from ip_plugin.errors import StudyError

pytestmark = pytest.mark.filterwarnings("ignore::ip_plugin.errors.LayerCollapseWarning")

MINE = '''
import hashlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ip_plugin import param_groups, prunable
from ip_plugin.adapters import Criterion, torch_prune
from ip_plugin.methods import apply_masks, select, snip

SEEN = []


class Stripes(Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError
        generator = torch.Generator().manual_seed(index)
        image = 0.3 * torch.randn(2, 6, 6, generator=generator)
        image[index % 2] += 1
        return image, index % 2


def data():
    return Stripes(40), Stripes(10)


def model(num_classes, width=8):
    return nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes),
    )


def train(model, data, context):
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=0.0, basis_lr=context.lr), lr=context.lr)
    context.before_training(optimizer)
    digest = hashlib.sha256()
    for _ in range(context.epochs):
        for images, labels in DataLoader(data.train, context.batch_size, shuffle=True):
            digest.update(images.numpy().tobytes() + labels.numpy().tobytes())

            def loss():
                return F.cross_entropy(model(images), labels)

            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
            context.after_step(value, loss)
    SEEN.append((context.phase, context.epochs, context.steps, context.lr, digest.hexdigest()))


def lazy(model, data, context):
    """Makes no step."""


def smallest(model, count):
    """Smallest entries of all layers."""
    torch_prune.global_unstructured(prunable(model), torch_prune.L1Unstructured, amount=count)


def nothing(model, count):
    """Prunes nothing."""


def too_much(model, count):
    smallest(model, count + 3)


def zeros(model, count):
    """Sets weights to zero, and masks none."""
    with torch.no_grad():
        for module, name in prunable(model):
            getattr(module, name).zero_()


def crashes(model, count):
    raise KeyError("layer 7")  # the line that is named


def nearly(model, count, training):
    torch.rand(1 + sum("parametrizations" in name for name, _ in model.named_modules()))  # more in the interspace
    apply_masks(model, select(snip(model, training.batches(2), training.loss), count=count))


SALIENCY = Criterion("connection saliency", "at initialisation", nearly)
NUMBER = 3
'''
LINE = MINE[: MINE.index("# the line")].count("\n") + 1


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of a user, which nothing has imported."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    path = tmp_path / "my_parts.py"
    path.write_text(MINE)
    return str(path)


def study(mine: str, **changes: Any) -> Study:
    values: dict[str, Any] = {
        "data": {"source": f"{mine}:data", "validation": 0.25},
        "model": {"name": f"{mine}:model", "options": {"width": 10}},
        "training": {"function": f"{mine}:train", "epochs": 2, "finetune_epochs": 1, "batch_size": 8, "lr": 0.2},
        "criteria": (f"{mine}:smallest", f"{mine}:SALIENCY", "ip:rigl"),
        "sparsities": (0.8,),
        "spaces": ("spatial", "interspace(sharing=model)"),
        "seeds": (3,),
    }
    return Study(**values).changed(changes)


def test_model_data_training_and_criteria_from_a_file_in_one_study(mine: str, tmp_path: Path) -> None:
    given = study(mine)
    results = run(given, tmp_path / "results", jobs=1)
    assert not results.failures and len(results.frame()) == 8
    frame = results.frame()
    parameters = 9 * (2 * 10 + 10 * 10) + 10 * 2
    assert set(frame.parameters) == {parameters}
    assert set(frame.parameters_left[frame.criterion != "dense"]) == {round(0.2 * parameters)}
    assert frame.validation_accuracy.notna().all()
    seen = sys.modules["my_parts"].SEEN
    # Dense, smallest (trained and fine-tuned), saliency, RigL; the spaces of a pair in turn, with equal batches.
    phases = ["train", "train", "train", "finetune", "train", "finetune", "train", "train", "train", "train"]
    assert [phase for phase, *_ in seen] == phases
    assert len({batches for phase, *_, batches in seen if phase == "train"}) == 1
    assert len({batches for phase, *_, batches in seen if phase == "finetune"}) == 1
    assert seen[0][1:4] == (2, 8, 0.2) and seen[3][1:4] == (1, 4, 0.05)
    curve = results.curves()
    sizes = curve.groupby(["criterion", "space"], sort=False).size()
    assert sizes.tolist() == [2, 2, 3, 3, 2, 2, 2, 2]
    assert curve.loss.between(0, 2).all() and curve.accuracy.notna().all()
    dense = curve[curve.criterion == "dense"].groupby("space").loss
    assert (dense.last() < dense.first()).all()


def test_processes_find_the_parts_too(mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a module of the working folder, as `python -m` finds it
    given = study("my_parts", criteria=("my_parts:smallest",))
    results = run(given, tmp_path / "results", jobs=2)
    assert not results.failures and len(results.frame()) == 4
    alone = execute(given.cells()[-1], given)
    assert timeless(alone) == timeless(results.records[alone.cell])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "(?s)must prune exactly 880 of 1100 entries.*0 pruned entries"),
        ("too_much", "883 pruned entries"),
        ("zeros", "by masks"),
        ("crashes", rf"(?s)crashes.*KeyError: 'layer 7' \(.*my_parts.py, line {LINE}\)"),
    ],
)
def test_a_criterion_that_prunes_otherwise_or_crashes_is_named(mine: str, name: str, message: str) -> None:
    given = study(mine, criteria=(f"{mine}:{name}",))
    with pytest.raises(StudyError, match=message) as caught:
        execute(Cell(given.criteria[0], 0.8, "spatial", 0), given.changed({"training.function": None}))
    assert f"my_parts.py:{name}" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"criteria": ("{}:NUMBER",)}, "(?s)must be a Criterion.*NUMBER' is a int"),
        ({"criteria": ("{}:train_",)}, "(?s)no 'train_'"),
        ({"criteria": ("{}x.py:nothing",)}, "no file"),
        ({"criteria": ("{}:data",)}, r"(?s)a function of \(model, count\[, training\]\).*my_parts.py, line"),
        ({"training.function": "{}:trains"}, "(?s)no 'trains'"),
        ({"training.function": "{}:lazy"}, "(?s)after each of 8 steps.*0 calls"),
        ({"data.source": "{}:model"}, "(?s)must run without an error.*num_classes"),
        ({"data.source": "{}:Stripes"}, "(?s)must run without an error.*count"),
        ({"model.options": {"depth": 3}}, "(?s)must run without an error.*depth"),
    ],
)
def test_parts_of_a_wrong_kind_are_named(mine: str, change: dict[str, Any], message: str) -> None:
    filled = {
        name: value.format(mine) if isinstance(value, str) else tuple(v.format(mine) for v in value)
        if isinstance(value, tuple) else value
        for name, value in change.items()
    }  # fmt: skip
    with pytest.raises(StudyError, match=message):
        given = study(mine, **filled)
        check_budgets(given)
        execute(Cell("dense", 0.0, "spatial", 0), given)


def test_a_file_with_the_name_of_another_module_is_refused(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("def prune(model, count): ...")
    with pytest.raises(StudyError, match="rename the file"):
        criteria.load(f"{tmp_path / 'json.py'}:prune")


PACKAGE = {
    "pyproject.toml": """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "their-criteria"
version = "1.0"

[project.entry-points."ip_plugin.adapters"]
theirs = "their_criteria"
broken = "their_broken"

[tool.setuptools]
py-modules = ["their_criteria", "their_broken"]
""",
    "their_criteria.py": MINE + '\nCRITERIA = {"smallest": Criterion.simple("theirs", "after training", smallest), '
    '"saliency": SALIENCY, "wrong": "l1"}\n',
    "their_broken.py": "import math\n\n\nmath.nothing\n",
}


def test_an_installed_package_brings_parts_by_its_entry_point_and_another_one_may_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name, content in PACKAGE.items():
        (source / name).write_text(content)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*pip, "--disable-pip-version-check", "--target", target, source], check=True)
    monkeypatch.syspath_prepend(str(target))
    known, broken = criteria.survey()
    theirs = {name: criterion.title for name, criterion in known.items() if name.startswith("theirs:")}
    assert theirs == {"theirs:smallest": "theirs", "theirs:saliency": "connection saliency"}
    assert "AttributeError" in broken["broken"] and "their_broken.py, line 4" in broken["broken"]
    assert "a str in their_criteria, not a Criterion" in broken["theirs:wrong"]
    with pytest.raises(StudyError, match="(?s)their_broken.py, line 4.*correct the adapter"):
        criteria.load("broken:any")
    results = run(
        Study(
            data={"source": "their_criteria:data"}, model={"name": "their_criteria:model"}, seeds="0", sparsities="80",
            training={"function": "their_criteria:train", "epochs": 1, "finetune_epochs": 1, "batch_size": 8},
            criteria="theirs:smallest,theirs:saliency+shuffled",
        ),
        tmp_path / "results",
        jobs=1,
    )  # fmt: skip
    parameters = 9 * (2 * 8 + 8 * 8) + 8 * 2
    assert not results.failures
    assert results.frame().parameters_left.tolist() == [parameters] * 2 + [round(0.2 * parameters)] * 4


def test_the_search_path_and_the_random_state_are_left_as_they_were(mine: str) -> None:
    state = torch.get_rng_state()
    given = study(mine)
    execute(Cell("dense", 0.0, "spatial", 0), given)
    assert torch.equal(torch.get_rng_state(), state)
