"""A convolution on buffers, by one of the compiled loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numba
import numpy as np
import torch

from .activation import NONE, Activation
from .addressing import Addressing
from .coefficients import Coefficients, arrange
from .kernels import nonzero, winograd
from .kernels.vectors import lanes
from .layout import Floats, Ints, aligned

_NOTHING = np.empty(0, np.float32)


class Choice(NamedTuple):
    """How a convolution is run.

    Attributes:
        order: ``"direct"``: every non-zero reads its input; ``"columns"``: likewise, with a sum for each column of the
            kernels; ``"fused"``: basis-filter responses first, then their products with the coefficients;
            ``"winograd"``: dense, by minimal filtering.
        width: pixels of a tile; for Winograd, tiles at a time.
        parts: number of parts that the output channels are divided into, for threads.
        budget: bytes of responses at a time.
        response_dtype: dtype in which basis-filter responses are stored: float32 or bfloat16.
        others: ways that took about as long when the layer was timed alone.
    """

    order: Literal["direct", "columns", "fused", "winograd"]
    width: int
    parts: int = 1
    budget: int = 80_000
    response_dtype: torch.dtype = torch.float32
    others: tuple[Choice, ...] = ()


class _Kernel(NamedTuple):
    """A compiled loop and its arguments: sizes, coefficients and their positions, the rest, and where pixels are."""

    function: Callable[..., Any]
    sizes: tuple[Any, ...]
    arrays: tuple[Any, ...]
    rest: tuple[Any, ...]
    source: tuple[int, ...]
    target: tuple[int, ...]
    scratch_size: int = 0


class Loop:
    """A convolution, with its coefficients laid out for one of the compiled loops; with an activation.

    Args:
        scaled: for `bind_scaled`.

    Attributes:
        scratch_shape: of the float32 working memory of a call: a row for each thread.
        bytes: memory that coefficients and positions take.
    """

    def __init__(
        self, coefficients: Coefficients, bias: Floats, addressing: Addressing, choice: Choice,
        activation: Activation = NONE, scaled: bool = False,
    ) -> None:  # fmt: skip
        self._target, self._activation = addressing.target, activation.arguments
        build = partial(_KERNELS[choice.order], bias=bias, addressing=addressing, choice=choice)
        self._kernel = build(coefficients)
        self._inputs = np.empty(0, np.uint16)
        if scaled:  # as if they were the coefficients
            inputs = build(coefficients._replace(values=coefficients.inputs.astype(np.float32))).arrays[-1]
            self._inputs = inputs.astype(np.uint16)
        arrays = (self._inputs, *self._kernel.arrays)
        self.bytes = sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
        self.scratch_shape = numba.config.NUMBA_NUM_THREADS, self._kernel.scratch_size

    def bind(
        self, source: Floats, target: Floats, residual: Floats | None = None, scratch: Floats | None = None
    ) -> Callable[[], Any]:
        """A function that reads one buffer and writes another; no two calls at once must use the same scratch."""
        return self._bound(self._kernel.arrays, source, target, residual, scratch)

    def bind_scaled(
        self, source: Floats, target: Floats, residual: Floats | None = None, scratch: Floats | None = None
    ) -> Callable[[Floats], Any]:
        """Likewise, of a function that gets a number for each input channel, which the input is multiplied with."""
        *arrays, values = self._kernel.arrays
        inputs, scaled = self._inputs, np.empty_like(values)
        call = self._bound((*arrays, scaled), source, target, residual, scratch)

        def run(scales: Floats) -> None:
            nonzero.scale(values, inputs, scales, scaled)
            call()

        return run

    def _bound(
        self, arrays: tuple[Any, ...], source: Floats, target: Floats, residual: Floats | None, scratch: Floats | None
    ) -> Callable[[], Any]:
        kernel, layout = self._kernel, self._target
        added = (_NOTHING, 0, 0) if residual is None else (residual, layout.first, layout.stride)
        if scratch is None:
            scratch = aligned(math.prod(self.scratch_shape)).reshape(self.scratch_shape)
        return partial(
            kernel.function, *kernel.sizes, *arrays, *kernel.rest, source, *kernel.source, *added,
            *self._activation, target, *kernel.target, *((scratch,) if scratch.size else ()),
        )  # fmt: skip


def parts_of(coefficients: Coefficients, count: int) -> Ints:
    """First output channel of each part, and the end: parts of about equally many coefficients and channels."""
    work = np.bincount(coefficients.outputs, minlength=coefficients.channels) + 1
    done = np.append(0, work.cumsum())
    bounds = np.searchsorted(done, np.linspace(0, done[-1], count + 1))
    return bounds.clip(0, coefficients.channels)


def _direct(coefficients: Coefficients, bias: Floats, addressing: Addressing, choice: Choice) -> _Kernel:
    """Every non-zero reads its shifted input."""
    lengths = np.bincount(coefficients.outputs, minlength=coefficients.channels)
    positions = coefficients.inputs.astype(np.int64) * addressing.source.stride
    arrays = (
        parts_of(coefficients, choice.parts),
        np.append(0, lengths.cumsum()).astype(np.uint32),
        (positions + addressing.offsets[coefficients.filters]).astype(np.int32),
        coefficients.values,
    )
    return _by_nonzeros(nonzero.direct, arrays, bias, addressing, choice)


def _columns(coefficients: Coefficients, bias: Floats, addressing: Addressing, choice: Choice) -> _Kernel:
    """Every non-zero reads its input where that is aligned, into the sum of its column of the kernel."""
    offsets, moves = addressing.aligned()
    moves, number = np.unique(moves, axis=0, return_inverse=True)
    sums = coefficients.outputs.astype(np.int64) * len(moves) + number.reshape(-1)[coefficients.filters]
    order = np.argsort(sums, kind="stable")
    positions = coefficients.inputs.astype(np.int64) * addressing.source.stride + offsets[coefficients.filters]
    arrays = (
        parts_of(coefficients, choice.parts),
        np.append(0, np.bincount(sums, minlength=coefficients.channels * len(moves)).cumsum()).astype(np.uint32),
        *np.ascontiguousarray(moves.T),
        positions[order].astype(np.int32),
        coefficients.values[order],
    )
    return _by_nonzeros(nonzero.columns, arrays, bias, addressing, choice)


def _fused(coefficients: Coefficients, bias: Floats, addressing: Addressing, choice: Choice) -> _Kernel:
    """Basis-filter responses first, then their products with the coefficients."""
    basis, taps = coefficients.basis, len(addressing.offsets)
    # responses to the standard basis are the input itself, and stay exact
    bfloat16 = choice.response_dtype == torch.bfloat16 and basis is not None
    size = choice.width // 2 if bfloat16 else choice.width
    most = max(taps, choice.budget // (4 * size))
    count, begin, used, rows = arrange(coefficients, parts_of(coefficients, choice.parts), taps, most)
    responses = max(1, int(np.diff(begin).max()))
    arrays = (
        responses,
        (0,) if bfloat16 else (),
        count,
        begin.astype(np.int32),
        (used // taps * addressing.source.stride).astype(np.int32),
        (used % taps).astype(np.uint8),
        addressing.offsets,
        _NOTHING if basis is None else np.ascontiguousarray(basis).reshape(-1),
        *rows,
    )
    scratch = responses * size + len(bias) * choice.width
    return _by_nonzeros(nonzero.fused, arrays, bias, addressing, choice, scratch)


def _by_nonzeros(
    function: Callable[..., Any], arrays: tuple[Any, ...], bias: Floats, addressing: Addressing, choice: Choice,
    scratch_size: int = 0,
) -> _Kernel:  # fmt: skip
    layout, width = addressing.target, choice.width
    tiles = -(-layout.pixels // width)
    sizes, rest = (lanes(width), tiles, choice.parts), (bias, addressing.inside)
    target = (layout.first, layout.stride, *layout.zeros_around(tiles * width))
    return _Kernel(function, sizes, arrays, rest, (addressing.source.first,), target, scratch_size)


def _winograd(coefficients: Coefficients, bias: Floats, addressing: Addressing, choice: Choice) -> _Kernel:
    """Dense 3x3 kernels, by Winograd's minimal filtering."""
    layout, used = addressing.target, np.unique(coefficients.inputs)
    across = -(-layout.width // winograd.TILE)
    rows = max(1, choice.width // across)
    tiles = -(-rows * across // 16) * 16
    kernels = coefficients.kernels(int(used.max(initial=0)) + 1, groups=1, taps=9)
    arrays = used, winograd.filters(kernels[:, used]).reshape(-1)
    rest = (bias, *winograd.borders(tiles, across), layout.images, layout.height, layout.width)
    source, target = addressing.source.distances(), (layout.first, layout.stride, layout.reach)
    sizes, scratch_size = (rows, tiles, choice.parts), winograd.memory(len(used), tiles)
    return _Kernel(winograd.winograd, sizes, arrays, rest, source, target, scratch_size)


_KERNELS = {"direct": _direct, "columns": _columns, "fused": _fused, "winograd": _winograd}
