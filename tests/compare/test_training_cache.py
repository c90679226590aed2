"""Trainings that several cells of a study have in common are done once, and nothing shows it but the time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from records import result_of
from torch import nn

from ip_plugin import interspace, set_masks
from ip_plugin.adapters import Begin
from ip_plugin.compare.callbacks import Callback
from ip_plugin.compare.cell import epochs_of
from ip_plugin.compare.config import Cell, Data, Study
from ip_plugin.compare.data import load
from ip_plugin.compare.engines.local import Local
from ip_plugin.compare.models import NETWORKS
from ip_plugin.compare.training import Training, TrainingCache

SETTINGS = Study(training={"epochs": 1, "finetune_epochs": 1}, data={"train_images": 200})


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epochs of every training and fine-tuning that was done, and not taken from the cache."""
    counts: list[int] = []
    fit = Training.fit

    def counted(self: Training, epochs: int, lr: float, begin: Begin | None = None) -> None:
        counts.append(epochs)
        fit(self, epochs, lr, begin)

    monkeypatch.setattr(Training, "fit", counted)
    return counts


CELLS = [
    Cell(criterion, sparsity, space, 3)  # type: ignore[arg-type]
    for criterion, sparsity in (
        ("torch:l1", 0.5), ("ip:movement", 0.9), ("tp:taylor+variety", 0.5), ("tp:ticket", 0.5)
    )
    for space in ("spatial", "interspace")
]  # fmt: skip


def test_what_is_shared_changes_no_result(done: list[int]) -> None:
    settings = SETTINGS.changed({"training.epochs": 2})
    cache = TrainingCache()
    for number, cell in enumerate(CELLS):
        epochs: list[int] = []
        alone = result_of(cell, settings)
        done.clear()
        shared = result_of(cell, settings, lambda _, epochs=epochs: epochs.append(1), cache)  # type: ignore[misc]
        assert shared == alone, cell
        assert len(epochs) == epochs_of(cell, settings)
        again = 2 if cell.criterion.startswith("tp:ticket") else 1  # the pruned network is trained, or fine-tuned
        assert done == ([] if number > 1 else [2]) + [again], cell


@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_it_ends_in_the_same_state(space: str) -> None:
    images = load(Data(train_images=200))
    cache, ends = TrainingCache(), []
    for _ in range(2):
        torch.manual_seed(0)
        model = NETWORKS["convnet"](1, 10)
        if space == "interspace":
            interspace(model, basis="orthonormal", sharing="model", seed=0)
        model.eval()
        training = Training(model, images, SETTINGS.training, 0, cache=cache)
        training.train()
        assert model.training and all(p.grad is None for p in model.parameters())
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        ends.append((state, training.order.get_state(), torch.get_rng_state()))
        with torch.no_grad():  # what happens to a model afterwards does not change the cache
            for parameter in model.parameters():
                parameter.zero_()
    (first, *rest), (second, *others) = ends
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(*pair) for pair in zip(rest, others, strict=True))


def changed_weight(model: Any) -> None:
    model[0].weight.data[0, 0, 0, 0] += 1e-7


def masked(model: Any) -> None:
    set_masks(model, {"0": torch.ones_like(model[0].weight, dtype=torch.bool)})


def changed_running_mean(model: Any) -> None:
    model[1].running_mean[0] += 1


def frozen(model: Any) -> None:
    model[0].weight.requires_grad_(False)


def other_module(model: Any) -> None:
    model[2] = nn.GELU()


def tied(model: Any) -> None:
    model[1].bias = model[1].weight


@pytest.mark.parametrize("change", [changed_weight, masked, changed_running_mean, frozen, other_module, tied])
def test_what_begins_otherwise_is_trained(change: Any, done: list[int]) -> None:
    images = load(Data(train_images=200))
    cache = TrainingCache()
    for change_it, expected in ((False, 1), (False, 1), (True, 2)):
        torch.manual_seed(0)
        model: Any = NETWORKS["convnet"](1, 10)
        if change is tied:  # equal values, of one tensor or of two
            model[1].bias = nn.Parameter(model[1].weight.detach().clone())
        if change_it:
            change(model)
        Training(model, images, SETTINGS.training, 0, cache=cache).train()
        assert len(done) == expected
    torch.manual_seed(1)
    Training(NETWORKS["convnet"](1, 10), images, SETTINGS.training, 0, cache=cache).train()
    assert len(done) == 3


def test_another_order_or_random_state_is_another_training(done: list[int]) -> None:
    images = load(Data(train_images=200))
    cache = TrainingCache()
    for seed, state in ((0, 5), (1, 5), (1, 6), (1, 6)):
        torch.manual_seed(0)
        model = NETWORKS["convnet"](1, 10)
        torch.manual_seed(state)
        Training(model, images, SETTINGS.training, seed, cache=cache).train()
    assert len(done) == 3


def test_other_settings_or_data_are_another_training(done: list[int]) -> None:
    cache, images = TrainingCache(), load(Data(train_images=200))
    other = load(Data(train_images=200, augment=("RandomHorizontalFlip",)))
    for data, lr, expected in ((images, 0.1, 1), (images, 0.1, 1), (images, 0.2, 2), (other, 0.2, 3), (other, 0.2, 3)):
        torch.manual_seed(0)
        settings = SETTINGS.training.model_copy(update={"lr": lr})
        Training(NETWORKS["convnet"](1, 10), data, settings, 0, cache=cache).train()
        assert len(done) == expected


def test_a_training_that_is_followed_is_done(done: list[int]) -> None:
    images = load(Data(train_images=200))
    cache, steps = TrainingCache(), []
    for _ in range(2):
        torch.manual_seed(0)
        training = Training(NETWORKS["convnet"](1, 10), images, SETTINGS.training, 0, cache=cache)
        training.train(lambda optimizer: steps.append)
    assert len(done) == 2 and len(steps) == 4
    training.train()
    assert len(done) == 3


def test_only_the_last_ones_are_kept(done: list[int]) -> None:
    images = load(Data(train_images=200))
    cache = TrainingCache(size=2)
    for seed in (0, 1, 0, 2, 0, 1):  # the last 1 was forgotten when 2 came, as 0 had been used since
        torch.manual_seed(seed)
        model = NETWORKS["convnet"](1, 10)
        Training(model, images, SETTINGS.training, seed, cache=cache).train()
    assert len(done) == 4


def test_the_engine_shares_within_a_study_and_forgets_after_it(done: list[int]) -> None:
    cells = [Cell("torch:l1", sparsity, "spatial", 0) for sparsity in (0.5, 0.9)]
    for _ in range(2):
        records = list(Local()(cells, SETTINGS, Callback()))
        assert len(records) == 2 and all(record.status == "done" for record in records)
    assert len(done) == 2 * 3


def test_gradients_of_a_training_do_not_reach_a_criterion() -> None:
    images = load(Data(train_images=200))
    torch.manual_seed(0)
    model = NETWORKS["convnet"](1, 10)
    training = Training(model, images, SETTINGS.training, 0)
    training.train()
    assert all(p.grad is None for p in model.parameters())
