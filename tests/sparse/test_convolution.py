"""Sparse convolutions against torch's dense ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("numba")

from ip_plugin.sparse.activation import NONE, Activation
from ip_plugin.sparse.addressing import Addressing, Window
from ip_plugin.sparse.coefficients import Coefficients
from ip_plugin.sparse.images import Images, Packing
from ip_plugin.sparse.layout import Layout
from ip_plugin.sparse.loops import Choice, Loop

pairs = st.tuples(st.integers(0, 2), st.integers(0, 2))


def run(
    images: Tensor, coefficients: Tensor, basis: Tensor | None, bias: Tensor, window: Window, groups: int,
    choice: Choice, gap: tuple[int, int] = (0, 0), activation: Activation = NONE,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Layout]:  # fmt: skip
    """The output of a sparse convolution, the buffer that it is in, and the layout."""
    addressing = Addressing.new(window, len(images), *images.shape[2:], gap)
    entries = Coefficients.of(coefficients.numpy(), groups, None if basis is None else basis.numpy())
    loop = Loop(entries, bias.numpy(), addressing, choice, activation)
    source = addressing.source.empty(images.shape[1])
    target = addressing.target.empty(len(coefficients))
    target[:] = math.nan
    source[:] = math.nan
    Packing.to_read(addressing).pack(Images.of(images), source)
    added = None
    if residual is not None:
        added = np.full_like(target, math.nan)
        Packing.whole(addressing.target).pack(Images.of(residual), added)
    loop.bind(source, target, added, np.full(loop.scratch_shape, math.nan, np.float32))()
    return addressing.target.view(target, len(coefficients)), torch.from_numpy(target), addressing.target


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (3, 3), (5, 5), (1, 3), (2, 2), (7, 7)]))
    return {
        "window": Window(
            kernel, draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2), (3, 2)])), draw(pairs),
            draw(st.sampled_from([(1, 1), (2, 1)])),
        ),
        "groups": draw(st.integers(1, 3)), "inputs": draw(st.integers(1, 4)), "outputs": draw(st.integers(1, 5)),
        "images": draw(st.integers(1, 3)), "size": (draw(st.integers(1, 17)), draw(st.integers(1, 17))),
        "density": draw(st.sampled_from([0, 0.02, 0.3, 1])), "interspace": draw(st.booleans()),
        "choice": Choice(
            draw(st.sampled_from(["direct", "columns", "fused", "winograd"])), draw(st.sampled_from([32, 64, 128])),
            draw(st.integers(1, 4)), draw(st.sampled_from([500, 40_000])),
            draw(st.sampled_from([torch.float32, torch.bfloat16])),
        ),
        "gap": draw(pairs), "seed": draw(st.integers(0, 99)), "residual": draw(st.booleans()),
        "memory": draw(st.sampled_from(["as usual", "channels last", "sliced"])),
    }  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(case=cases())
def test_a_sparse_convolution_equals_torchs(case: dict) -> None:  # type: ignore[type-arg]
    window, groups, (height, width) = case["window"], case["groups"], case["size"]
    if case["choice"].order == "winograd":
        window, groups = Window((3, 3), padding=(1, 1)), 1
    assume(min(window.output_size(height, width)) >= 1)
    generator = torch.Generator().manual_seed(case["seed"])
    taps = math.prod(window.kernel)
    coefficients = torch.randn(case["outputs"] * groups, case["inputs"], taps, generator=generator)
    coefficients *= torch.rand(coefficients.shape, generator=generator) < case["density"]
    basis = torch.randn(taps, taps, generator=generator) / taps**0.5 if case["interspace"] else None
    choice = case["choice"]
    if choice.order == "winograd":
        choice = choice._replace(width=choice.width // 8)
    elif basis is not None:
        choice = choice._replace(order="fused")
    gap = case["gap"]
    if choice.order == "columns":
        gap = aligned_gap(window, case["images"], case["size"], choice.width)
        assume(gap is not None)
    images = torch.randn(case["images"], case["inputs"] * groups, height, width, generator=generator)
    if case["memory"] == "channels last":
        images = images.to(memory_format=torch.channels_last)
    elif case["memory"] == "sliced":
        images = F.pad(images, (1, 2, 2, 1), value=math.nan)[:, :, 2:-1, 1:-2]
    bias = torch.randn(len(coefficients), generator=generator)
    kernels = (coefficients if basis is None else coefficients @ basis).unflatten(2, window.kernel).double()
    expected = F.conv2d(images.double(), kernels, bias.double(), *window[1:], groups)
    residual = torch.randn(expected.shape, generator=generator) if case["residual"] else None
    expected = expected if residual is None else expected + residual

    got, buffer, layout = run(
        images, coefficients, basis, bias, window, groups, choice, gap, Activation(0, -0.5, 2.0), residual
    )

    largest = float(expected.abs().max())
    expected = expected.clamp(-0.5, 2.0)
    allowed = 1e-5 + 1e-4 * expected.abs()
    if choice.order == "winograd":  # rounds sums of what cancels later
        allowed += 1e-5 * largest
    if choice.order == "fused" and choice.response_dtype == torch.bfloat16 and basis is not None:
        # half a unit of bfloat16 in the last place of every response
        filters = basis.unflatten(1, window.kernel).unsqueeze(1)
        responses = F.conv2d(images, filters.repeat(images.shape[1], 1, 1, 1), None, *window[1:], images.shape[1])
        allowed += 2**-8 * F.conv2d(responses.abs(), coefficients.abs().flatten(1)[..., None, None], groups=groups)
    assert ((got - expected).abs() <= allowed).all()
    outside = torch.ones(layout.pixels, dtype=torch.bool)
    inside = torch.arange(layout.pixels).as_strided(
        (layout.images, layout.height, layout.width), (layout.rows * layout.pitch, layout.pitch, 1)
    )
    outside[inside.reshape(-1)] = False
    for channel in range(len(coefficients)):
        begin = layout.first + channel * layout.stride
        assert (buffer[begin : begin + layout.pixels][outside] == 0).all()
        assert (buffer[begin - layout.reach : begin] == 0).all()
        assert (buffer[begin + layout.pixels :][: layout.reach] == 0).all()


def aligned_gap(window: Window, images: int, size: tuple[int, int], width: int) -> tuple[int, int] | None:
    """A gap with which tiles of a width consist of whole rows; None if there is none."""
    for pitch in (8, 16, 32, 64, 128):
        height, columns = window.output_size(*size)
        gap = 8 - height if pitch == 8 else 1, pitch - columns
        if min(gap) >= 0:
            addressing = Addressing.new(window, images, *size, gap)
            if addressing.target.pitch == pitch and addressing.can_align(width):
                return gap
    return None


@pytest.mark.parametrize("interspace", [False, True], ids=["spatial", "interspace"])
@pytest.mark.parametrize("parts", [1, 3])
def test_many_chunks_of_few_entries(interspace: bool, parts: int) -> None:
    coefficients = torch.randn(12, 20, 9) * (torch.rand(12, 20, 9) < 0.05)
    basis = torch.randn(9, 9) if interspace else None
    images, bias, window = torch.randn(1, 20, 7, 7), torch.randn(12), Window((3, 3), padding=(1, 1))
    got, _, _ = run(images, coefficients, basis, bias, window, 1, Choice("fused", 32, parts, 500))
    kernels = (coefficients if basis is None else coefficients @ basis).unflatten(2, (3, 3))
    torch.testing.assert_close(got, F.conv2d(images, kernels, bias, padding=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interspace", [False, True], ids=["spatial", "interspace"])
@pytest.mark.parametrize(
    "choice", [Choice("fused", 64, 2, 2000), Choice("winograd", 16, 2)], ids=lambda choice: choice.order
)
def test_results_do_not_depend_on_the_number_of_threads(interspace: bool, choice: Choice) -> None:
    import numba

    coefficients = torch.randn(24, 16, 9) * (torch.rand(24, 16, 9) < 0.2)
    basis = torch.randn(9, 9) if interspace else None
    images, bias, window = torch.randn(2, 16, 20, 20), torch.randn(24), Window((3, 3), padding=(1, 1))
    outputs = []
    before = numba.get_num_threads()
    try:
        for threads in (1, 2):
            numba.set_num_threads(min(threads, before))
            outputs.append(run(images, coefficients, basis, bias, window, 1, choice)[0].clone())
    finally:
        numba.set_num_threads(before)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("size", [(5, 5), (8, 4), (3, 10), (4, 17)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_stay_in_the_winograd_tiles_that_read_them(value: float, size: tuple[int, int]) -> None:
    kernels, window, choice = torch.randn(1, 1, 9), Window((3, 3), padding=(1, 1)), Choice("winograd", 16)
    images = torch.randn(2, 1, *size)
    expected = F.conv2d(images, kernels.unflatten(2, (3, 3)), padding=1)
    rows, columns = (torch.arange(length) // 4 * 4 for length in size)  # where the tiles begin
    for number, _, y, x in torch.ones(2, 1, *size).nonzero().tolist():
        broken = images.clone()
        broken[number, 0, y, x] = value
        got, _, _ = run(broken, kernels, None, torch.zeros(1), window, 1, choice)
        reads_row, reads_column = ((begin - 1 <= at) & (at <= begin + 4) for begin, at in ((rows, y), (columns, x)))
        outside = torch.ones(2, 1, *size, dtype=torch.bool)
        outside[number, 0] = ~(reads_row[:, None] & reads_column)
        torch.testing.assert_close(got[outside], expected[outside], rtol=1e-4, atol=1e-5)
        assert not got[number, 0, y, x].isfinite()


def test_nan_goes_through_a_clamp_as_it_does_in_torch() -> None:
    images = torch.tensor([math.nan, -1.0, 3.0, 9.0]).reshape(1, 1, 1, 4)
    got, _, _ = run(
        images,
        torch.ones(1, 1, 1),
        None,
        torch.zeros(1),
        Window((1, 1)),
        1,
        Choice("direct", 32),
        activation=Activation(0, 0.0, 6.0),
    )
    torch.testing.assert_close(got, images.clamp(0, 6), equal_nan=True)


def test_pixels_of_all_images_are_inside_and_no_others() -> None:
    layout = Layout(images=2, height=2, width=3, rows=3, pitch=4, reach=5)
    assert layout.pixels == 19
    bits = np.unpackbits(layout.inside(), bitorder="little")
    assert bits[:24].tolist() == [1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert not bits[24:].any()
    without_gaps = np.unpackbits(Layout(2, 2, 3, 2, 3, 0).inside(), bitorder="little")
    assert without_gaps[:12].all() and not without_gaps[12:].any()


@pytest.mark.parametrize("tiles", [32, 128])
def test_there_are_zeros_before_the_first_pixel_and_after_the_last(tiles: int) -> None:
    layout = Layout(images=1, height=2, width=15, rows=3, pitch=16, reach=17)
    assert layout.pixels == 31
    assert layout.zeros_around(tiles) == (32, 16 if tiles == 32 else 0)  # to 48 at least, where the reach ends
    buffer = layout.empty(2)
    assert len(buffer) == layout.size(2) >= layout.first + layout.stride + layout.pixels + 128 + layout.reach
    assert layout.first + layout.pixels + 128 + layout.reach <= layout.stride


def test_coefficients_compose_to_the_kernels_that_they_came_from() -> None:
    coefficients, basis = torch.randn(6, 2, 9) * (torch.rand(6, 2, 9) < 0.4), torch.randn(9, 9)
    entries = Coefficients.of(coefficients.numpy(), 3, basis.numpy())
    torch.testing.assert_close(torch.from_numpy(entries.kernels(6, 3, 9)), coefficients @ basis)
    assert set(zip(entries.outputs.tolist(), entries.inputs.tolist(), strict=True)) == {
        (o, 2 * (o // 2) + i) for o, i, n in coefficients.nonzero().tolist()
    }


@example(height=5, width=5, padding=1)
@given(height=st.integers(3, 9), width=st.integers(3, 9), padding=st.integers(0, 2))
def test_consecutive_layers_share_a_layout(height: int, width: int, padding: int) -> None:
    window, same = Window((3, 3), padding=(padding, padding)), Window((3, 3), padding=(1, 1))
    layout = Addressing.new(window, 2, height, width, gap=(1, 1)).target
    second = Addressing.existing(same, layout)
    assert second is not None
    assert second.source is layout
    assert Addressing.existing(Window((7, 7), padding=(3, 3)), layout) is None  # not enough zeros
    for tight in (layout._replace(rows=layout.height), layout._replace(pitch=layout.width)):
        assert Addressing.existing(same, tight) is None
    assert Addressing.existing(Window((3, 3), (2, 2), (1, 1)), layout) is None
