"""Where a convolution reads its input and writes its output."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .layout import Ints, Layout


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
