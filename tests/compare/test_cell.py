"""One cell of a study: what is trained, pruned and measured."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from records import result_of
from torch import nn

from ip_plugin import interspace, masks, report
from ip_plugin.adapters import torch_prune
from ip_plugin.compare import Cell, Epoch, Study, criteria
from ip_plugin.compare.cell import epochs_of, execute
from ip_plugin.compare.models import NETWORKS
from ip_plugin.errors import StudyError

#: Criteria as they are: some leave layers almost empty.
pytestmark = pytest.mark.filterwarnings("ignore::ip_plugin.errors.LayerCollapseWarning")

QUICK = Study(training={"epochs": 2, "finetune_epochs": 1})


@pytest.mark.parametrize("sharing", ["layer", "model"])
@pytest.mark.parametrize(
    ("criterion", "sparsity"),
    [("torch:random", 0.0), ("torch:random", 0.95), ("torch:l1", 0.5), ("torch:l1_init", 0.95)],
)
def test_both_spaces_keep_equally_many_parameters(criterion: str, sparsity: float, sharing: Any) -> None:
    study = QUICK.changed({"training.epochs": 1, "data.train_images": 200})
    spaces = "spatial", f"interspace(sharing={sharing})"
    spatial, inter = (result_of(Cell(criterion, sparsity, space, 0), study) for space in spaces)
    total = sum(p.numel() for n, p in NETWORKS["convnet"](1, 10).named_parameters() if p.ndim > 1)
    assert spatial.parameters == inter.parameters == total == 56224
    assert spatial.parameters_left == inter.parameters_left == round((1 - sparsity) * total)
    assert spatial.basis_parameters == 0
    layers = {"layer": 2 if sparsity == 0.95 else 3, "model": 1}[sharing]
    assert inter.basis_parameters == 81 * layers
    # At 95 % the 288 coefficients of the first layer keep 14 values, and its basis has 81 numbers.
    assert inter.spatial_layers == (("0",) if layers == 2 else ())


def test_multiply_adds_of_the_interspace_have_those_of_the_basis() -> None:
    """Three 3x3 layers with 1, 32 and 64 inputs, on 64, 64 and 16 pixels, then a linear one."""
    pixels = {"0": 64, "3": 64, "7": 16, "12": 1}
    sizes = {"0": 9 * 32, "3": 9 * 32 * 64, "7": 9 * 64 * 64, "12": 640}
    dense = {name: pixels[name] * size for name, size in sizes.items()}
    study = QUICK.changed({"training.epochs": 1, "data.train_images": 200})
    for space, inputs in (("spatial", {}), ("interspace", {"0": 1, "3": 32, "7": 64})):
        assert result_of(Cell("dense", 0.0, space, 0), study).macs_left == sum(dense.values()) == 1788544
        record = execute(Cell("ip:magnitude_init", 0.9, space, 0), study)
        assert record.density.keys() == sizes.keys() and record.result is not None
        expected = 0
        for name, share in record.density.items():
            transform = 81 * inputs.get(name, 0) * pixels[name]
            expected += min(dense[name], round(share * sizes[name]) * pixels[name] + transform)
        assert record.result.macs_left == expected


def test_random_numbers_of_every_library_come_from_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "drawn.py").write_text(
        "import random\nimport numpy as np\nimport torch\nfrom torch import nn\n"
        "def model(num_classes):\n"
        "    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, num_classes))\n"
        "    net[0].weight.data.fill_(random.random()).mul_(torch.tensor(np.random.rand(8, 1, 3, 3)))\n"
        "    return net\n"
    )
    study = QUICK.changed({"model.name": f"{tmp_path / 'drawn.py'}:model", "data.train_images": 200})
    cell = Cell("torch:l1", 0.5, "spatial", 1)
    first = result_of(cell, study)
    random.seed(5)
    np.random.seed(5)
    assert result_of(cell, study) == first


def test_both_spaces_start_from_the_same_weights_and_batches() -> None:
    # With the standard basis, which does not move, an unpruned interspace network is the plain one, in every digit.
    study = QUICK.changed({"training.basis_lr": 0.0})
    spaces = "spatial", "interspace(basis=standard)"
    spatial, inter = (result_of(Cell("torch:l1", 0.0, space, 3), study) for space in spaces)
    assert inter.accuracy_before_pruning == spatial.accuracy_before_pruning
    assert inter.basis_parameters == 81


def test_equal_runs_give_equal_results_and_leave_the_random_state() -> None:
    cell = Cell("torch:random", 0.9, "interspace", 5)
    state = torch.get_rng_state()
    first = result_of(cell, QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert result_of(cell, QUICK) == first
    assert result_of(cell._replace(seed=6), QUICK).accuracy != first.accuracy


def test_training_learns_and_pruning_is_measured() -> None:
    result = result_of(Cell("torch:l1", 0.5, "spatial", 0), QUICK.changed({"training.epochs": 6}))
    assert result.accuracy > 90 and result.accuracy_before_pruning is not None and result.accuracy_before_pruning > 90
    chance = result_of(Cell("torch:random", 0.999, "spatial", 0), QUICK)
    assert chance.accuracy < 40 and chance.accuracy_before_pruning is None


def test_a_sparsity_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(StudyError, match="keep at least one parameter"):
        execute(Cell("torch:random", 0.999999, "interspace", 0), QUICK)


def test_progress_counts_every_epoch() -> None:
    for criterion, expected in (("torch:random", 2), ("torch:l1", 3)):
        cell, done = Cell(criterion, 0.9, "spatial", 0), []
        execute(cell, QUICK, lambda _, done=done: done.append(1))
        assert len(done) == epochs_of(cell, QUICK) == expected


def test_criteria_prune_in_either_space() -> None:
    batch = torch.randn(8, 1, 8, 8), torch.arange(8)
    context: Any = SimpleNamespace(batches=lambda count: [batch], loss=nn.functional.cross_entropy)
    for name, criterion in criteria.available().items():
        for convert in (False, True):
            if criterion.stage == "while training":  # see test_builtin_criteria.py, test_channel_criteria.py
                continue
            model = NETWORKS["convnet"](1, 10)
            model = interspace(model) if convert else model
            criterion.prune(model, 0.5 if criterion.removes_channels else 50000, context)
            if criterion.removes_channels:
                assert [module.out_channels for module in model if isinstance(module, nn.Conv2d)] == [16, 32, 32], name
                assert all(p.grad is None for p in model.parameters())
            else:
                assert report(model).prunable.nonzeros == 6224, name


@pytest.mark.parametrize("name", ["tp:magnitude", "tp:random"])
def test_both_spaces_keep_equally_many_channels(name: str) -> None:
    pytest.importorskip("torch_pruning")
    study = QUICK.changed({"training.epochs": 1})
    results = [result_of(Cell(name, 0.5, space, 0), study) for space in QUICK.spaces]
    # 16, 32 and 32 channels of 3x3 kernels on 8x8 and 4x4 positions, and a linear layer.
    assert [result.parameters_left for result in results] == [144 + 4608 + 9216 + 320] * 2
    assert [result.macs for result in results] == [64 * (288 + 18432) + 16 * 36864 + 640] * 2
    assert [result.macs_left for result in results] == [64 * (144 + 4608) + 16 * 9216 + 320] * 2
    assert [result.basis_parameters for result in results] == [0, 81]


def test_magnitude_pruning_of_the_study_is_the_adapters() -> None:
    model, reference = (NETWORKS["convnet"](1, 10) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    criteria.load("torch:l1").prune(model, 1000)
    pairs = [(m, "weight") for m in reference.modules() if hasattr(m, "weight") and m.weight.ndim > 1]
    torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=1000)
    assert all(torch.equal(mask, masks(reference)[name]) for name, mask in masks(model).items())


def test_a_record_has_the_curve_of_every_epoch() -> None:
    told: list[Epoch] = []
    record = execute(Cell("torch:l1", 0.9, "interspace", 0), QUICK, told.append)
    assert list(record.curve) == told and [epoch.epoch for epoch in told] == [1, 2, 3]
    assert [epoch.phase for epoch in told] == ["train", "train", "finetune"]
    assert all(0 < epoch.loss < 3 and epoch.accuracy is None for epoch in told)
    assert told[0].seconds < told[1].seconds and record.result is not None and record.result.lr == 0.15


def test_dense_networks_keep_everything_in_both_spaces() -> None:
    for space, basis in (("spatial", 0), ("interspace", 81)):
        result = result_of(Cell("dense", 0.0, space, 0), QUICK.changed({"training.epochs": 1}))
        assert result.parameters == result.parameters_left == 56224 and result.basis_parameters == basis
