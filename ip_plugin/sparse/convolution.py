"""One convolution on buffers: where it reads, what it makes, and the loops that run it."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from . import kernels, plan, winograd
from .layout import Floats, Layout, aligned
from .plan import Choice, Entries, Ints, Plan
from .vectors import lanes

_NOTHING = np.empty(0, np.float32)


class Window(NamedTuple):
    """What a convolution looks at, as torch names it; two numbers each, rows first."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def outputs(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what it makes."""
        made = [
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip((height, width), *self, strict=True)
        ]
        return made[0], made[1]

    def taps(self) -> Ints:
        """Row and column of each tap, from the first one."""
        found: Ints = np.argwhere(np.ones(self.kernel)) * np.array(self.dilation)
        return found

    @property
    def steps(self) -> bool:
        """Whether the stride is not 1, so that the input is dealt out into phases: every n-th row and column."""
        return self.stride != (1, 1)


class Places(NamedTuple):
    """Layouts of input and output, and where the taps are.

    Attributes:
        source: of the input; of one phase, where the stride is not 1.
        target: of the output.
        offsets: of taps, from the pixel of the output.
        phases: what of a channel of the input is read: remainders of padded rows and columns. Each is stored like a
            channel, one after the other.
    """

    source: Layout
    target: Layout
    offsets: Ints
    phases: tuple[tuple[int, int], ...]


def places(
    window: Window, images: int, height: int, width: int, gap: tuple[int, int] = (0, 0), source: Layout | None = None
) -> Places | None:
    """Lay out input and output so that one pixel of either has the same place.

    Args:
        window: of the convolution.
        images, height, width: of the input.
        gap: how many rows and columns of zeros what comes after needs.
        source: where the input lies already.

    Returns:
        Layouts and taps; None if `source` has too few zeros, or the stride is not 1.
    """
    out_height, out_width = window.outputs(height, width)
    taps = window.taps()
    phases: tuple[tuple[int, int], ...] = ((0, 0),)
    phase = np.zeros(len(taps), np.int64)
    if not window.steps:
        rows = max(height + max(window.padding[0], gap[0]), out_height + gap[0])
        pitch = max(width + max(window.padding[1], gap[1]), out_width + gap[1])
        shifts = taps - np.array(window.padding)
        if source is not None:
            if source.rows < rows or source.pitch < pitch:
                return None
            rows, pitch = source.rows, source.pitch
    else:
        if source is not None:
            return None
        shifts = taps // np.array(window.stride)
        remainders = [(int(y), int(x)) for y, x in taps % np.array(window.stride)]
        phases = tuple(sorted(set(remainders)))
        phase = np.array([phases.index(each) for each in remainders])
        height, width = out_height + int(shifts[:, 0].max()), out_width + int(shifts[:, 1].max())
        rows, pitch = max(height, out_height + gap[0]), max(width, out_width + gap[1])
    far = shifts @ np.array([pitch, 1])
    reach = int(max(np.abs(far).max(), gap[0] * pitch + gap[1]))
    if source is None:
        source = Layout(images, height, width, rows, pitch, reach)
    elif source.reach < reach:
        return None
    target = Layout(images, out_height, out_width, rows, pitch, source.reach)
    return Places(source, target, far + phase * source.stride, phases)


def beside(window: Window, height: int, width: int, dealt: Window, where: Places) -> Places | None:
    """Places of a convolution that reads phases which were dealt out for another one, from the same input.

    Args:
        window: of the convolution.
        height, width: of the input.
        dealt, where: of the other one.

    Returns:
        None if they differ in stride or in the size of the output, or something else is read.
    """
    moved = window.taps() + np.array(dealt.padding) - np.array(window.padding)
    shifts, remainders = moved // np.array(dealt.stride), moved % np.array(dealt.stride)
    source, made = where.source, window.outputs(height, width)
    ends = shifts.max(0) + made
    found = [where.phases.index(each) for each in map(tuple, remainders.tolist()) if each in where.phases]
    if window.stride != dealt.stride or made != (where.target.height, where.target.width):
        return None
    if len(found) < len(moved) or shifts.min() < 0 or (ends > (source.height, source.width)).any():
        return None
    return where._replace(offsets=shifts @ np.array([source.pitch, 1]) + np.array(found) * source.stride)


class LoopedConvolution(ABC):
    """A convolution that is run by a loop of our own, on buffers; `looped` makes it.

    Args:
        entries: its coefficients.
        bias: of output channels.
        where: layouts, and taps.
        choice: how it is run.
        limits: what results are clamped to.
    """

    def __init__(
        self, entries: Entries, bias: Floats, where: Places, choice: Choice, limits: tuple[float, float]
    ) -> None:
        self.bias, self.where, self.choice = bias, where, choice
        self.limits = np.float32(limits[0]), np.float32(limits[1])
        self.plan: Plan = plan.make(entries, where.offsets, where.source.stride * len(where.phases), choice)
        self._residual = (where.target.first, where.target.stride)

    def scratch(self) -> Floats:
        """Memory for one call at a time."""
        rows, columns = self.scratch_shape()
        return aligned(rows * columns).reshape(rows, columns)

    @abstractmethod
    def scratch_shape(self) -> tuple[int, int]:
        """Of what a call needs to work with, float32; not to be used by two calls at once."""

    @abstractmethod
    def __call__(self, source: Floats, target: Floats, scratch: Floats, residual: Floats | None = None) -> None:
        """Read one buffer, write the other."""

    def _added(self, residual: Floats | None) -> tuple[Floats, int, int]:
        """The residual, its first pixel and the distance of its channels, which is 0 where there is none."""
        return (_NOTHING, 0, 0) if residual is None else (residual, *self._residual)


def looped(
    entries: Entries, bias: Floats, where: Places, choice: Choice,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> LoopedConvolution:  # fmt: skip
    """A convolution that is run as it was chosen; arguments as of `LoopedConvolution`."""
    kind = _AtPoints if choice.order == "winograd" else _ByNonzeros
    return kind(entries, bias, where, choice, limits)


class _ByNonzeros(LoopedConvolution):
    """The loops of `kernels`."""

    def __init__(
        self, entries: Entries, bias: Floats, where: Places, choice: Choice, limits: tuple[float, float]
    ) -> None:
        super().__init__(entries, bias, where, choice, limits)
        self._first = where.source.first
        target = where.target
        tiles = -(-target.pixels // choice.width)
        self._head = (lanes(choice.width), tiles, choice.parts, *self.plan.arrays, self.bias, target.stored())
        self._to = (target.first, target.stride, *target.around(tiles * choice.width))

    def scratch_shape(self) -> tuple[int, int]:
        if self.choice.order == "direct":
            return 0, 0
        size = self.plan.responses * self.choice.response + len(self.bias) * self.choice.width
        return numba.config.NUMBA_NUM_THREADS, size

    def __call__(self, source: Floats, target: Floats, scratch: Floats, residual: Floats | None = None) -> None:
        common = (source, self._first, *self._added(residual), *self.limits, target, *self._to)
        if self.choice.order == "direct":
            kernels.direct(*self._head, *common)
        else:
            kernels.fused(*self._head, *common, scratch, self.plan.responses)


class _AtPoints(LoopedConvolution):
    """The loop of `winograd`."""

    def __init__(
        self, entries: Entries, bias: Floats, where: Places, choice: Choice, limits: tuple[float, float]
    ) -> None:
        super().__init__(entries, bias, where, choice, limits)
        across = -(-where.target.width // winograd.TILE)
        rows = max(1, choice.width // across)
        self._tiles = -(-rows * across // 16) * 16
        read, made = where.source, where.target
        self._head = (
            rows, self._tiles, choice.parts, *self.plan.arrays, self.bias,
            *winograd.borders(self._tiles, across), made.images, made.height, made.width,
        )  # fmt: skip
        self._from = _distances(read)
        self._to = (made.first, made.stride, made.reach)

    def scratch_shape(self) -> tuple[int, int]:
        return numba.config.NUMBA_NUM_THREADS, winograd.memory(len(self.plan.arrays[0]), self._tiles)

    def __call__(self, source: Floats, target: Floats, scratch: Floats, residual: Floats | None = None) -> None:
        added = self._added(residual)
        winograd.winograd(*self._head, source, *self._from, *added, *self.limits, target, *self._to, scratch)


@functools.lru_cache(maxsize=1024)
def _distances(layout: Layout) -> tuple[int, int, int, int]:
    """Where the first pixel is, and how far channels, images and rows lie apart."""
    return layout.first, layout.stride, layout.rows * layout.pitch, layout.pitch


def pool(window: Window, source: Layout, channels: int, target: Layout, read: Floats, write: Floats) -> None:
    """Max pooling from one buffer into another."""
    span = max(source.width, (target.width - 1) * window.stride[1] + 1)
    length = span + 2 * window.padding[1] + window.kernel[1] * window.dilation[1] + 64
    kernels.largest(
        source.images, channels, source.height, source.width, *window[:4],
        read, *_distances(source), target.height, target.width, write, *_distances(target),
        np.empty((2 * numba.config.NUMBA_NUM_THREADS, length), np.float32),
    )  # fmt: skip


def mean(source: Layout, channels: int, read: Floats) -> Tensor:
    """Averages of all pixels, ``(images, channels, 1, 1)``."""
    made = torch.empty(source.images, channels, 1, 1)
    length = (source.height - 1) * source.pitch + source.width
    kernels.mean(
        source.images, channels, length, source.height * source.width, read, *_distances(source)[:3],
        made.numpy().reshape(-1),
    )  # fmt: skip
    return made


class Images(NamedTuple):
    """Where images lie.

    Attributes:
        flat: begins with the first pixel.
        shape, strides: ``(images, channels, height, width)``, and their distances.
    """

    flat: Floats
    shape: torch.Size
    strides: tuple[int, ...]

    @classmethod
    def of(cls, images: Tensor) -> Images:
        """Of a tensor, without a copy."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(images.shape, images.stride(), strict=True))
        return cls(images.detach().as_strided((extent,), (1,)).numpy(), images.shape, images.stride())


def pack(images: Images, where: Places, window: Window, buffer: Floats) -> None:
    """Copy images into a buffer, by phases where the stride is not 1."""
    if window.steps:
        _deal(images, where.source, buffer, window.stride, _parts(images.shape, where.source, where.phases, window))
    else:
        copy(images, where.source, buffer)


def copy(images: Images, layout: Layout, buffer: Floats) -> None:
    """Copy images into a buffer, with zeros around them."""
    _deal(images, layout, buffer, (1, 1), np.array([(0, 0, 0, 0, *images.shape[2:])]))


@functools.lru_cache(maxsize=1024)
def _parts(shape: torch.Size, source: Layout, phases: tuple[tuple[int, int], ...], window: Window) -> Ints:
    """For each phase the first row and column of the images, where they go, and how many there are."""
    parts = []
    (down, right), (top, left) = window.stride, window.padding
    for y, x in phases:
        row, column = (y - top) % down, (x - left) % right
        at_row, at_column = (row + top - y) // down, (column + left - x) // right
        rows = min(-(-(shape[2] - row) // down), source.height - at_row)
        columns = min(-(-(shape[3] - column) // right), source.width - at_column)
        parts.append((row, column, at_row, at_column, max(0, rows), max(0, columns)))
    return np.array(parts)


def _deal(images: Images, layout: Layout, buffer: Floats, steps: tuple[int, int], parts: Ints) -> None:
    count, channels = images.shape[:2]
    kernels.deal(
        count, channels, parts, images.flat, *images.strides, *steps, buffer, *_distances(layout),
    )  # fmt: skip
