"""How activations lie in memory while a sparse network runs: channel-major, with zeros between rows and images.

Pixel ``(y, x)`` of image `i` of channel `c` is at ``first + c * stride + (i * rows + y) * pitch + x``. The gaps hold
zeros, so that a shifted read needs no test for the border; a gap serves the end of a row and the beginning of the next.
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

#: Widest tile: what is read and written beyond the last image at most.
WIDEST = 128
_CACHE_LINE = 16
#: Distances of channels, in cache lines modulo 64, that spread a column of channels over the sets of a cache.
_SPREAD = (9, 11, 13, 21, 27, 35, 37, 43, 45, 51, 53)


def aligned(size: int) -> Floats:
    """So many zeros, from the beginning of a cache line on."""
    raw = np.zeros(size + _CACHE_LINE, np.float32)
    shift = -(raw.ctypes.data // 4) % _CACHE_LINE
    return raw[shift : shift + size]


class Layout(NamedTuple):
    """Of the activations of one layer.

    Attributes:
        images, height, width: what is stored.
        rows: distance of two images, in rows; at least `height`.
        pitch: distance of two rows, in pixels; at least `width`.
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
        """From the first pixel to the end of the last row, gaps included."""
        return ((self.images - 1) * self.rows + self.height - 1) * self.pitch + self.width

    @property
    def first(self) -> int:
        """Where the first pixel of the first channel is."""
        return -(-self.reach // _CACHE_LINE) * _CACHE_LINE

    @property
    def stride(self) -> int:
        """Distance of two channels."""
        lines = -(-(self.first + self.pixels + self.reach + WIDEST) // _CACHE_LINE)
        while lines % 64 not in _SPREAD:
            lines += 1
        return lines * _CACHE_LINE

    @functools.lru_cache(maxsize=1024)  # noqa: B019  # layouts are values, and few
    def distances(self) -> tuple[int, int, int, int]:
        """Where the first pixel is, and how far channels, images and rows lie apart."""
        return self.first, self.stride, self.rows * self.pitch, self.pitch

    def size(self, channels: int) -> int:
        """How many numbers a buffer for so many channels has."""
        return channels * self.stride + self.reach + WIDEST

    def empty(self, channels: int) -> Floats:
        """A buffer of zeros for so many channels."""
        return aligned(self.size(channels))

    def around(self, tiles: int) -> tuple[int, int]:
        """How many zeros must be before the first pixel and behind the tiles, which have so many; in cache lines."""
        lines = -(-max(0, self.pixels + self.reach - tiles) // _CACHE_LINE)
        return self.first, lines * _CACHE_LINE

    def view(self, buffer: Floats, channels: int, begin: int = 0) -> Tensor:
        """The images of a buffer, ``(images, channels, height, width)``, without a copy."""
        strides = (self.rows * self.pitch, self.stride, self.pitch, 1)
        shape = (self.images, channels, self.height, self.width)
        return torch.from_numpy(buffer).as_strided(shape, strides, self.first + begin)

    def stored(self) -> npt.NDArray[np.uint8]:
        """Bits, lowest first: which pixels are of an image; as many as there can be in whole tiles."""
        count = -(-self.pixels // WIDEST) * WIDEST
        place = np.arange(count)
        inside = (place % self.pitch < self.width) & (place // self.pitch % self.rows < self.height)
        return np.packbits(inside & (place < self.pixels), bitorder="little")
