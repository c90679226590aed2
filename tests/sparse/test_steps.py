"""Every step of a sparse network that is no convolution computes what torch computes."""

from __future__ import annotations

import timeit
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import DenseNet

pytest.importorskip("numba")

from ip_plugin import interspace
from ip_plugin.errors import ArgumentError, SparseFallbackWarning
from ip_plugin.methods import apply_masks, magnitude, select
from ip_plugin.sparse import SparseNetwork, prepare
from ip_plugin.sparse.autotune import Autotuner, by_rule
from ip_plugin.sparse.dense import faster_dense
from ip_plugin.sparse.elementwise import Scale
from ip_plugin.sparse.graph import Structure, baked, trace
from ip_plugin.sparse.lowering import lower
from ip_plugin.sparse.steps import Pack, Step
from ip_plugin.sparse.threads import warn_of_slow_threads

SPACES = pytest.mark.parametrize("space", ["spatial", "interspace"])
quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


class Between(nn.Module):
    """Something between two convolutions, which run sparse."""

    def __init__(self, middle: Callable[[Tensor], Tensor], inputs: int = 3, outputs: int = 5) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(inputs, 5, 3, padding=1), nn.Conv2d(outputs, 4, 3, padding=1)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def pruned(model: nn.Module, sparsity: float = 0.7) -> nn.Module:
    return apply_masks(model, select(magnitude(model), sparsity=sparsity, scope="layer")).eval()


def in_space(model: nn.Module, space: str) -> nn.Module:
    return interspace(model, basis="orthonormal", sharing="layer") if space == "interspace" else model


def steps_of(model: nn.Module, *images: Tensor) -> list[Step]:
    """The steps of a model by the rule."""
    return lower(trace(*baked(model), images).module, images, by_rule).steps


@torch.no_grad()
def agrees(model: nn.Module, *inputs: Tensor, steps: str | None = None) -> SparseNetwork:
    """Prepared, a model computes the same, in a network that has steps of this kind and leaves nothing to torch."""
    network = prepare(model, inputs, deterministic=True)
    assert isinstance(network, SparseNetwork)
    for _ in range(2):
        expected = model(*(value.clone() for value in inputs))
        torch.testing.assert_close(network(*inputs), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    if steps is not None:
        kinds = [step.step for step in network.profile(*inputs, rounds=1)]
        assert steps in kinds, kinds
        assert [kind for kind in kinds if kind.startswith("torch") and "input" not in kind] == []
    return network


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.3, 0.2), nn.Sigmoid(), nn.SiLU(), nn.Hardsigmoid(), nn.Hardswish(), nn.GELU(),
    nn.GELU("tanh"), nn.LeakyReLU(0.3),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("density", [0.3, 1.0], ids=["sparse", "dense"])
def test_activations_are_part_of_the_layer_before(activation: nn.Module, density: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 4, 3), activation)
    images = 4 * torch.randn(2, 3, 7, 7)
    network = agrees(pruned(model, 1 - density), images)
    kinds = [step.step for step in network.profile(images, rounds=1)]
    assert kinds[-2:] == 2 * ["DenseConvolution" if density == 1 else "SparseConvolution"]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_small_values_take_no_longer(activation: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(1, 64, 1, bias=False), activation)
    images = torch.randn(1, 1, 64, 64)
    took = {}
    for scale in (1.0, 1e-20):  # the square of the smaller one is subnormal
        network = agrees(model, scale * images)
        took[scale] = min(timeit.repeat(lambda: network(scale * images), number=5, repeat=20))
    assert took[1e-20] < 5 * took[1.0]


@pytest.mark.parametrize(
    "function",
    [
        F.relu, F.relu6, torch.sigmoid, F.silu, F.hardsigmoid, F.hardswish, F.gelu, F.leaky_relu,
        lambda x: F.leaky_relu(x, 0.2), lambda x: F.gelu(x, approximate="tanh"), lambda x: x.sigmoid(),
        lambda x: F.silu(x + x, inplace=True), nn.BatchNorm2d(5),
        nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(inplace=True)), nn.Sequential(nn.BatchNorm2d(5), nn.GELU()),
    ],
)  # fmt: skip
def test_what_acts_on_single_pixels_stays_in_the_layout(function: Callable[[Tensor], Tensor]) -> None:
    for module in function.modules() if isinstance(function, nn.Module) else ():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
    if isinstance(function, nn.Module):
        middle: Callable[[Tensor], Tensor] = nn.Sequential(nn.MaxPool2d(3, 1, 1), function)
    else:
        middle = lambda x: function(F.max_pool2d(x, 3, 1, 1))  # noqa: E731
    agrees(pruned(Between(middle)), torch.randn(2, 3, 9, 21), steps="Elementwise")


@quick
@given(
    kernel=pairs, stride=pairs, padding=st.tuples(st.integers(0, 1), st.integers(0, 1)), dilation=pairs,
    size=st.tuples(st.integers(3, 20), st.integers(3, 40)), ceil=st.booleans(), early=st.booleans(),
)  # fmt: skip
def test_max_poolings_of_any_window(
    kernel: Any, stride: Any, padding: Any, dilation: Any, size: Any, ceil: bool, early: bool
) -> None:
    assume(all(2 * p <= k for p, k in zip(padding, kernel, strict=True)))
    assume(all(s > (k - 1) * d for s, k, d in zip(size, kernel, dilation, strict=True)))
    pool = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil)
    model = nn.Sequential(pool, nn.Conv2d(5, 4, 3, padding=1)) if early else Between(pool)
    agrees(pruned(model), torch.randn(2, 5 if early else 3, *size), steps="MaxPool")


@quick
@given(
    kernel=pairs, stride=pairs, padding=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    size=st.tuples(st.integers(3, 20), st.integers(3, 40)), ceil=st.booleans(), whole=st.booleans(),
    divisor=st.sampled_from([None, 3]), function=st.booleans(),
)  # fmt: skip
def test_average_poolings_of_any_window(
    kernel: Any, stride: Any, padding: Any, size: Any, ceil: bool, whole: bool, divisor: int | None, function: bool
) -> None:
    assume(all(2 * p <= k for p, k in zip(padding, kernel, strict=True)))
    arguments = (kernel, stride, padding, ceil, whole, divisor)
    pool = (lambda x: F.avg_pool2d(x, *arguments)) if function else nn.AvgPool2d(*arguments)
    agrees(pruned(Between(pool)), torch.randn(2, 3, *size), steps="AveragePool")


@quick
@given(size=st.tuples(st.integers(1, 20), st.integers(1, 40)), to=st.tuples(st.integers(1, 7), st.integers(1, 7)))
def test_adaptive_averages_to_any_size(size: tuple[int, int], to: tuple[int, int]) -> None:
    agrees(pruned(Between(nn.AdaptiveAvgPool2d(to))), torch.randn(2, 3, *size))


class Concatenated(nn.Module):
    """As in DenseNet: each layer reads the concatenation of all before, which may also be changed in place."""

    def __init__(self, layers: int, norms: bool, changes: bool, swaps: bool) -> None:
        super().__init__()
        self.first, self.changes, self.swaps = nn.Conv2d(3, 4, 3, 2, padding=1), changes, swaps
        self.layers = nn.ModuleList(nn.Conv2d(4 + 3 * n, 3, 3, padding=1) for n in range(layers))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * n) if norms else nn.Identity() for n in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        values = [self.first(x)]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            joined = torch.cat(values[::-1] if self.swaps else values, 1)
            values.append(layer(F.relu(norm(joined))))
            if self.changes:
                values[0].mul_(0.5)
        return torch.cat([torch.cat(values[:2], 1), F.max_pool2d(torch.cat(values, 1), 3, 1, 1), *values[1:]], 1)


@quick
@given(
    layers=st.integers(1, 4), norms=st.booleans(), changes=st.booleans(), swaps=st.booleans(),
    size=st.tuples(st.integers(3, 12), st.integers(3, 40)),
)  # fmt: skip
def test_concatenations(layers: int, norms: bool, changes: bool, swaps: bool, size: tuple[int, int]) -> None:
    model = pruned(Concatenated(layers, norms, changes, swaps))
    agrees(model, torch.randn(2, 3, *size), steps=None if changes else "Concatenation")


def test_values_are_made_in_the_concatenation_that_reads_them() -> None:
    model = pruned(DenseNet(8, (2, 3, 2, 2), 16, num_classes=10))
    network = prepare(model, torch.randn(1, 3, 40, 40), deterministic=True)
    kinds = [step.step for step in network.profile(torch.randn(1, 3, 40, 40), rounds=1)]
    assert kinds.count("Concatenation") == 13 and kinds.count("Pack") == 1  # of the input


class Squeezed(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self, mean: Callable[[Tensor], Tensor], first: bool) -> None:
        super().__init__()
        self.mean, self.first = mean, first
        self.down, self.up = nn.Conv2d(5, 2, 1), nn.Conv2d(2, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.up(F.silu(self.down(self.mean(x)))).sigmoid()
        return scale * x if self.first else x * scale


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    "mean", [nn.AdaptiveAvgPool2d(1), lambda x: x.mean((2, 3), keepdim=True), lambda x: x.mean([-1, -2], True)]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_squeeze_and_excitation(mean: Callable[[Tensor], Tensor], batch: int, first: bool) -> None:
    agrees(pruned(Between(Squeezed(mean, first)), 0.5), torch.randn(batch, 3, 9, 18), steps="Scale")


@SPACES
@pytest.mark.parametrize(
    ("sparsity", "batch", "drawn_in"), [(0.9, 1, True), (0.9, 2, False), (0.5, 1, False), (0.0, 1, False)]
)
def test_scales_of_channels_are_drawn_into_sparse_coefficients(
    sparsity: float, batch: int, drawn_in: bool, space: str
) -> None:
    model = in_space(Between(Squeezed(nn.AdaptiveAvgPool2d(1), first=True)), space)
    images = torch.randn(batch, 3, 12, 18)
    agrees(pruned(model, sparsity), images, steps="Scale")
    scales = [step for step in steps_of(model, images) if isinstance(step, Scale)]
    assert [step.target is None for step in scales] == [drawn_in]


class Overwriting(nn.Module):
    """A value to which something is added, or that is multiplied with something, and that may be needed afterwards."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b, self.c, self.d = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.valid, self.wide, self.how = nn.Conv2d(8, 8, 3), nn.Conv2d(16, 8, 1), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        match self.how:
            case "its own convolution":
                y = x + self.a(x)
            case "scale":
                y = x * x.mean((2, 3), keepdim=True).sigmoid()
            case "scale in another layout":
                x = self.valid(x)
                y = x * x.mean((2, 3), keepdim=True).sigmoid()
            case "part of a concatenation":
                x = self.a(x)
                y = x + self.b(self.wide(torch.cat([self.d(x), x], 1)))
            case "other layout":
                x = self.valid(x)  # its rows are as far apart as those of its input
                y = F.max_pool2d(self.a(x), 3, 1, 1) + x
            case _:
                y = x + self.b(self.a(x))
        return torch.cat([self.c(y), self.d(y), *([x] if self.how in ("needed", "other layout") else [])], 1)


@SPACES
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("how", "batches"),
    [
        ("sum", (1, 2)), ("scale", (1,)), ("scale in another layout", ()), ("needed", ()), ("its own convolution", ()),
        ("other layout", ()), ("part of a concatenation", ()),
    ],
)  # fmt: skip
def test_a_value_needed_no_more_is_overwritten(how: str, batches: tuple[int, ...], batch: int, space: str) -> None:
    model, images = pruned(in_space(Overwriting(how), space)), torch.randn(batch, 3, 9, 7)
    agrees(model, images)
    pairs = [pair for step in steps_of(model, images) for pair in step.overwrites.items()]
    assert sum(old.offset == new.offset for new, old in pairs) == (batch in batches)


@pytest.mark.parametrize("batch", [1, 2])
def test_scales_may_be_a_parameter(batch: int) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(batch, 5, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    agrees(pruned(Between(Scaled()), 0.9), torch.randn(batch, 3, 12, 18), steps=None)


def test_scales_are_drawn_into_grouped_layers_but_not_through_a_sum() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.numbers = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 5, 1)
            self.depthwise, self.other = nn.Conv2d(5, 5, 3, padding=1, groups=5), nn.Conv2d(5, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            numbers = self.numbers(x.mean((2, 3), keepdim=True))
            return self.depthwise(x * numbers) + (self.other(x) + x * numbers.sigmoid())

    model, images = pruned(Both(), 0.8), torch.randn(1, 3, 12, 18)
    agrees(model, images)
    drawn_in = [step.target is None for step in steps_of(model, images) if isinstance(step, Scale)]
    assert sorted(drawn_in) == [False, True]


def test_scales_are_not_drawn_into_a_convolution_by_torch() -> None:
    model = Between(Squeezed(nn.AdaptiveAvgPool2d(1), first=True)).eval()
    model.last = nn.Conv2d(5, 4, 5, padding=2)
    pruned(model.first)
    network = agrees(model, torch.randn(1, 3, 12, 18))
    assert network.runs(torch.randn(1, 3, 12, 18))[-1].how == "dense"


def test_scales_are_not_drawn_in_where_the_images_change_before() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1)
            self.numbers = nn.Conv2d(5, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            product = x * self.numbers(x.mean((2, 3), keepdim=True))
            x.mul_(2)
            return self.last(product)

    model, images = pruned(Changing(), 0.9), torch.randn(1, 3, 12, 18)
    agrees(model, images)
    assert [step.target is None for step in steps_of(model, images) if isinstance(step, Scale)] == [False]


class Widened(nn.Module):
    """A 1x1 convolution with more outputs than inputs, and a strided one that reads it.

    Options: its input is read by a strided convolution too, before it (``"shortcut"``), in other strides (``"apart"``),
    or changed behind it (``"changes"``); something is added to its output (``"sum"``); another strided convolution
    reads that (``"other"``), or something else (``"all"``).
    """

    def __init__(self, kernel: int, stride: tuple[int, int], padding: int, groups: int, options: set[str]) -> None:
        super().__init__()
        self.first, self.wide, self.added = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1)
        self.strided = nn.Conv2d(8, 8, kernel, stride, padding, groups=groups)
        self.other, self.shortcut = nn.Conv2d(8, 4, 1, stride), nn.Conv2d(4, 4, 1, stride)
        self.apart, self.options = nn.Conv2d(4, 4, 3, (4, 4)), options

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        made = [layer(x) for name, layer in self.named_children() if name in self.options & {"shortcut", "apart"}]
        wide = F.silu(self.wide(x) + self.added(x) if "sum" in self.options else self.wide(x))
        if "changes" in self.options:
            x.mul_(2)
        made.append(self.strided(wide))
        if "other" in self.options:
            made.append(self.other(wide))
        if "all" in self.options:
            made.append(wide)
        return torch.cat([value.flatten(1) for value in made], 1)


@quick
@given(
    kernel=st.sampled_from([1, 2, 3, 5]), stride=st.sampled_from([(2, 2), (1, 2), (3, 2)]), padding=st.integers(0, 2),
    groups=st.sampled_from([1, 2, 8]), batch=st.integers(1, 2), size=st.tuples(st.integers(5, 20), st.integers(5, 40)),
    options=st.sets(st.sampled_from(["shortcut", "apart", "changes", "sum", "other", "all"])),
    space=st.sampled_from(["spatial", "interspace"]),
)  # fmt: skip
@example(3, (2, 2), 1, 8, 1, (9, 12), {"apart"}, "spatial")
@example(3, (2, 2), 1, 8, 1, (9, 12), {"sum"}, "spatial")
def test_pointwise_layers_write_the_phases_that_strided_ones_read(
    kernel: int, stride: tuple[int, int], padding: int, groups: int, batch: int, size: tuple[int, int],
    options: set[str], space: str,
) -> None:  # fmt: skip
    model = in_space(Widened(kernel, stride, padding, groups, options), space)
    images = torch.randn(batch, 3, *size)
    agrees(pruned(model), images)
    if options <= {"shortcut", "apart", "changes"}:
        assert {step.target.channels for step in steps_of(model, images) if isinstance(step, Pack)} <= {3, 4}


def test_what_reads_no_phases_gets_none() -> None:
    model, images = Widened(3, (2, 2), 1, 1, {"other"}).eval(), torch.randn(1, 3, 12, 18)
    pruned(model.wide)
    pruned(model.other)
    agrees(model, images)  # `strided` is dense
    pruned(model)
    program = lower(trace(*baked(model), (images,)).module, (images,), by_rule, max_offset=4 * 600)
    assert [run.run.how == "dense" for step in program.steps if (run := step.layer)] == [False, False, True, True]
    torch.testing.assert_close(program((images,))[0], model(images).detach(), rtol=1e-4, atol=1e-5)


def test_what_is_added_to_a_strided_convolution_is_not_written_in_phases() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.strided = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 8, 3, 2, 1)
            self.wide = nn.Conv2d(4, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.strided(x) + self.wide(self.first(x))

    agrees(pruned(Added()), torch.randn(2, 3, 12, 18), steps="SparseConvolution")


@quick
@given(
    kernel=st.sampled_from([1, 3, 5, 7]), stride=st.integers(1, 3), multiple=st.integers(1, 2),
    size=st.tuples(st.integers(4, 20), st.integers(4, 40)), space=st.sampled_from(["spatial", "interspace"]),
)  # fmt: skip
def test_depthwise_convolutions(kernel: int, stride: int, multiple: int, size: tuple[int, int], space: str) -> None:
    model = Between(nn.Conv2d(5, 5 * multiple, kernel, stride, kernel // 2, groups=5), outputs=5 * multiple)
    agrees(pruned(in_space(model, space)), torch.randn(2, 3, *size), steps="SparseConvolution")


@quick
@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3), inputs=st.integers(1, 40), outputs=st.integers(1, 40),
    bias=st.booleans(), activation=st.sampled_from([None, nn.ReLU(), nn.GELU(), nn.SiLU()]),
)  # fmt: skip
def test_sparse_linear_layers(
    shape: list[int], inputs: int, outputs: int, bias: bool, activation: nn.Module | None
) -> None:
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=bias), *([activation] if activation else []))
    network = agrees(pruned(model, 0.9), torch.randn(*shape, inputs))
    for run in network.runs(torch.randn(*shape, inputs)):
        assert run.how == ("direct" if run.density < 0.15 else "dense")


@pytest.mark.parametrize(
    ("rows", "fastest", "how", "width"),
    [
        (1, 0, "direct", 1), (3, 0, "direct", 1), (3, 1, "direct", 32), (3, 2, "dense", 0),
        (40, 0, "direct", 64), (40, 1, "dense", 0),
    ],
)  # fmt: skip
def test_linear_layers_run_in_the_fastest_way(rows: int, fastest: int, how: str, width: int) -> None:
    def took(runs: list[object]) -> list[float]:
        return [1.0 if run is runs[fastest] else 2.0 for run in runs]

    model, images = pruned(nn.Sequential(nn.Linear(30, 20), nn.SiLU()), 0.8), torch.randn(rows, 30)
    network = SparseNetwork(trace(*baked(model), (images,)), Autotuner(timer=took))
    torch.testing.assert_close(network(images), model(images).detach(), rtol=1e-4, atol=1e-5)
    assert [(run.how, run.width) for run in network.runs(images)] == [(how, width)]


def test_linear_layers_of_many_rows_and_inputs_are_left_to_torch() -> None:
    model, rows = pruned(nn.Sequential(nn.Linear(30, 20)), 0.9), torch.randn(40, 30)
    program = lower(trace(*baked(model), (rows,)).module, (rows,), by_rule, max_offset=1000)
    assert [step.layer.run.how for step in program.steps if step.layer] == ["dense"]
    torch.testing.assert_close(program((rows,))[0], model(rows).detach())


@pytest.mark.parametrize("deterministic", [True, False])
def test_linear_layers_of_no_rows(deterministic: bool) -> None:
    model = pruned(nn.Sequential(nn.Linear(30, 20)), 0.9)
    network = prepare(model, torch.randn(1, 30), deterministic=deterministic, dense="torch")
    assert network(torch.empty(0, 30)).shape == (0, 20)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (2, 32), (32, 32), (33, 64)])
def test_linear_layers_by_the_rule(rows: int, width: int) -> None:
    model, values = pruned(nn.Sequential(nn.Linear(30, 20)), 0.9), torch.randn(rows, 30)
    (step,) = (step for step in steps_of(model, values) if step.layer is not None)
    assert step.layer is not None and step.layer.run[2:4] == ("direct", width)


@pytest.mark.parametrize(("sparsity", "timed"), [(0.9, 3), (0.99, 2)])
@pytest.mark.parametrize(("seconds", "width"), [(0.97, 32), (0.9, 1)])
def test_linear_layers_keep_what_is_not_clearly_beaten(sparsity: float, timed: int, seconds: float, width: int) -> None:
    def took(runs: list[object]) -> list[float]:
        assert len(runs) == timed  # torch's way takes too long to be worth it where next to nothing is left
        return [seconds, 1.0, 2.0][:timed]

    model, values = pruned(nn.Sequential(nn.Linear(30, 20)), sparsity), torch.randn(3, 30)
    (run,) = SparseNetwork(trace(*baked(model), (values,)), Autotuner(timer=took)).runs(values)
    assert run.width == width


def test_linear_layers_and_pointwise_convolutions_are_chosen_for_apart() -> None:
    class Twice(nn.Module):
        """The second convolution reads the copy that was made for the first one."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(30, 20, 1), nn.Conv2d(30, 20, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.first(x), self.second(x)

    choose = Autotuner(timer=lambda runs: [1.0, *(2.0 for _ in runs[1:])])
    linear, rows = pruned(nn.Sequential(nn.Linear(30, 20)), 0.9), torch.randn(3, 30)
    assert [run.width for run in SparseNetwork(trace(*baked(linear), (rows,)), choose).runs(rows)] == [1]
    model, images = pruned(Twice(), 0.9), torch.randn(1, 30, 1, 3)
    network = SparseNetwork(trace(*baked(model), (images,)), choose)
    torch.testing.assert_close(network(images), tuple(value.detach() for value in model(images)), rtol=1e-4, atol=1e-5)


@SPACES
def test_timed_choices_of_layers_that_share_phases(space: str) -> None:
    model = in_space(Widened(3, (2, 2), 1, 8, {"shortcut", "other"}), space)
    pruned(model, 0.9)
    for size in ((12, 18), (15, 21)):
        images = torch.randn(1, 3, *size)
        with warnings.catch_warnings():
            warnings.simplefilter("error", SparseFallbackWarning)
            network = prepare(model, images, dense="torch")
        torch.testing.assert_close(network(images), model(images).detach(), rtol=1e-4, atol=1e-5)


def test_a_network_that_is_faster_dense_is_run_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = pruned(Between(nn.ReLU())), torch.randn(1, 3, 9, 9)
    seconds = {"sparse": [1.0], "torch": [0.8]}
    monkeypatch.setattr(
        "ip_plugin.sparse.dense.side_by_side", lambda calls, **_: {name: seconds[name] for name in calls}
    )
    network = prepare(model, images, dense="torch")
    assert "run dense by torch, since that takes 800.00 ms" in repr(network)
    assert {run.how for run in network.runs(images)} == {"dense by torch"}
    torch.testing.assert_close(network(images), model(images).detach(), rtol=1e-4, atol=1e-5)
    other = torch.randn(2, 3, 8, 8)
    assert {run.how for run in network.runs(other)} == {"direct"}
    torch.testing.assert_close(network(other), model(other).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ArgumentError, match="'auto' or 'torch'"):
        prepare(model, images, dense="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_other_programs_run_a_network_where_they_are_faster(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name)
    pytest.importorskip("onnx")
    seconds = {"sparse": [1.0], "torch": [0.8], name: [0.1]}
    monkeypatch.setattr(
        "ip_plugin.sparse.dense.side_by_side", lambda calls, **_: {who: seconds.get(who, [0.5]) for who in calls}
    )
    model, images = Between(nn.ReLU()).eval().requires_grad_(False), torch.randn(1, 3, 9, 9)
    dense = faster_dense(model, model, Structure.of((images,), {})[0], (images,), 1e-3)
    assert dense is not None and dense.name == name
    torch.testing.assert_close(dense.run((images,))[0], model(images), rtol=1e-4, atol=1e-5)


def test_nothing_else_is_tried_where_torch_is_far_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def timed(calls: dict[str, object], **_: object) -> dict[str, list[float]]:
        asked.append(set(calls))
        return {"sparse": [1.0], "torch": [4.0]}

    monkeypatch.setattr("ip_plugin.sparse.dense.side_by_side", timed)
    assert prepare(pruned(Between(nn.ReLU())), torch.randn(1, 3, 9, 9)).dense is None
    assert asked == [{"sparse", "torch"}]


@pytest.mark.parametrize(
    ("layer", "policy", "remedy"), [("workqueue", "", "libgomp1"), ("omp", "PASSIVE", "unset it"), ("omp", "", "")]
)
def test_slow_threads_are_warned_of(layer: str, policy: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ip_plugin.sparse.threads._layer", lambda: layer)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_slow_threads(stacklevel=1)
    assert [remedy in str(warning.message) for warning in caught] == ([True] if remedy else [])
