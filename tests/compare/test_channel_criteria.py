"""Criteria that remove channels, with filter variety and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from records import result_of
from torch import Tensor, nn

from ip_plugin import interspace
from ip_plugin.adapters import VARIED, Begin
from ip_plugin.compare import criteria
from ip_plugin.compare.cell import epochs_of
from ip_plugin.compare.config import Cell, Study
from ip_plugin.compare.models import NETWORKS
from ip_plugin.core.tensor_ref import prunable_tensors
from ip_plugin.methods import movement
from ip_plugin.methods.filter_variety import removal_order

pytest.importorskip("torch_pruning")

SETTINGS = Study(training={"epochs": 1, "finetune_epochs": 1}, data={"train_images": 200})


def network(space: str) -> Any:
    torch.manual_seed(0)
    model = NETWORKS["convnet"](1, 10)
    return interspace(model, basis="orthonormal", sharing="model", seed=0) if space == "interspace" else model


class Acted:
    """A training that gives the network other weights, and remembers what it began with."""

    seed, steps, finetuning_steps = 0, 10, 10

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.began: list[dict[str, Tensor]] = []
        self.ended: list[dict[str, Tensor]] = []

    def batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        source = torch.Generator().manual_seed(0)
        return [(torch.randn(10, 1, 8, 8, generator=source), torch.arange(10)) for _ in range(count)]

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, labels)

    def train(self, begin: Begin | None = None) -> None:
        assert begin is None
        self.began.append(state(self.model))
        source = torch.Generator().manual_seed(len(self.began))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=source) * 0.1)
            for buffer in self.model.buffers():
                if buffer.dtype is not torch.bool:  # a mask
                    buffer.add_(0.01 if buffer.is_floating_point() else 1)
        self.ended.append(state(self.model))

    finetune = train


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_every_channel_criterion_is_there_with_variety_and_without() -> None:
    known = criteria.available()
    names = {name for name, criterion in known.items() if criterion.removes_channels}
    varied = {name for name in names if name.endswith(VARIED)}
    assert len(varied) >= 15 and names == varied | {name.removesuffix(VARIED) for name in varied}
    for name in varied:
        title, plain = known[name].title, known[name.removesuffix(VARIED)].title
        assert title != plain and title.replace(" with variety", "") == plain
    assert {"torch:l1", "ip:snip"} < known.keys() - names


@pytest.mark.parametrize("name", ["tp:l1", "tp:random_trained", "tp:movement", "tp:ticket", "nni:l1_norm"])
def test_with_variety_as_many_channels_go_but_others(name: str) -> None:
    if name.startswith("nni"):
        pytest.importorskip("nni")
    for space in ("spatial", "interspace"):
        plain, varied = (result_of(Cell(name + suffix, 0.5, space, 0), SETTINGS) for suffix in ("", VARIED))
        assert varied.macs_left == plain.macs_left and varied.parameters_left == plain.parameters_left
        assert plain.macs_left == 64 * (144 + 4608) + 16 * 9216 + 320
        assert plain.accuracy_before_pruning == varied.accuracy_before_pruning


@pytest.mark.parametrize("name", ["tp:l1", "tp:random_trained", "nni:l1_norm"])
@pytest.mark.parametrize("space", ("spatial", "interspace"))
def test_with_variety_other_channels_are_kept(name: str, space: str) -> None:
    if name.startswith("nni"):
        pytest.importorskip("nni")
    kept = []
    for suffix in ("", "", VARIED):
        model = network(space)
        torch.manual_seed(1)
        criteria.load(name + suffix).prune(model, 0.5, Acted(model))
        kept.append(model[0].weight.detach())
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[1], kept[2])


def test_epochs_of_those_that_take_part_in_the_training() -> None:
    settings = SETTINGS.changed({"training.epochs": 2})
    for name, expected in (("tp:movement", 3), ("tp:ticket+variety", 4)):
        cell, done = Cell(name, 0.5, "spatial", 0), []
        result_of(cell, settings, lambda _, done=done: done.append(1))  # type: ignore[misc]
        assert len(done) == epochs_of(cell, settings) == expected


def run_acted(name: str, space: str, ratio: float = 0.5) -> tuple[Any, Acted]:
    model = network(space)
    training = Acted(model)
    criteria.load(name).prune(model, ratio, training)
    return model, training


@pytest.mark.parametrize("varied", [False, True])
@pytest.mark.parametrize("space", ("spatial", "interspace"))
def test_movement_removes_the_filters_of_least_movement(space: str, varied: bool) -> None:
    _, training = run_acted("tp:movement" + VARIED * varied, space)
    reference = network(space)
    reference.load_state_dict(training.ended[0])
    reference.eval()
    scores = movement(reference, training.batches(10), training.loss)
    first = prunable_tensors(reference)[0]
    worth, values = scores[first.target].flatten(1).sum(1), first.parameter.detach()
    assert len(worth.unique()) == 32
    order = removal_order(worth, values, strength=float(varied))
    kept = order[16:].sort().values
    start = training.began[1]
    name = "0.weight" if space == "spatial" else "0.parametrizations.weight.original"
    torch.testing.assert_close(start[name], values[kept], rtol=0, atol=0)


@pytest.mark.parametrize("varied", [False, True])
@pytest.mark.parametrize("space", ("spatial", "interspace"))
def test_a_ticket_begins_with_what_its_channels_began_with(space: str, varied: bool) -> None:
    model, training = run_acted("tp:ticket" + VARIED * varied, space)
    reference = network(space)
    initial = state(reference)
    reference.load_state_dict(training.ended[0])
    name = "0.weight" if space == "spatial" else "0.parametrizations.weight.original"
    trained = state(reference)[name]
    criteria.load("tp:l1" + VARIED * varied).prune(reference, 0.5, training)
    kept = [int((trained == row).flatten(1).all(1).nonzero()) for row in state(reference)[name]]
    again = training.began[1]
    assert torch.equal(again[name], initial[name][kept])
    assert torch.equal(again["1.running_mean"], initial["1.running_mean"][kept])  # norms, too
    assert all(torch.equal(again[name], initial[name]) for name in initial if name.endswith("basis"))
    assert model[0].out_channels == 16 and len(training.began) == 2
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_gradients_of_the_training_are_no_part_of_a_score() -> None:
    """Once the gradient of the last step of a training was added to that of the batch that is scored."""
    kept = []
    for stale in (False, True):
        model = network("spatial")
        if stale:
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
        criteria.load("tp:taylor").prune(model, 0.5, Acted(model))
        kept.append(model[0].weight.detach())
    assert torch.equal(*kept)


@pytest.mark.parametrize(
    "name", ["tp:l1+variety", "tp:movement", "tp:ticket", "nni:l1_norm", "nni:l1_norm+variety", "nni:taylor+variety"]
)
def test_the_residual_network_gets_the_same_shape_in_both_spaces(name: str) -> None:
    if name.startswith("nni"):
        pytest.importorskip("nni")
    shapes = []
    for space in ("spatial", "interspace"):
        torch.manual_seed(0)
        model = NETWORKS["resnet"](3, 10)
        if space == "interspace":
            interspace(model, basis="orthonormal", sharing="model", seed=0)
        training, images, labels = Acted(model), torch.randn(4, 3, 32, 32), torch.arange(4)
        training.batches = lambda count: [(images, labels)] * count  # type: ignore[method-assign]
        criteria.load(name).prune(model, 0.5, training)
        shapes.append([tuple(layer.parameter.shape) for layer in prunable_tensors(model)])
        assert model(images).isfinite().all()
    assert shapes[0] == shapes[1]
    assert [shape[0] for shape in shapes[0]] == [16, 16, 16, 32, 32, 32, 64, 64, 64, 10]
