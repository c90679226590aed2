"""One sparse convolution: where it reads, what it makes, and how it is run fastest."""

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np
from torch import Tensor

from . import kernels, plan
from .layout import Floats, Layout, aligned
from .plan import Choice, Entries, Ints, Plan
from .vectors import lanes


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

    @property
    def phases(self) -> int:
        """Into how many images of every n-th row and column the input is dealt out."""
        return math.prod(self.stride)


class Places(NamedTuple):
    """Layouts of input and output, and where the taps are.

    Attributes:
        source: of the input; of one phase, where the stride is not 1.
        target: of the output.
        offsets: of taps, from the pixel of the output.
        phases: how many images of the source belong to one channel of the input.
    """

    source: Layout
    target: Layout
    offsets: Ints
    phases: int


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
    grid = np.meshgrid(np.arange(window.kernel[0]), np.arange(window.kernel[1]), indexing="ij")
    taps = np.stack(grid, -1).reshape(-1, 2) * np.array(window.dilation)
    if window.phases == 1:
        rows = max(height + max(window.padding[0], gap[0]), out_height + gap[0])
        pitch = max(width + max(window.padding[1], gap[1]), out_width + gap[1])
        shifts, phase = taps - np.array(window.padding), np.zeros(len(taps), np.int64)
        if source is not None:
            if source.rows < rows or source.pitch < pitch:
                return None
            rows, pitch = source.rows, source.pitch
    else:
        if source is not None:
            return None
        shifts = taps // np.array(window.stride)
        phase = taps % np.array(window.stride) @ np.array([window.stride[1], 1])
        height, width = out_height + int(shifts[:, 0].max()), out_width + int(shifts[:, 1].max())
        rows, pitch = max(height, out_height + gap[0]), max(width, out_width + gap[1])
    far = shifts @ np.array([pitch, 1])
    reach = int(max(np.abs(far).max(), gap[0] * pitch + gap[1]))
    if source is None:
        source = Layout(images, height, width, rows, pitch, reach)
    elif source.reach < reach:
        return None
    target = Layout(images, out_height, out_width, rows, pitch, source.reach)
    return Places(source, target, far + phase * source.stride, window.phases)


class SparseConvolution:
    """A convolution that is run by its non-zero coefficients, on buffers.

    Args:
        entries: its coefficients.
        bias: of output channels.
        where: layouts, and taps.
        choice: how it is run.
        limits: what results are clamped to.
    """

    def __init__(
        self, entries: Entries, bias: Floats, where: Places, choice: Choice,
        limits: tuple[float, float] = (-math.inf, math.inf),
    ) -> None:  # fmt: skip
        self.entries, self.bias, self.where, self.choice = entries, bias, where, choice
        self.limits = np.float32(limits[0]), np.float32(limits[1])
        self.plan: Plan = plan.make(entries, where.offsets, where.source.stride * where.phases, choice)
        self._bits = where.target.stored()
        self._tiles = -(-where.target.pixels // choice.width)
        self._nothing = np.empty(0, np.float32)

    def scratch(self) -> Floats:
        """Memory for one call at a time."""
        rows, columns = self.scratch_shape()
        return aligned(rows * columns).reshape(rows, columns)

    def scratch_shape(self) -> tuple[int, int]:
        """Of what a call needs to work with, float32; not to be used by two calls at once."""
        if self.choice.order == "direct":
            return 0, 0
        size = (self.plan.responses + self.entries.channels) * self.choice.width
        return numba.config.NUMBA_NUM_THREADS, size

    def __call__(self, source: Floats, target: Floats, scratch: Floats, residual: Floats | None = None) -> None:
        """Read one buffer, write the other."""
        layout = self.where.target
        added = (self._nothing, 0, 0) if residual is None else (residual, layout.first, layout.stride)
        read = (self.bias, self._bits, source, self.where.source.first, *added)
        common = (*read, *self.limits, target, layout.first, layout.stride)
        head = (lanes(self.choice.width), self._tiles, self.choice.parts, *self.plan.arrays)
        if self.choice.order == "direct":
            kernels.direct(*head, *common)
        else:
            kernels.fused(*head, *common, scratch, self.plan.responses)


def pack(images: Tensor, where: Places, window: Window, buffer: Floats) -> None:
    """Copy images ``(images, channels, height, width)`` into a buffer of zeros, by phases where the stride is not 1."""
    channels = images.shape[1]
    if where.phases == 1:
        where.source.view(buffer, channels).copy_(images)
        return
    source, (down, right), (top, left) = where.source, window.stride, window.padding
    for y in range(down):
        for x in range(right):
            view = source.view(buffer, channels * where.phases)[:, y * right + x :: where.phases]
            # first row and column of the images that are of this phase, and where they go
            row, column = (y - top) % down, (x - left) % right
            part = images[:, :, row::down, column::right]
            at_row, at_column = (row + top - y) // down, (column + left - x) // right
            part = part[:, :, : source.height - at_row, : source.width - at_column]
            view[:, :, at_row : at_row + part.shape[2], at_column : at_column + part.shape[3]].copy_(part)
