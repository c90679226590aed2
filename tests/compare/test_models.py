"""Networks of studies, built in and others."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from ip_plugin import report
from ip_plugin.compare import Model
from ip_plugin.compare.models import NETWORKS, network
from ip_plugin.errors import StudyError

SMALL, LARGE, GRAY = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 96, 96), torch.zeros(1, 1, 32, 32)


def test_the_built_in_networks() -> None:
    vgg = report(network(Model(), 10, SMALL), SMALL)
    assert vgg.prunable.parameters == 282800 and vgg.prunable.macs_dense == 8_701_184
    resnet = report(network(Model(name="resnet"), 10, SMALL), SMALL)
    # 3x3: 3 to 32; 32 to 32, twice; 32 to 64 to 64; 64 to 128 to 128; two 1x1 shortcuts; a linear layer.
    assert resnet.prunable.parameters == 9 * (96 + 2 * 1024 + 2048 + 4096 + 8192 + 16384) + 2048 + 8192 + 1280
    assert resnet.prunable.macs_dense == 12_944_640
    convolutions = [m for m in network(Model(), 4, torch.zeros(1, 1, 8, 8)).modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [32, 64, 64]


def test_the_residual_network_adds_what_its_blocks_compute() -> None:
    torch.manual_seed(0)
    built: Any = NETWORKS["resnet"](3, 10).eval()
    stem, blocks = built[:4], built[4:7]
    x = stem(torch.randn(2, 3, 32, 32))
    assert x.shape == (2, 32, 16, 16)
    assert torch.equal(blocks[0](x), torch.relu(blocks[0].body(x) + x))  # an identity
    shapes = [tuple((x := block(x)).shape) for block in blocks]
    assert shapes == [(2, 32, 16, 16), (2, 64, 8, 8), (2, 128, 4, 4)]


@pytest.mark.parametrize(
    ("name", "first", "pooling"),
    [
        ("resnet18", "conv1", "maxpool"),
        ("squeezenet1_1", "features.0", "features.2"),
        ("mobilenet_v2", "features.0.0", ""),
    ],
)
def test_a_small_stem_keeps_the_size_of_small_images(name: str, first: str, pooling: str) -> None:
    pytest.importorskip("torchvision")
    made = network(Model(name=name, stem="small"), 7, SMALL)
    stem: Any = made.get_submodule(first)
    assert (stem.kernel_size, stem.stride, stem.padding, stem.weight.shape[2:]) == ((3, 3), (1, 1), (1, 1), (3, 3))
    assert stem(torch.zeros(1, 3, 32, 32)).shape[2:] == (32, 32)
    if pooling:
        assert isinstance(made.get_submodule(pooling), nn.Identity)
    original = network(Model(name=name, stem="imagenet"), 7, LARGE)
    assert made.eval()(SMALL).shape == (1, 7) and sum(1 for _ in made.parameters()) == sum(
        1 for _ in original.parameters()
    )


def test_the_stem_is_chosen_by_the_image_size_and_has_the_scale_of_the_networks_initialisation() -> None:
    pytest.importorskip("torchvision")
    small, large = (network(Model(name="resnet18"), 10, example) for example in (SMALL, LARGE))
    assert [m.conv1.stride for m in (small, large)] == [(1, 1), (2, 2)]  # type: ignore[union-attr]
    weight: Any = small.conv1.weight
    assert float(weight.detach().std()) == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.1)  # kaiming_normal, fan_out


def test_networks_of_torchvision_take_other_channels() -> None:
    pytest.importorskip("torchvision")
    made = network(Model(name="resnet18"), 10, GRAY)
    assert made.conv1.in_channels == 1 and made.eval()(GRAY).shape == (1, 10)  # type: ignore[union-attr]


def test_the_initial_values_depend_on_the_seed_alone() -> None:
    pytest.importorskip("torchvision")
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append((network(Model(name="resnet18"), 10, SMALL).state_dict()["conv1.weight"], torch.get_rng_state()))
    assert all(torch.equal(*pair) for pair in zip(*states[:2], strict=True))
    assert not torch.equal(states[0][0], states[2][0])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(name="resnet81"), "use 'resnet18'"),
        (Model(name="resnet18", options={"zero_init": True}), "(?s)'resnet18'.*zero_init"),
        (Model(name="vgg", options={"width": 2}), "no options"),
        (Model(name="vit_b_16"), "(?s)must give 10 outputs.*image_size"),
        (Model(name="torch.nn:Identities"), "(?s)'Identities'"),
        (Model(name="nowhere.models:net"), "(?s)nowhere.models:net.*ModuleNotFoundError"),
        (Model(name="torch.nn:Identity"), r"outputs \(1, 3, 32, 32\)"),
        (Model(name="math:sqrt", options={"x": 1}), "must run without an error"),
        (Model(name="builtins:list"), "a list"),
    ],
)
def test_models_that_are_none_are_refused(model: Model, message: str) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(StudyError, match=message):
        network(model, 10, SMALL)
