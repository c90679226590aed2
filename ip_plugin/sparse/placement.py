"""Where the values of a graph lie, as far as it is lowered."""

from __future__ import annotations

from torch import Tensor, fx

from .addressing import Addressing, Window
from .autotune import Chooser
from .convolution import Convolution
from .graph import value_shapes
from .layout import Layout
from .memory import Region
from .nodes import module_of


class Placement:
    """Regions of the values that lie in buffers; arguments as of `lowering.lower`.

    Attributes:
        shapes: of all values.
        regions: of values: where steps read them, be it the value itself or a copy.
    """

    def __init__(self, module: fx.GraphModule, inputs: tuple[Tensor, ...], choose: Chooser, max_offset: int) -> None:
        self.choose, self.max_offset = choose, max_offset
        self.shapes = value_shapes(module, inputs)
        self.regions: dict[fx.Node, Region] = {}
        self._copies: set[fx.Node] = set()
        self._phases: dict[fx.Node, tuple[Region, Addressing]] = {}
        self._gaps: dict[tuple[int, ...], tuple[int, int]] = {}
        for node in module.graph.nodes:
            layer = module_of(node)
            if isinstance(layer, Convolution) and not layer.window.strided:
                size, (rows, columns) = self.shapes[node.args[0]][2:], layer.window.padding
                gap = self.gap(size)
                self._gaps[size] = max(gap[0], rows), max(gap[1], columns)

    def gap(self, size: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of zeros that convolutions need between images of this height and width."""
        return self._gaps.get(size, (0, 0))

    def place(self, node: fx.Node, layout: Layout) -> Region:
        """A new region for the value that a step makes."""
        self.regions[node] = Region(layout, self.shapes[node][1])
        return self.regions[node]

    def place_copy(self, node: fx.Node, addressing: Addressing) -> Region:
        """A new region for the copy of a value that a convolution reads; others that can read it will do so."""
        region = Region(addressing.source, self.shapes[node][1] * len(addressing.phases))
        if addressing.window.strided:
            self._phases[node] = region, addressing
        else:
            self.regions[node] = region
            self._copies.add(node)
        return region

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
        gap = max(gap[0], source_gap[0]), max(gap[1], source_gap[1])
        return None, Addressing.new(window, images, height, width, gap)
