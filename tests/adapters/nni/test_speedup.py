"""Structured masks of NNI become a smaller network that computes what the finished masked model computes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ip_plugin import bake, interspace, masks, report
from ip_plugin.errors import HostError, MaskError, SelectionError

pytest.importorskip("nni")
pytest.importorskip("torch_pruning")
torchvision = pytest.importorskip("torchvision")

from ip_plugin.adapters import nni  # noqa: E402

pytestmark = [pytest.mark.contract, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.getLogger("nni").setLevel(logging.ERROR)
    yield


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2))
        self.up = nn.ConvTranspose2d(12, 6, 3, stride=2)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.up(self.body(self.stem(x)))).mean((2, 3)))


def prepared(space: str) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 8, 8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias)
    model(x)
    return interspace(model, basis="dct", sharing="model") if space == "interspace" else model, x


CONFIG = [{"op_names": ["stem.0", "body.0"], "sparse_ratio": 0.5}]


@pytest.mark.parametrize("space", ["spatial", "interspace"])
@pytest.mark.parametrize("pruner", ["L1NormPruner", "L2NormPruner", "FPGMPruner"])
def test_channels_that_are_masked_are_cut(pruner: str, space: str) -> None:
    model, x = prepared(space)
    held = getattr(nni, pruner)(model, CONFIG)
    _, found = held.compress()
    nni.finish(held)
    expected = model.eval()(x)
    parameters = report(model).everything.parameters
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()
    assert nni.speedup(model, found, x, optimizer=optimizer) is model
    assert model.training
    shapes = [tuple(m.weight.shape) for m in (model.stem[0], model.stem[1], model.body[0], model.up)]
    assert shapes == [(4, 3, 3, 3), (4,), (6, 4, 3, 3), (6, 6, 3, 3)]
    assert report(model).everything.parameters < parameters
    torch.testing.assert_close(model.eval()(x), expected)
    assert masks(model) == {}
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    torch.testing.assert_close(bake(copy.deepcopy(model))(x), expected)
    assert type(bake(model).stem[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_masks_alone_are_enough(space: str) -> None:
    """As with the host: masks of a pruner for another copy of the model."""
    model, x = prepared(space)
    reference = copy.deepcopy(model)
    held = nni.L1NormPruner(model, CONFIG)
    _, found = held.compress()
    nni.finish(held)
    nni.speedup(reference, found, x)
    torch.testing.assert_close(reference.eval()(x), model.eval()(x))
    assert reference.body[0].out_channels == 6


def test_a_residual_network_of_torchvision() -> None:
    torch.manual_seed(0)
    model = interspace(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10))
    x = torch.randn(2, 3, 32, 32)
    inner = [name for name, module in model.named_modules() if name.endswith("conv1") and "layer" in name]
    held = nni.L1NormPruner(model, [{"op_names": inner, "sparse_ratio": 0.5}])
    _, found = held.compress()
    nni.finish(held)
    expected = model.eval()(x)
    before = report(model, x).prunable.macs_dense
    nni.speedup(model, found, x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    after = report(model, x).prunable.macs_dense
    assert before is not None
    assert after is not None
    assert after < 0.75 * before
    assert model.layer4[0].conv1.out_channels == 256


def test_a_channel_without_weights_but_with_a_bias_stays() -> None:
    model, x = prepared("interspace")
    held = nni.LevelPruner(model, [{"op_names": ["stem.0"], "target_names": ["weight"], "sparse_ratio": 0.9}])
    _, found = held.compress()
    nni.finish(held)
    expected = model.eval()(x)
    nni.speedup(model, found, x)
    assert model.stem[0].out_channels == 8
    torch.testing.assert_close(model(x), expected)


def test_what_cannot_be_is_refused_and_nothing_changes() -> None:
    model, x = prepared("interspace")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mask = torch.ones(8, 3, 3, 3)
    given: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"steam.0": {"weight": mask}}, SelectionError, "'steam.0'.*\n.*'stem.0'"),
        ({"stem.0": {"weight": mask[:4]}}, MaskError, "stem.0.weight"),
        ({"stem.0": {"wait": mask}}, MaskError, "stem.0.wait"),
    ]
    for found, error, message in given:
        with pytest.raises(error, match=message):
            nni.speedup(model, found, x)
    held = nni.L1NormPruner(model, CONFIG)
    with pytest.raises(HostError, match="finish"):
        nni.speedup(model, {}, x)
    _, found = held.compress()
    held.unwrap_model()
    model.stem[2] = nn.Sigmoid()  # takes nothing to a half
    with pytest.raises(HostError, match="would change"):
        nni.speedup(model, found, x)
    assert set(model.state_dict()) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
