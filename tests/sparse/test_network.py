"""Whole networks, run sparse, against torch."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import resnet, vgg

pytest.importorskip("numba")

from torch.nn.utils import prune as host

from ip_plugin import bake, interspace, report
from ip_plugin.errors import ArgumentError, InterspaceError, SparseExecutionError, SparseFallbackWarning
from ip_plugin.methods import apply_masks, magnitude, select
from ip_plugin.sparse import SparseNetwork, prepare
from ip_plugin.sparse.autotune import Autotuner, by_rule
from ip_plugin.sparse.graph import baked, trace
from ip_plugin.sparse.lowering import lower
from ip_plugin.sparse.steps import Pack

SPACES = pytest.mark.parametrize("space", ["spatial", "interspace"])


def pruned(model: nn.Module, space: str, sparsity: float = 0.9) -> nn.Module:
    """With BatchNorm statistics that are not those of an untrained network."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                nn.init.normal_(tensor, std=0.1)
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 1.5)
    if space == "interspace":
        interspace(model, basis="orthonormal", sharing="model")
    return apply_masks(model, select(magnitude(model), sparsity=sparsity, scope="layer")).eval()


def runs(network: nn.Module) -> dict[str, str | None]:
    """How each layer is run."""
    return {row.layer: row.runs for row in report(network).rows}


@torch.no_grad()
def agrees(network: nn.Module, model: nn.Module, *inputs: Tensor) -> None:
    expected = model(*(value.clone() for value in inputs))
    difference = (network(*inputs) - expected).abs().max() / expected.abs().max()
    assert float(difference) < 1e-4


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10),
    "bottleneck": lambda: resnet.ResNet(resnet.Bottleneck, [2, 1, 1, 1], num_classes=10, width_per_group=16),
    "grouped": lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10, groups=8, width_per_group=4),
    "vgg": lambda: nn.Sequential(vgg.make_layers([16, "M", 32, 32, "M", 64], batch_norm=True), nn.Flatten()),
    "mobile": lambda: torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.35),
    "dense": lambda: torchvision.models.DenseNet(8, (2, 3, 2, 2), 16, num_classes=10),
}


@SPACES
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_torchvision(name: str, space: str) -> None:
    model, images = pruned(NETWORKS[name](), space), torch.randn(2, 3, 40, 40)
    network = prepare(model, images, deterministic=True)
    agrees(network, model, images)
    assert isinstance(network, SparseNetwork)
    assert all(run.how != "dense" for run in network.runs(images) if run.density < 0.5)
    layers = sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules())
    assert len(network.runs(images)) == layers


class Block(nn.Module):
    """A residual block whose stem is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(8, eps=0.3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(self.norm(self.two(self.relu(self.one(x)))) + x)
        return self.relu(self.two(x)) + self.one(x) + x.mean((2, 3), keepdim=True)


@pytest.mark.contract
@SPACES
@pytest.mark.parametrize("deterministic", [False, True])
def test_values_that_are_used_more_than_once(space: str, deterministic: bool) -> None:
    model = pruned(Block(), space, 0.7)
    images = torch.randn(2, 3, 11, 9)
    network = prepare(model, images, deterministic=deterministic)
    agrees(network, model, images)
    agrees(network, model, torch.randn(1, 3, 16, 5))  # another shape


class Pools(nn.Module):
    """Max poolings of values of either sign and of odd sizes, and one that is left to torch."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 3, 1)
        self.first, self.last = nn.MaxPool2d(3, 2, 1), last

    def forward(self, x: Tensor) -> Tensor:
        early = self.first(self.a(x))
        late = self.last(self.b(nn.functional.relu(early)))
        return torch.cat([early.flatten(1), late.flatten(1), self.c(late).flatten(1)], 1)


@SPACES
@pytest.mark.parametrize(
    "last",
    [
        nn.MaxPool2d((2, 3), (1, 2), (1, 1), (2, 1)),
        nn.MaxPool2d(2, 1),
        nn.MaxPool2d(5, 3),
        nn.MaxPool2d(2, ceil_mode=True),
    ],
    ids=["dilated", "stride 1", "stride 3", "ceil"],
)
def test_max_poolings(last: nn.Module, space: str) -> None:
    model = pruned(Pools(last), space, 0.7)
    for size in ((11, 14), (33, 37)):
        images = torch.randn(2, 3, *size)
        agrees(prepare(model, images, deterministic=True), model, images)


def first_of_four() -> nn.Conv2d:
    """A convolution that runs sparse and reads one channel of four."""
    convolution = nn.Conv2d(4, 1, 1)
    with torch.no_grad():
        convolution.weight[0, 1:] = 0
    return convolution


def test_nan_goes_through_a_max_pooling_as_it_does_in_torch() -> None:
    model = nn.Sequential(first_of_four(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(1, 1, 1)).eval()
    images = torch.randn(1, 4, 9, 21)
    network = prepare(model, images, deterministic=True)
    assert [run.how for run in network.runs(images)] == ["fused", "dense"]
    for row, column in ((0, 0), (4, 7), (8, 20), (3, 16)):
        marked = images.clone()
        marked[0, 0, row, column] = torch.nan
        with torch.no_grad():
            torch.testing.assert_close(network(marked), model(marked), equal_nan=True)


class Averages(nn.Module):
    """Averages of all pixels, by a module and by a function; their inputs are used again afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.pool = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 3), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        early = self.a(x)
        squeezed = nn.functional.adaptive_avg_pool2d(early, output_size=(1, 1))
        late = self.b(early * squeezed)
        whole = nn.functional.adaptive_avg_pool2d(late, 2)  # left to torch
        return torch.cat([squeezed.flatten(1), self.pool(late).flatten(1), whole.flatten(1)], 1)


@SPACES
@pytest.mark.parametrize("size", [(7, 9), (18, 37)])
def test_averages_of_all_pixels(size: tuple[int, int], space: str) -> None:
    model = pruned(Averages(), space, 0.7)
    network = prepare(model, torch.randn(3, 3, *size), deterministic=True)
    for _ in range(2):
        agrees(network, model, torch.randn(3, 3, *size))


def test_an_average_of_a_value_that_was_packed_long_before() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rest = nn.Sequential(*(nn.Conv2d(6, 6, 3, padding=1) for _ in range(4)))

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(x) + nn.functional.adaptive_avg_pool2d(x, 1)

    model = pruned(Late(), "spatial", 0.7)
    images = torch.randn(2, 6, 9, 9)
    agrees(prepare(model, images, deterministic=True), model, images)


@pytest.mark.parametrize(
    "middle", [nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Identity()], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_are_called(middle: nn.Module, when: str) -> None:
    middle = copy.deepcopy(middle)
    if when == "before":
        middle.register_forward_pre_hook(lambda _, inputs: (-inputs[0],))
    else:
        middle.register_forward_hook(lambda _, inputs, output: -output)
    model = pruned(nn.Sequential(nn.Conv2d(3, 6, 3), middle, nn.Conv2d(6, 4, 1)), "spatial", 0.7)
    images = torch.randn(2, 3, 8, 8)
    agrees(prepare(model, images, deterministic=True), model, images)


def test_an_average_with_nan_is_nan() -> None:
    model = nn.Sequential(first_of_four(), nn.AdaptiveAvgPool2d(1)).eval()
    images = torch.randn(3, 4, 5, 21)
    images[1, 0, -1, -1] = torch.nan
    network = prepare(model, images, deterministic=True)
    assert network(images).isnan().flatten().tolist() == [False, True, False]


def test_averages_are_taken_where_the_values_lie() -> None:
    model = pruned(Averages(), "spatial", 0.7)
    network = prepare(model, torch.randn(1, 3, 8, 8), deterministic=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(nn.AdaptiveAvgPool2d, "forward", lambda *_: pytest.fail("by torch"))
        network(torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("method", ["transpose_", "unsqueeze_"])
def test_shapes_that_change_in_place_are_not_followed(method: str) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if method == "transpose_":
                y.transpose_(2, 3)
                return self.b(y)
            y.unsqueeze_(0)
            return self.b(y[0])

    model, images = pruned(Turned(), "interspace", 0.7), torch.randn(1, 3, 6, 9)
    with pytest.warns(SparseFallbackWarning, match=f"{method} changes a shape in place"):
        network = prepare(model, images, deterministic=True)
    for _ in range(2):
        agrees(network, model, images)


class ReadTwice(nn.Module):
    """A value that two convolutions read, with or without a change between them, through modules that do nothing."""

    def __init__(self, changes: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.same, self.drop, self.changes = nn.Identity(), nn.Dropout(), changes

    def forward(self, x: Tensor) -> Tensor:
        x = x.sin()
        first = self.a(self.same(x))
        if self.changes:
            x.mul_(2)
        return self.c(self.drop(first)) + self.b(self.drop(x))


def packed(model: nn.Module, images: Tensor) -> int:
    """How many values are packed for convolutions."""
    steps = lower(trace(*baked(model), (images,)).module, (images,), by_rule).steps
    return sum(isinstance(step, Pack) for step in steps)


@SPACES
@pytest.mark.parametrize("changes", [False, True])
def test_a_value_that_is_read_twice_is_packed_once_unless_it_changes(changes: bool, space: str) -> None:
    model, images = pruned(ReadTwice(changes), space, 0.7), torch.randn(1, 4, 8, 8)
    network = prepare(model, images, deterministic=True)
    agrees(network, model, images)
    assert packed(model, images) == (2 if changes else 1)


@SPACES
@pytest.mark.parametrize(
    ("arguments", "size", "how"),
    [
        ({"padding": 1}, 12, "winograd"),
        ({"padding": 1}, 4, "dense"),  # few tiles
        ({"padding": 0}, 12, "dense"),
        ({"padding": 1, "stride": 2}, 12, "dense"),
        ({"padding": 1, "groups": 2}, 12, "dense"),
        ({"padding": 2, "dilation": 2}, 12, "dense"),
        ({"padding": 1, "kernel_size": (3, 1)}, 12, "dense"),
        ({"padding": 1, "out_channels": 9000}, 12, "dense"),  # large filters
    ],
)
def test_layers_that_are_still_too_dense_run_by_winograd_where_possible(
    arguments: dict[str, Any], size: int, how: str, space: str
) -> None:
    convolution = nn.Conv2d(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3, **arguments})
    model, images = pruned(nn.Sequential(convolution), space, 0.3), torch.randn(2, 4, size, size)
    network = prepare(model, images, deterministic=True)
    assert [run.how for run in network.runs(images)] == [how]
    agrees(network, model, images)


@SPACES
@pytest.mark.parametrize(
    ("sparsity", "fastest"), [(0.7, "winograd"), (0.7, "fused"), (0.7, "dense"), (0.95, "winograd")]
)
def test_the_fastest_way_is_chosen(sparsity: float, fastest: str, space: str) -> None:
    timed = []

    def took(runs: list[Any]) -> list[float]:
        loops = [run.args[1] if hasattr(run, "func") and run.func.__name__ == "_both" else run for run in runs]
        names = [loop.func.__name__ if hasattr(loop, "func") else "dense" for loop in loops]
        timed.extend(names)
        return [{"dense": 3.0, fastest: 1.0}.get(name, 2.0) for name in names]

    model = pruned(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)), space, sparsity)
    images = torch.randn(2, 8, 12, 12)
    network = SparseNetwork(trace(*baked(model), (images,)), Autotuner(timer=took))
    agrees(network, model, images)
    (how,) = (run.how for run in network.runs(images))
    if sparsity > 0.9:  # too few non-zeros for it
        assert "winograd" not in timed and how in ("direct", "fused")
    else:
        assert how == fastest and {"winograd", "fused", "dense"} <= set(timed)


class Strided(nn.Module):
    """Two convolutions that read the same input, which may be changed in between."""

    def __init__(self, first: tuple[int, int, int], other: tuple[int, int, int], changes: bool) -> None:
        super().__init__()
        self.changes = changes
        self.a, self.b, self.drop = nn.Conv2d(4, 8, *first), nn.Conv2d(4, 8, *other), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        first = self.drop(self.a(x))
        if self.changes:
            x.mul_(2)
        return torch.cat([first.flatten(1), self.drop(self.b(x)).flatten(1)], 1)


@SPACES
@pytest.mark.parametrize(
    ("first", "other", "size", "changes", "packs"),
    [
        ((3, 2, 1), (1, 2, 0), (9, 8), False, 1),
        ((3, 2, 1), (1, 2, 0), (12, 7), True, 2),
        ((3, 2, 1), (3, 2, 1), (12, 7), False, 1),
        ((3, 2, 1), (2, 2, 0), (6, 8), False, 1),
        ((3, 2, 1), (2, 2, 0), (6, 7), False, 2),  # another size of the output
        ((3, 2, 1), (1, 3, 1), (4, 4), False, 2),  # another stride
        ((3, 2, 1), (5, 2, 2), (9, 8), False, 2),  # reads what is before
        ((3, 3, 1), (4, 3, 1), (6, 6), False, 2),  # reads what is behind
        ((1, 2, 0), (3, 2, 1), (9, 8), False, 1),  # the other one reads more phases
    ],
)
def test_an_input_is_split_into_phases_once_for_all_that_read_them(
    first: tuple[int, int, int], other: tuple[int, int, int], size: tuple[int, int], changes: bool, packs: int,
    space: str,
) -> None:  # fmt: skip
    model, images = pruned(Strided(first, other, changes), space, 0.7), torch.randn(2, 4, *size)
    network = prepare(model, images, deterministic=True)
    agrees(network, model, images)
    assert packed(model, images) == packs


class Views(nn.Module):
    """Results that are views of one another, and in-place changes to them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.c, self.d = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        early = nn.functional.dropout(self.a(x), training=False)[:, :, ::1]
        first, second = self.b(early).chunk(2, 1)
        late = self.c(torch.cat([first, second], 1))
        late += early.flip(3)
        early.mul_(2)
        return self.d(torch.cat([early, late.relu_()], 1))


@SPACES
def test_views_and_changes_in_place(space: str) -> None:
    model = pruned(Views(), space, 0.5)
    images = torch.randn(2, 4, 8, 12)
    agrees(prepare(model, images, deterministic=True), model, images)


def test_a_sum_of_different_shapes_is_left_to_torch() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 1, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    model, images = pruned(Sum(), "interspace", 0.5), torch.randn(1, 3, 6, 6)
    agrees(prepare(model, images, deterministic=True), model, images)


@SPACES
def test_empty_layers_and_dense_ones(space: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3))
    if space == "interspace":
        interspace(model, basis="dct")
    from ip_plugin import set_masks

    set_masks(model, {"1": torch.zeros(8, 8, 3, 3, dtype=torch.bool)})
    images = torch.randn(1, 3, 12, 12)
    for deterministic in (False, True):
        network = prepare(model, images, deterministic=deterministic)
        agrees(network, model, images)
    assert [run.how for run in network.runs(images)] == ["dense", "direct" if space == "spatial" else "fused", "dense"]
    assert [run.density for run in network.runs(images)] == [1, 0, 1]


def test_masks_of_the_host() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3))
    for layer in (model[0], model[2]):
        host.l1_unstructured(layer, "weight", 0.8)
    images = torch.randn(1, 3, 12, 12)
    network = prepare(model, images, deterministic=True)
    agrees(network, model, images)
    assert network.runs(images)[0].density == pytest.approx(0.2, abs=0.01)


@SPACES
def test_the_model_is_not_changed_and_not_needed(space: str) -> None:
    model = pruned(Block(), space).train()
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 8, 8)
    network = prepare(model, images, deterministic=True)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = copy.deepcopy(bake(copy.deepcopy(model)).eval())(images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(network(images), expected.detach(), rtol=1e-4, atol=1e-5)
    assert not network(images).requires_grad


def test_a_result_is_not_written_to_by_later_calls() -> None:
    model = pruned(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), "spatial")
    images = torch.randn(1, 3, 8, 8)
    network = prepare(model, images, deterministic=True)
    assert network.runs(images)[0].how != "dense"
    first = network(images)
    kept = first.clone()
    network(torch.randn(1, 3, 8, 8))
    assert torch.equal(first, kept)


def test_calls_from_many_threads_at_once() -> None:
    model = pruned(Block(), "interspace", 0.7)
    images = [torch.randn(1 + number % 2, 3, 8, 8) for number in range(40)]
    network = prepare(model, images[0])
    with ThreadPoolExecutor(5) as pool:
        outputs = list(pool.map(network, images))
    for batch, output in zip(images, outputs, strict=True):
        torch.testing.assert_close(output, model(batch).detach(), rtol=1e-4, atol=1e-5)


def test_two_deterministic_networks_are_bit_equal() -> None:
    model = pruned(Block(), "interspace", 0.7)
    images = torch.randn(2, 3, 8, 8)
    one, two = (prepare(model, images, deterministic=True) for _ in range(2))
    assert torch.equal(one(images), two(images))


class Undecided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) if x.sum() > -1e9 else x


@SPACES
def test_models_that_cannot_be_traced_run_layer_by_layer(space: str) -> None:
    model = pruned(Undecided(), space)
    images = torch.randn(1, 3, 8, 8)
    with pytest.warns(SparseFallbackWarning, match="control flow"):
        network = prepare(model, images, deterministic=True)
    assert runs(network) == {"a": "fused", "b": "fused"}
    agrees(network, model, images)


def test_models_and_inputs_that_cannot_be_run_are_refused() -> None:
    model, images = pruned(Block(), "spatial"), torch.randn(1, 3, 8, 8)
    with pytest.raises(SparseExecutionError, match=r"torch.float64 on cpu"):
        prepare(model, images.double())
    with pytest.raises(SparseExecutionError, match=r"torch.float64 on cpu"):
        prepare(copy.deepcopy(model).double(), images)
    with pytest.raises(InterspaceError, match="The model must run on `example_input`"):
        prepare(model, torch.randn(1, 4, 8, 8))
    with pytest.raises(SparseExecutionError, match=r"\[1.0\]; prepared for Tensor"):
        prepare(model, images)([1.0])
    with pytest.raises(ArgumentError, match="float16"):
        prepare(model, images, response_dtype=torch.float16)


def test_bfloat16_responses_are_rounded_and_nothing_else() -> None:
    model, images = pruned(Block(), "interspace", 0.85), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(images)
    narrow = prepare(model, images, deterministic=True, response_dtype=torch.bfloat16)(images)
    largest = float(expected.abs().max())
    assert 1e-4 < float((narrow - expected).abs().max()) / largest < 2e-2
    model = pruned(Block(), "spatial", 0.7)  # has no responses to a basis
    wide, narrow = (
        prepare(model, images, deterministic=True, response_dtype=dtype)(images)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert torch.equal(wide, narrow)


class InPlace(nn.Module):
    """Values that are changed in place between a convolution and what would be fused with it."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        y = self.a(x)
        if self.which == "source":
            x.mul_(3)
            return nn.functional.relu(y)
        if self.which == "module":
            z = self.relu(x)
            return y + z
        if self.which == "addend":
            y = y + x
            x *= 2
            return y.relu()
        if self.which == "other":  # the addend is what changes
            z = self.b(x)
            x += y
            return x * z
        x.add_(y)
        return torch.add(x, self.b(x))


@SPACES
@pytest.mark.parametrize("which", ["source", "module", "addend", "other", "method"])
def test_values_that_change_in_place_are_not_moved(which: str, space: str) -> None:
    model, images = pruned(InPlace(which), space, 0.5), torch.randn(1, 3, 8, 8)
    agrees(prepare(model, images, deterministic=True), model, images)


def test_modules_that_are_used_elsewhere_as_well_stay() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(input=self.relu(self.norm(self.a(x)))) + self.relu(self.norm(x - 1)) + self.b(x)

    model, images = pruned(Shared(), "interspace", 0.5), torch.randn(1, 4, 8, 8)
    agrees(prepare(model, images, deterministic=True), model, images)


def test_convolutions_that_do_more_are_left_to_torch() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = pruned(
        nn.Sequential(Doubled(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding_mode="reflect")), "interspace"
    )
    handle = model[1].register_forward_hook(lambda module, given, made: made + 1)
    images = torch.randn(1, 3, 12, 12)
    network = prepare(model, images, deterministic=True)
    agrees(network, model, images)
    assert network.runs(images) == []
    handle.remove()


def test_an_empty_batch_and_a_single_image_are_refused_or_left_to_torch() -> None:
    model, images = (
        pruned(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), "interspace"),
        torch.randn(1, 3, 12, 12),
    )
    network = prepare(model, images, deterministic=True)
    for wrong in (images[0], images[:0]):
        with pytest.raises(SparseExecutionError, match="batches of images"):
            network(wrong)
    agrees(network, model, images)
    agrees(prepare(model, images[0], deterministic=True), model, images[0])


def test_layer_by_layer_a_convolution_may_be_called_in_any_way() -> None:
    class Odd(Undecided):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            z = self.a(x[:, :, 1:])
            return super().forward(x) + y + self.b(input=y) + z.mean()

    model, images = pruned(Odd(), "interspace"), torch.randn(1, 3, 8, 8)
    with pytest.warns(SparseFallbackWarning):
        network = prepare(model, images, deterministic=True)
    assert runs(network)["a"] != "dense"
    agrees(network, model, images)


def test_convolutions_that_loops_have_no_room_for_are_left_to_torch() -> None:
    model = pruned(nn.Sequential(nn.Conv2d(1, 2, 17, padding=8), nn.Conv2d(2, 2, 3)), "spatial")
    images = torch.randn(1, 1, 20, 20)
    network = prepare(model, images, deterministic=True)
    assert [run.layer for run in network.runs(images)] == ["1"]
    agrees(network, model, images)
    steps = lower(trace(*baked(model), (images,)).module, (images,), by_rule, max_offset=100).steps
    assert [step.layer.run.how for step in steps if step.layer] == ["dense"]


def test_preparing_leaves_the_random_state() -> None:
    model, images = pruned(Block(), "interspace", 0.7), torch.randn(1, 3, 8, 8)
    before = torch.get_rng_state()
    prepare(model, images)
    assert torch.equal(torch.get_rng_state(), before)


def test_torch_keeps_its_number_of_threads_and_ways_are_timed_with_it() -> None:
    script = """
import numba, torch
from torch import nn
from ip_plugin.sparse import SparseNetwork
from ip_plugin.sparse.autotune import Autotuner
from ip_plugin.sparse.graph import baked, trace
torch.set_num_threads(1)
class Printing(Autotuner):
    def __call__(self, *rest):
        print(numba.get_num_threads(), torch.get_num_threads())
        return super().__call__(*rest)
images = torch.randn(1, 4, 8, 8)
SparseNetwork(trace(*baked(nn.Sequential(nn.Conv2d(4, 4, 3))), (images,)), Printing())(images)
print(numba.config.NUMBA_NUM_THREADS, torch.get_num_threads())
"""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.stdout == "1 1\n2 1\n", run.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="asks the dynamic linker of Linux")
@pytest.mark.parametrize("first", ["torch", "numba"])
def test_loops_and_torch_share_one_pool_of_threads(first: str) -> None:
    """They start parallel regions by one libgomp, says the linker, though torch brings its own one."""
    parts = [
        "import torch; torch.set_num_threads(2); torch.ones(2000, 2000).exp()",
        "import numba\n@numba.njit(parallel=True)\ndef loop(x):\n    for i in numba.prange(len(x)):\n        x[i] = 1",
        "import numpy; loop(numpy.zeros(10))",
    ]
    script = "\n".join(parts if first == "torch" else [*parts[1:], parts[0]])
    environment = {**os.environ, "LD_DEBUG": "bindings", "NUMBA_THREADING_LAYER": "omp", "NUMBA_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0
    pattern = r"binding file \S*/(libtorch_cpu|omppool)\S* \[0\] to (\S+) \[0\]: .*`GOMP_parallel'"
    bound = re.findall(pattern, run.stderr)
    assert {caller for caller, _ in bound} == {"libtorch_cpu", "omppool"}
    assert len({os.path.realpath(library) for _, library in bound}) == 1


def test_without_numba_the_error_says_what_to_install() -> None:
    script = "import sys; sys.modules['numba'] = None; import ip_plugin.sparse"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "pip install 'ip-plugin[sparse]'" in run.stderr.splitlines()[-1]
