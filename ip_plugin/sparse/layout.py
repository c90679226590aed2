"""Memory layout of activations inside a sparse network: channel-major, with zeros between rows and images.

Pixel ``(y, x)`` of image `i` in channel `c` is at ``first + c * stride + (i * rows + y) * pitch + x``. The gaps hold
zeros, so a shifted read needs no bounds check; one gap serves the end of a row and the beginning of the next.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint8]

#: Pixels of the widest tile: loops read and write at most so far beyond the last image.
WIDEST = 128
_CACHE_LINE = 16
#: Channel strides, in cache lines modulo 64, that spread one pixel's channels over the sets of a cache.
_SPREAD = (9, 11, 13, 21, 27, 35, 37, 43, 45, 51, 53)


def aligned(size: int) -> Floats:
    """Zeros that begin at a cache line."""
    raw = np.zeros(size + _CACHE_LINE, np.float32)
    shift = -(raw.ctypes.data // 4) % _CACHE_LINE
    return raw[shift : shift + size]


class Layout(NamedTuple):
    """Where the pixels of one layer's activations lie.

    Attributes:
        images, height, width: shape of what is stored.
        rows: distance between images, in rows; at least `height`.
        pitch: distance between rows, in pixels; at least `width`.
        reach: how far before the first pixel, and after the last one, zeros may be read.
    """

    images: int
    height: int
    width: int
    rows: int
    pitch: int
    reach: int

    @property
    def pixels(self) -> int:
        """Pixels from the first one to the end of the last row, gaps included."""
        return ((self.images - 1) * self.rows + self.height - 1) * self.pitch + self.width

    @property
    def first(self) -> int:
        """Position of the first pixel of the first channel."""
        return -(-self.reach // _CACHE_LINE) * _CACHE_LINE

    @property
    def stride(self) -> int:
        """Distance between channels."""
        lines = -(-(self.first + self.pixels + self.reach + WIDEST) // _CACHE_LINE)
        while lines % 64 not in _SPREAD:
            lines += 1
        return lines * _CACHE_LINE

    @functools.lru_cache(maxsize=1024)  # noqa: B019  # layouts are values, and few
    def distances(self) -> tuple[int, int, int, int]:
        """Position of the first pixel, and the distances between channels, images and rows."""
        return self.first, self.stride, self.rows * self.pitch, self.pitch

    def size(self, channels: int) -> int:
        """Length of a buffer for so many channels, in whole cache lines."""
        return -(-(channels * self.stride + self.reach + WIDEST) // _CACHE_LINE) * _CACHE_LINE

    def empty(self, channels: int) -> Floats:
        """A buffer of zeros for so many channels."""
        return aligned(self.size(channels))

    def zeros_around(self, covered: int) -> tuple[int, int]:
        """How many zeros are needed before the first pixel, and after those that tiles cover; whole cache lines."""
        lines = -(-max(0, self.pixels + self.reach - covered) // _CACHE_LINE)
        return self.first, lines * _CACHE_LINE

    def view(self, buffer: Floats, channels: int) -> Tensor:
        """The images of a buffer, ``(images, channels, height, width)``, without a copy."""
        strides = (self.rows * self.pitch, self.stride, self.pitch, 1)
        shape = (self.images, channels, self.height, self.width)
        return torch.from_numpy(buffer).as_strided(shape, strides, self.first)

    def one_run(self, *others: Layout | None) -> Bits:
        """For `images.pointwise`: bits of pixels that are none of a gap; empty unless all rows have one distance."""
        if any(other is not None and other.pitch != self.pitch for other in others):
            return np.empty(0, np.uint8)
        length = (self.height - 1) * self.pitch + self.width
        place = np.arange(-(-length // 16) * 16)
        return np.packbits((place % self.pitch < self.width) & (place < length), bitorder="little")

    def inside(self, phases: Ints | None = None) -> Bits:
        """One bit for each pixel of whole tiles, lowest first: whether it belongs to an image, not to a gap.

        Args:
            phases: of equally many images each: first row and column, and number of rows and columns, that are inside.
        """
        extents = np.array([(0, 0, self.height, self.width)]) if phases is None else phases
        inside = np.zeros((len(extents), self.images // len(extents), self.rows, self.pitch), bool)
        for images, (row, column, rows, columns) in zip(inside, extents.tolist(), strict=True):
            images[:, row : row + rows, column : column + columns] = True
        bits = np.zeros(-(-self.pixels // WIDEST) * WIDEST, bool)
        bits[: self.pixels] = inside.reshape(-1)[: self.pixels]
        return np.packbits(bits, bitorder="little")
