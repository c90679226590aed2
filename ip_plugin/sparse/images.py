"""Images that lie somewhere: copied into buffers, pooled, averaged."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from .kernels import nonzero
from .layout import Floats, Ints, Layout
from .places import Places, Window


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
    nonzero.deal(
        count, channels, parts, images.flat, *images.strides, *steps, buffer, *layout.distances(),
    )  # fmt: skip


def pool(window: Window, source: Layout, channels: int, target: Layout, read: Floats, write: Floats) -> None:
    """Max pooling from one buffer into another."""
    span = max(source.width, (target.width - 1) * window.stride[1] + 1)
    length = span + 2 * window.padding[1] + window.kernel[1] * window.dilation[1] + 64
    nonzero.largest(
        source.images, channels, source.height, source.width, *window[:4],
        read, *source.distances(), target.height, target.width, write, *target.distances(),
        np.empty((2 * numba.config.NUMBA_NUM_THREADS, length), np.float32),
    )  # fmt: skip


def mean(source: Layout, channels: int, read: Floats) -> Tensor:
    """Averages of all pixels, ``(images, channels, 1, 1)``."""
    made = torch.empty(source.images, channels, 1, 1)
    length = (source.height - 1) * source.pitch + source.width
    nonzero.mean(
        source.images, channels, length, source.height * source.width, read, *source.distances()[:3],
        made.numpy().reshape(-1),
    )  # fmt: skip
    return made
