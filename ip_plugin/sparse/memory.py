"""The memory that the steps of a sparse network read and write."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, fx

from .layout import Floats, Layout, aligned


@dataclass(eq=False)
class Region:
    """Where a value of this layout lies: from `offset` on in the memory of a call, or in another region, `whole`.

    That has a range of channels for it, which starts at `begin`. Values that are not alive together share memory.
    """

    layout: Layout
    channels: int
    whole: Region | None = None
    begin: int = 0
    offset: int = 0

    @property
    def root(self) -> Region:
        """The region that has an offset: this one, or the outermost one that it is a part of."""
        return self if self.whole is None else self.whole.root

    @property
    def first_channel(self) -> int:
        """Its first channel in `root`."""
        return 0 if self.whole is None else self.begin + self.whole.first_channel

    @property
    def size(self) -> int:
        """Length of the memory that it needs."""
        return self.layout.size(self.channels)


class Workspace:
    """The memory of one call of a traced network at a time; `interpreter` runs nodes by torch.

    `regions` are those that have offsets; `scratch` is the length of the working memory of a step, at most.
    """

    def __init__(self, module: fx.GraphModule, regions: Iterable[Region], scratch: int) -> None:
        self.interpreter = fx.Interpreter(module, garbage_collect_values=False)
        ends = {region: region.offset + region.size for region in regions}
        end = max(ends.values(), default=0)
        memory = aligned(end + scratch)  # one piece, which the system can give in large pages
        self._buffers = {region: memory[region.offset : ends[region]] for region in ends}
        self._scratch = memory[end:]

    def buffer(self, region: Region) -> Floats:
        """The memory of a region, from its first channel on."""
        return self._buffers[region.root][region.first_channel * region.layout.stride :]

    def view(self, region: Region) -> Tensor:
        """The images of a region, without a copy."""
        whole = region.layout.view(self._buffers[region.root], region.root.channels)
        return whole[:, region.first_channel : region.first_channel + region.channels]

    def scratch(self, shape: tuple[int, int]) -> Floats:
        """Working memory of a step."""
        return self._scratch[: math.prod(shape)].reshape(shape)
