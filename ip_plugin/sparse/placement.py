"""Where the values of a graph lie, as far as it is lowered."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from .addressing import Addressing, Window
from .autotune import Chooser
from .convolution import Convolution
from .graph import values_of
from .layout import Layout
from .memory import Region
from .nodes import changes_a_value, joined_channels, module_of


class Placement:
    """Regions of the values that lie in buffers; arguments as of `lowering.lower`.

    Attributes:
        shapes: of all values.
        regions: of values: where steps read them, be it the value itself or a copy.
    """

    def __init__(self, module: fx.GraphModule, inputs: tuple[Tensor, ...], choose: Chooser, max_offset: int) -> None:
        self.choose, self.max_offset = choose, max_offset
        values = values_of(module, inputs)
        self.shapes = {node: value.shape for node, value in values.items()}
        self._images = {n for n, v in values.items() if v.dim() == 4 and v.dtype == torch.float32 and v.numel()}
        self.regions: dict[fx.Node, Region] = {}
        self._copies: set[fx.Node] = set()
        self._phases: dict[fx.Node, tuple[Region, Addressing]] = {}
        self._gaps: dict[tuple[int, ...], tuple[int, int]] = {}
        for node in module.graph.nodes:
            layer = module_of(node)
            if isinstance(layer, Convolution):
                self._leave_gap(layer.window, *self.shapes[node.args[0]][2:])
        self._homes = {} if any(map(changes_a_value, module.graph.nodes)) else self._ranges(module.graph)
        self._wholes: dict[fx.Node, Region] = {}

    def _leave_gap(self, window: Window, height: int, width: int) -> None:
        """Let images of a size have the zeros around them that a convolution needs."""
        last = window.taps().max(0) - window.padding  # read behind a pixel
        size, needed = (height, width), (max(window.padding[0], int(last[0])), max(window.padding[1], int(last[1])))
        if window.strided:  # as many as phases have, so that they and the output have one layout
            rows, columns = (window.taps() // window.stride).max(0)
            size, needed = window.output_size(height, width), (int(rows), int(columns))
        gap = self.gap(size)
        self._gaps[size] = max(gap[0], needed[0]), max(gap[1], needed[1])

    def _ranges(self, graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, int]]:
        """Of values that are concatenated: the concatenation whose channels they can be made in, and the first one."""
        homes: dict[fx.Node, tuple[fx.Node, int]] = {}
        for node in reversed(graph.nodes):
            parts = joined_channels(node) if self.is_images(node) else ()
            if not parts or not all(map(self.is_images, parts)) or len(set(parts)) < len(parts):
                continue
            begins = [sum(self.shapes[part][1] for part in parts[:number]) for number in range(len(parts))]
            whole, first = homes.get(parts[0], (node, 0))
            if all(homes.get(part) == (whole, first + begin) for part, begin in zip(parts, begins, strict=True)):
                homes.setdefault(node, (whole, first))  # a range of a later concatenation
                continue
            for part, begin in zip(parts, begins, strict=True):
                homes.setdefault(part, (node, begin))
        return homes

    def is_images(self, node: fx.Node) -> bool:
        """Whether the value of a node is a float32 batch of images."""
        return node in self._images

    def gap(self, size: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of zeros that convolutions need between images of this height and width."""
        return self._gaps.get(size, (0, 0))

    def layout(self, node: fx.Node) -> Layout:
        """The layout of a value, unless a convolution that makes it needs another one."""
        images, _, height, width = self.shapes[node]
        rows, columns = self.gap((height, width))
        pitch = width + columns
        return Layout(images, height, width, height + rows, pitch, rows * pitch + columns)

    def place(self, node: fx.Node, layout: Layout | None = None) -> Region:
        """A new region for the value that a step makes: in the concatenation that reads it, if that has its layout."""
        self.regions[node] = self.region(node, layout or self.layout(node))
        return self.regions[node]

    def region(self, node: fx.Node, layout: Layout) -> Region:
        """A region for a value; it is not remembered."""
        if node in self._wholes:
            return self._wholes[node]
        whole, begin = self._homes.get(node, (None, 0))
        if whole is not None and self.layout(whole) == layout:
            if whole not in self._wholes:
                self._wholes[whole] = self.region(whole, layout)
            return Region(layout, self.shapes[node][1], self._wholes[whole], begin)
        return Region(layout, self.shapes[node][1])

    def place_copy(self, node: fx.Node, addressing: Addressing) -> Region:
        """A new region for the copy of a value that a convolution reads; others that can read it will do so."""
        region = Region(addressing.source, self.shapes[node][1] * len(addressing.phases))
        if addressing.window.strided:
            self._phases[node] = region, addressing
        else:
            self.remember_copy(node, region)
        return region

    def remember_copy(self, node: fx.Node, region: Region) -> None:
        """Let later steps read a copy of a value."""
        if node not in self.regions or node in self._copies:
            self.regions[node] = region
            self._copies.add(node)

    def original(self, node: fx.Node) -> Region | None:
        """The region of a value itself; None if it does not lie in a buffer."""
        return None if node in self._copies else self.regions.get(node)

    def forget_copies(self) -> None:
        """Let no later step read a copy, since a value may be changed in place."""
        for node in self._copies:
            del self.regions[node]
        self._copies.clear()
        self._phases.clear()

    def addressing(self, source: fx.Node, window: Window) -> tuple[Region | None, Addressing]:
        """How a convolution addresses its input, and the region that it can read; None if it must be packed first."""
        images, _, height, width = self.shapes[source]
        gap, source_gap = self.gap(window.output_size(height, width)), self.gap((height, width))
        if source in self._phases:
            region, other = self._phases[source]
            if shared := other.shared_with(window):
                return region, shared
        if source in self.regions and (existing := Addressing.existing(window, self.regions[source].layout, gap)):
            return self.regions[source], existing
        if not window.strided:
            gap = max(gap[0], source_gap[0]), max(gap[1], source_gap[1])
        return None, Addressing.new(window, images, height, width, gap)
