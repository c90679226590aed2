"""How a convolution addresses its input and output: their layouts, and where the taps of its kernel are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .layout import Bits, Ints, Layout


class Window(NamedTuple):
    """Arguments of a convolution or pooling, as torch names them; two numbers each, rows first."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
        rows, columns = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip((height, width), *self, strict=True)
        )
        return rows, columns

    def taps(self) -> Ints:
        """Row and column of each tap, relative to the first one."""
        taps: Ints = np.argwhere(np.ones(self.kernel)) * np.array(self.dilation)
        return taps

    @property
    def strided(self) -> bool:
        """Whether the stride is not 1, so that the input is split into phases: every n-th row and column."""
        return self.stride != (1, 1)


class Addressing(NamedTuple):
    """How a convolution addresses its input and output; a pixel of either is at the same offset.

    Attributes:
        size: height and width of the input.
        source: layout of the input, whose images are those of one phase after the other where it is split into phases.
        target: layout of the output.
        shifts: of taps: rows and columns from the pixel of the output, in the phase that they read.
        offsets: of taps, relative to the pixel of the output.
        stride, padding: of the convolution that the input is split into phases for.
        phases: those that are stored, as remainders of rows and columns of the padded input.
        inside: one bit for each pixel of whole tiles of the output, lowest first: whether it is stored, not zero.
    """

    size: tuple[int, int]
    source: Layout
    target: Layout
    shifts: Ints
    offsets: Ints
    stride: tuple[int, int]
    padding: tuple[int, int]
    phases: tuple[tuple[int, int], ...]
    inside: Bits

    @property
    def strided(self) -> bool:
        """Whether the input is split into phases."""
        return self.stride != (1, 1)

    @property
    def split(self) -> tuple[object, ...]:
        """What decides how an input is split into phases: equal for inputs that lie in memory alike."""
        return self.size, self.source, self.stride, self.padding, self.phases

    @classmethod
    def new(
        cls, window: Window, images: int, height: int, width: int, gap: tuple[int, int] = (0, 0), rows: int = 0,
        pitch: int = 0,
    ) -> Addressing:  # fmt: skip
        """For an input that is packed for this convolution.

        Args:
            window, images, height, width: of the convolution, and of its input.
            gap: rows and columns of zeros that the readers of the output need.
            rows, pitch: distances between images and rows, at least.
        """
        size, (out_height, out_width) = (height, width), window.output_size(height, width)
        if window.strided:
            shifts, remainders = window.taps() // window.stride, window.taps() % window.stride
            height, width = out_height + int(shifts[:, 0].max()), out_width + int(shifts[:, 1].max())
            padding = (0, 0)  # part of the phases
        else:
            shifts, remainders = window.taps() - window.padding, np.zeros_like(window.taps())
            padding = max(window.padding[0], gap[0]), max(window.padding[1], gap[1])
        phases, phase = np.unique(remainders, axis=0, return_inverse=True)
        rows = max(rows, height + padding[0], out_height + gap[0])
        pitch = max(pitch, width + padding[1], out_width + gap[1])
        offsets = shifts @ (pitch, 1)
        reach = int(max(np.abs(offsets).max(), gap[0] * pitch + gap[1]))
        source = Layout(images * len(phases), height, width, rows, pitch, reach)
        target = Layout(images, out_height, out_width, rows, pitch, reach)
        offsets += phase.reshape(-1) * images * rows * pitch
        split = tuple((y, x) for y, x in phases.tolist())
        return cls(size, source, target, shifts, offsets, window.stride, window.padding, split, target.inside())

    @classmethod
    def existing(cls, window: Window, source: Layout, gap: tuple[int, int] = (0, 0)) -> Addressing | None:
        """For an input that lies in a buffer already; None if it has too few zeros, or must be split into phases."""
        if window.strided:
            return None
        needed = cls.new(window, *source[:3], gap, source.rows, source.pitch)
        if needed.source[:5] != source[:5] or needed.source.reach > source.reach:
            return None
        return needed._replace(source=source, target=needed.target._replace(reach=source.reach))

    def shared_with(self, window: Window) -> Addressing | None:
        """For another convolution of the same input that reads its phases; None if it does not find all it needs."""
        out = window.output_size(*self.size)
        moved = window.taps() + self.padding - window.padding
        shifts, remainders = moved // self.stride, [(y, x) for y, x in (moved % self.stride).tolist()]
        if (
            window.stride != self.stride
            or out != (self.target.height, self.target.width)
            or not set(remainders) <= set(self.phases)
            or shifts.min() < 0
            or (shifts.max(0) + out > (self.source.height, self.source.width)).any()
        ):
            return None
        phase = np.array([self.phases.index(remainder) for remainder in remainders])
        images, *_, rows, pitch, _ = self.target
        offsets = shifts @ (pitch, 1) + phase * images * rows * pitch
        return self._replace(shifts=shifts, offsets=offsets)

    def can_align(self, width: int) -> bool:
        """Whether tiles of so many pixels consist of whole rows of aligned pixels, or of images of such rows of 8."""
        pitch, image = self.target.pitch, self.target.rows * self.target.pitch
        return (pitch % 16 == 0 and width % pitch == 0) or (pitch == 8 and image % 16 == 0 and width % image == 0)

    def aligned(self) -> tuple[Ints, Ints]:
        """Of taps: the aligned part of offsets, and the other part as rows of 8 pixels, and columns."""
        moves = self.shifts * (self.target.pitch == 8, 1)
        return self.offsets - moves @ (8, 1), moves

    def parts(self) -> Ints:
        """Of each phase: first row and column of the input, those where they go, and numbers of rows and columns."""
        if not self.strided:
            return np.array([(0, 0, 0, 0, *self.size)])
        phases, stride = np.array(self.phases), np.array(self.stride)
        first = (phases - self.padding) % stride
        to = (first + self.padding - phases) // stride
        counts = np.minimum(-((first - self.size) // stride), (self.source.height, self.source.width) - to).clip(0)
        return np.hstack([first, to, counts])

    def of_pointwise(self) -> Addressing:
        """For a 1x1 convolution that writes the input of this one in phases, and reads its own input in such phases."""
        source, size = self.source, (self.source.height, self.source.width)
        inside = source.inside(self.parts()[:, 2:])
        tap = np.zeros((1, 2), np.int64)
        return Addressing(size, source, source, tap, tap[0, :1], (1, 1), (0, 0), ((0, 0),), inside)
