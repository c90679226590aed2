"""The memory that the steps of a sparse network read and write."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, fx

from .layout import Floats, Layout, aligned


@dataclass(eq=False)
class Region:
    """Where a value of this layout lies: at the beginning of the buffer of this number, at first one of its own.

    Values that are not alive together share a buffer. A region may be a range of channels of another one, `whole`.
    """

    layout: Layout
    channels: int
    whole: Region | None = None
    begin: int = 0
    buffer: int = field(default_factory=itertools.count().__next__)

    @property
    def root(self) -> Region:
        """The region that has a buffer: this one, or the outermost one that it is a part of."""
        return self if self.whole is None else self.whole.root

    @property
    def first_channel(self) -> int:
        """Its first channel in `root`."""
        return 0 if self.whole is None else self.begin + self.whole.first_channel

    @property
    def size(self) -> int:
        """Length that its buffer needs at least."""
        return self.layout.size(self.channels)


class Workspace:
    """The memory of one call of a traced network at a time; `interpreter` runs nodes by torch.

    `scratch` is the length of the working memory of a step, at most.
    """

    def __init__(self, module: fx.GraphModule, regions: Iterable[Region], scratch: int) -> None:
        self.interpreter = fx.Interpreter(module, garbage_collect_values=False)
        sizes: dict[int, int] = {}
        for region in regions:
            sizes[region.buffer] = max(sizes.get(region.buffer, 0), region.size)
        *begins, end = itertools.accumulate(sizes.values(), initial=0)
        memory = aligned(end + scratch)  # one piece, which the system can give in large pages
        self._buffers = {n: memory[at : at + size] for at, (n, size) in zip(begins, sizes.items(), strict=True)}
        self._scratch = memory[end:]

    def buffer(self, region: Region) -> Floats:
        """The buffer that a region lies in, from its first channel on."""
        return self._buffers[region.root.buffer][region.first_channel * region.layout.stride :]

    def view(self, region: Region) -> Tensor:
        """The images of a region, without a copy."""
        whole = region.layout.view(self._buffers[region.root.buffer], region.root.channels)
        return whole[:, region.first_channel : region.first_channel + region.channels]

    def scratch(self, shape: tuple[int, int]) -> Floats:
        """Working memory of a step."""
        return self._scratch[: math.prod(shape)].reshape(shape)
