"""Images in any memory layout, and how they are packed into buffers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .addressing import Addressing
from .kernels import images as image_loops
from .layout import Floats, Ints, Layout


class Images(NamedTuple):
    """A batch of images in memory.

    Attributes:
        flat: begins with the first pixel.
        shape, strides: ``(images, channels, height, width)``, and their strides.
    """

    flat: Floats
    shape: torch.Size
    strides: tuple[int, ...]

    @classmethod
    def of(cls, images: Tensor) -> Images:
        """The images of a tensor, without a copy."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(images.shape, images.stride(), strict=True))
        return cls(images.detach().as_strided((extent,), (1,)).numpy(), images.shape, images.stride())


class Packing(NamedTuple):
    """How images are copied into a buffer, with zeros around them, split into phases where the reader is strided.

    Attributes:
        layout: of the buffer.
        stride: distance of the rows, and of the columns, of one phase.
        phases: of each: first row and column of the images, row and column where they go, numbers of rows and columns.
    """

    layout: Layout
    stride: tuple[int, int]
    phases: Ints

    @classmethod
    def whole(cls, layout: Layout) -> Packing:
        """All rows and columns."""
        return cls(layout, (1, 1), np.array([(0, 0, 0, 0, layout.height, layout.width)]))

    @classmethod
    def to_read(cls, addressing: Addressing) -> Packing:
        """What a convolution reads."""
        return cls(addressing.source, addressing.stride, addressing.parts())

    def pack(self, images: Images, buffer: Floats) -> None:
        """Copy images into a buffer."""
        image_loops.pack(
            *images.shape[:2], self.phases, images.flat, *images.strides, *self.stride, buffer,
            *self.layout.distances(),
        )  # fmt: skip
