"""Controls of criteria, by hand-worked cases and in whole cells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from records import result_of
from torch import nn

from ip_plugin import interspace, masks, set_masks
from ip_plugin.compare import Cell, Study, controls, criteria
from ip_plugin.compare.cell import epochs_of, execute
from ip_plugin.core.tensor_ref import prunable_tensors
from ip_plugin.errors import StudyError

pytestmark = pytest.mark.filterwarnings("ignore::ip_plugin.errors.LayerCollapseWarning")

QUICK = Study(training={"epochs": 1, "finetune_epochs": 1}, data={"train_images": 200})


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 5))


def pruned(convert: bool) -> nn.Sequential:
    model = network()
    if convert:
        interspace(model, basis="orthonormal", sharing="model", seed=0)
    keep = {"0": torch.arange(36) < 5, "2": torch.arange(216) < 100}
    shapes = {"0": (4, 1, 3, 3), "2": (6, 4, 3, 3)}
    return set_masks(model, {name: mask.reshape(shapes[name]) for name, mask in keep.items()})


@pytest.mark.parametrize("convert", [False, True])
def test_a_shuffled_mask_keeps_as_many_entries_of_each_layer_at_random_places(convert: bool) -> None:
    model, again, other = pruned(convert), pruned(convert), pruned(convert)
    before, values = masks(model), [layer.parameter.detach().clone() for layer in prunable_tensors(model)]
    for one, seed in ((model, 0), (again, 0), (other, 1)):
        controls.shuffle_masks(one, seed)
    assert {name: int(mask.sum()) for name, mask in masks(model).items()} == {"0": 5, "2": 100}
    assert all(torch.equal(mask, masks(again)[name]) for name, mask in masks(model).items())
    for name, mask in masks(model).items():
        assert not torch.equal(mask, before[name]) and not torch.equal(mask, masks(other)[name])
    # Of 100 kept of 216 entries about 46 stay where they were: at random, neither all nor none.
    assert 30 < int((masks(model)["2"] & before["2"]).sum()) < 62
    assert all(torch.equal(layer.parameter, v) for layer, v in zip(prunable_tensors(model), values, strict=True))


@pytest.mark.parametrize("convert", [False, True])
def test_values_drawn_anew_are_those_of_the_fresh_network_under_the_same_mask(convert: bool) -> None:
    model, fresh = pruned(convert), network(1)
    before, bases = (
        masks(model),
        [layer.interspace.basis.clone() for layer in prunable_tensors(model) if layer.interspace],
    )
    with torch.no_grad():
        model[1].running_mean.fill_(3.0)  # type: ignore[union-attr,operator]
    controls.draw_values(model, fresh)
    assert all(torch.equal(mask, masks(model)[name]) for name, mask in before.items())
    left = [layer.interspace.basis for layer in prunable_tensors(model) if layer.interspace]
    assert len(left) == 2 * convert and all(torch.equal(*pair) for pair in zip(bases, left, strict=True))
    controls.set_masks(model, {name: torch.ones_like(mask) for name, mask in before.items()})
    x = torch.randn(2, 1, 5, 5)
    torch.testing.assert_close(model.eval()(x), fresh.eval()(x), rtol=1e-4, atol=1e-5)


CELLS = [("torch:l1", 2), ("torch:l1+shuffled", 2), ("torch:l1+reinit", 2), ("ip:random", 1), ("ip:random+reinit", 1)]
CELLS += [("ip:snip+shuffled", 1), ("ip:rigl+shuffled", 2), ("ip:gradual+reinit", 2), ("ip:magnitude+reinit", 2)]


@pytest.mark.parametrize(("name", "epochs"), CELLS)
def test_a_control_prunes_as_many_entries_and_trains_as_long_as_it_says(name: str, epochs: int) -> None:
    for space in QUICK.spaces:
        cell = Cell(name, 0.9, space, 0)
        record = execute(cell, QUICK)
        assert record.result is not None and record.result.parameters_left == 5622, name
        assert len(record.curve) == epochs_of(cell, QUICK) == epochs
        plain = execute(Cell(controls.split(name)[0], 0.9, space, 0), QUICK)
        # SET and RigL move the entries of each layer, and keep its density; the others keep the mask that was found.
        assert record.density == plain.density, name


def test_a_mask_that_arises_while_training_is_shuffled_on_the_network_as_it_was() -> None:
    model = network()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[dict[str, Any]] = []

    class Context:
        seed = 4

        def train(self, begin: Any = None) -> None:
            seen.append({layer.name: layer.parameter.detach().clone() for layer in prunable_tensors(model)})

    def prune(model: Any, amount: int, training: Any) -> None:
        set_masks(model, {"2": torch.arange(216).reshape(6, 4, 3, 3) >= amount})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
            model[1].running_mean.add_(2.0)

    criterion = criteria.Criterion("moves", "while training", prune)
    controls.CONTROLS["+shuffled"](criterion).prune(model, 50, Context())  # type: ignore[arg-type]
    assert int((~masks(model)["2"]).sum()) == 50 and len(seen) == 1
    assert all(torch.equal(value, start[name]) for name, value in seen[0].items())
    assert torch.equal(model[1].running_mean, start["1.running_mean"])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tp:l1+shuffled", "dense+reinit"])
def test_controls_of_what_has_no_masks_are_refused(name: str) -> None:
    pytest.importorskip("torch_pruning")
    with pytest.raises(StudyError, match="leave out \\+"):
        criteria.load(name)


def test_frozen_bases_stay_as_they_are_and_count_in_the_budget() -> None:
    study = QUICK.changed({"training.epochs": 2})
    spaces = {"interspace": [], "interspace(frozen=true)": []}  # type: ignore[var-annotated]
    for space, bases in spaces.items():
        for lr in (0.15, 0.05):
            record = execute(Cell("ip:random", 0.9, space, 0), study.changed({"training.lr": lr}))
            bases.append(record.bases["0"])
            assert record.result is not None
            assert (record.result.basis_parameters, record.result.parameters_left) == (81, 5622)
    trained, frozen = spaces.values()
    assert frozen[0] == frozen[1] and trained[0] != trained[1] and trained[0] != frozen[0]


def test_random_pruning_with_erk_has_the_densities_of_erk() -> None:
    record = execute(Cell("ip:random_erk", 0.9, "spatial", 0), QUICK)
    # ERK of the convnet at 90 %: the first and the last layer stay dense, the others have densities of a factor times
    # (32 + 64 + 3 + 3) / 18432 and (64 + 64 + 3 + 3) / 36864.
    assert record.density["0"] == record.density["12"] == 1.0
    factor = (5622 - 288 - 640) / (102 + 134)
    assert record.density["3"] == pytest.approx(factor * 102 / 18432, abs=1e-4)
    assert record.density["7"] == pytest.approx(factor * 134 / 36864, abs=1e-4)
    assert result_of(Cell("ip:random_erk", 0.9, "spatial", 1), QUICK).parameters_left == 5622
