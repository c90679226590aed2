"""Where the values of a graph lie, as far as it is lowered."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor, fx

from .addressing import Addressing, Window
from .autotune import Chooser, can_sum_columns
from .convolution import Convolution
from .graph import values_of
from .layout import WIDEST, Layout
from .loops import Choice
from .memory import Region
from .nodes import changes_a_value, joined_channels, module_of

#: Rows are made longer so that they begin at a cache line where that adds at most so much.
_LONGER = 1 / 7
#: And where at least this share of the non-zeros is in kernels that are then summed up by columns; a guess.
_BY_COLUMNS = 1 / 3


class Reading(NamedTuple):
    """How a convolution reads its input.

    Attributes:
        region: where it finds its input; None if that must be packed first.
        addressing: of the convolution.
        packed: of the convolution that the input is packed for, or was: this one, or one that shares its phases.
    """

    region: Region | None
    addressing: Addressing
    packed: Addressing


class Placement:
    """Regions of the values that lie in buffers; arguments as of `lowering.lower`.

    Attributes:
        shapes: of all values.
        regions: of values: where steps read them, be it the value itself or a copy.
        scaled: of products of images and a number for each channel that the convolution behind draws into its
            coefficients: the images.
        decided: how convolutions are run that are not lowered yet.
    """

    def __init__(self, module: fx.GraphModule, inputs: tuple[Tensor, ...], choose: Chooser, max_offset: int) -> None:
        self.choose, self.max_offset = choose, max_offset
        values = values_of(module, inputs)
        self.shapes = {node: value.shape for node, value in values.items()}
        self._images = {n for n, v in values.items() if v.dim() == 4 and v.dtype == torch.float32 and v.numel()}
        self.regions: dict[fx.Node, Region] = {}
        self._copies: set[fx.Node] = set()
        self.scaled: dict[fx.Node, fx.Node] = {}
        self.decided: dict[fx.Node, Choice] = {}
        self._phases: dict[fx.Node, tuple[Region, Addressing]] = {}
        self._made_in_phases: dict[fx.Node, tuple[Region, Addressing]] = {}
        self._readers: dict[fx.Node, Addressing | None] = {}
        self._gaps: dict[tuple[int, ...], tuple[int, int]] = {}
        layers: dict[tuple[int, ...], list[Convolution]] = defaultdict(list)
        for node in module.graph.nodes:
            layer = module_of(node)
            if isinstance(layer, Convolution):
                layers[self._leave_gap(layer.window, *self.shapes[node.args[0]][2:])].append(layer)
        for size, readers in layers.items():
            self._align_rows(size, readers)
        self._homes = {} if any(map(changes_a_value, module.graph.nodes)) else self._ranges(module.graph)
        self._wholes: dict[fx.Node, Region] = {}

    def _leave_gap(self, window: Window, height: int, width: int) -> tuple[int, ...]:
        """Let images have the zeros around them that a convolution needs; returns their size."""
        last = window.taps().max(0) - window.padding  # read behind a pixel
        size, needed = (height, width), (max(window.padding[0], int(last[0])), max(window.padding[1], int(last[1])))
        if window.strided:  # as many as phases have, so that they and the output have one layout
            rows, columns = (window.taps() // window.stride).max(0)
            size, needed = window.output_size(height, width), (int(rows), int(columns))
        gap = self.gap(size)
        self._gaps[size] = max(gap[0], needed[0]), max(gap[1], needed[1])
        return size

    def _align_rows(self, size: tuple[int, ...], layers: list[Convolution]) -> None:
        """Let rows of images of a size begin at cache lines, where that pays for the convolutions of such images."""
        (rows, columns), width = self._gaps[size], size[1]
        counts = [(len(layer.coefficients.values), can_sum_columns(layer)) for layer in layers]
        by_columns = sum(count for count, possible in counts if possible)
        pitch = next((lines for lines in (16, 32, 64, WIDEST) if lines >= width + columns), 0)
        pays = by_columns >= _BY_COLUMNS * sum(count for count, _ in counts) > 0
        if pays and pitch <= (1 + _LONGER) * (width + columns):
            self._gaps[size] = rows, max(columns, pitch - width)

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

    def place_copy(self, node: fx.Node, packed: Addressing) -> Region:
        """A new region for the copy of a value that a convolution reads; others that can read it will do so."""
        region = Region(packed.source, self.shapes[node][1])
        if packed.strided:
            self._phases[node] = region, packed
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

    def place_phases(self, node: fx.Node, reader: Addressing) -> Region:
        """A new region for the value of a convolution that writes the phases that its reader reads."""
        region = Region(reader.source, self.shapes[node][1])
        self._made_in_phases[node] = region, reader
        return region

    def reading(self, node: fx.Node) -> Reading:
        """How the convolution that a node calls reads its input."""
        layer, source = module_of(node), node.args[0]
        assert isinstance(layer, Convolution)
        assert isinstance(source, fx.Node)
        source = self.scaled.get(source, source)
        known = self._made_in_phases.get(source) or self._phases.get(source)
        if reader := self.reader_of_phases(node):
            region = known[0] if known and known[1].split == reader.split else None
            return Reading(region, reader.of_pointwise(), reader)
        if known and (addressing := known[1].shared_with(layer.window)):
            return Reading(known[0], addressing, known[1])
        if layer.window.strided:
            packings = self._packings(source)
            for packed in sorted(packings, key=lambda packing: -len(packing.phases)):
                if addressing := packed.shared_with(layer.window):
                    return Reading(None, addressing, packed)
            made = self._split(source, layer.window)
            return Reading(None, made, made)
        images, _, height, width = self.shapes[source]
        gap, source_gap = self.gap(layer.window.output_size(height, width)), self.gap((height, width))
        if source in self.regions:
            existing = Addressing.existing(layer.window, self.regions[source].layout, gap)
            if existing is not None:
                return Reading(self.regions[source], existing, existing)
        gap = max(gap[0], source_gap[0]), max(gap[1], source_gap[1])
        made = Addressing.new(layer.window, images, height, width, gap)
        return Reading(None, made, made)

    def choice(self, node: fx.Node) -> Choice | None:
        """How the convolution that a node calls is run; None: by torch."""
        if node in self.decided:
            return self.decided[node]
        reading, layer, source = self.reading(node), module_of(node), node.args[0]
        assert isinstance(layer, Convolution)
        assert isinstance(source, fx.Node)
        if layer.inputs * reading.addressing.source.stride > self.max_offset:
            return None
        original = self.original(self.scaled.get(source, source))
        layout = None if original is None or self.reader_of_phases(node) else original.layout
        return self.choose(layer, reading.addressing, reading.region is None, layout)

    def reader_of_phases(self, node: fx.Node) -> Addressing | None:
        """How the strided convolutions that read a 1x1 convolution address it, if it can write the phases they read.

        That saves the time of splitting its output, at the cost of splitting its input, which has fewer channels. In
        other convolutions, tiles that were split where they are made, be it in registers or in the cache, took as
        long as packing them afterwards (ResNet-18 and ResNet-50, 0.99 to 1.07 of the time of the network).
        """
        if node not in self._readers:
            self._readers[node] = self._reader_of_phases(node)
        return self._readers[node]

    def _reader_of_phases(self, node: fx.Node) -> Addressing | None:
        layer = module_of(node)
        if not isinstance(layer, Convolution) or layer.window != Window((1, 1)) or layer.groups > 1:
            return None
        if len(node.args) > 1 or layer.inputs >= layer.coefficients.channels:
            return None
        readers = [reader for user in node.users if (reader := _strided_reader(user, node))]
        if not readers or len(readers) < len(node.users):
            return None
        widest = max((self._split(node, reader.window) for reader in readers), key=lambda split: len(split.phases))
        return widest if all(self._runs_on(widest, reader) for reader in readers) else None

    def _split(self, node: fx.Node, window: Window) -> Addressing:
        """How a strided convolution reads a value that is split into phases for it."""
        images, _, height, width = self.shapes[node]
        return Addressing.new(window, images, height, width, self.gap(window.output_size(height, width)))

    def _runs_on(self, packed: Addressing, reader: Convolution) -> bool:
        """Whether a convolution runs sparse on the phases of another one."""
        shared = packed.shared_with(reader.window)
        if shared is None or reader.inputs * shared.source.stride > self.max_offset:
            return False
        return self.choose(reader, shared, False, None) is not None

    def _packings(self, node: fx.Node) -> list[Addressing]:
        """How a value is split into phases for the strided convolutions that read it, if they run sparse on these."""
        packings = []
        for user in node.users:
            if reader := _strided_reader(user, node):
                packing = self._split(node, reader.window)
                packings += [packing] if self._runs_on(packing, reader) else []
            elif user.args[0] is node and (behind := self.reader_of_phases(user)):
                packings.append(behind)
        return packings


def _strided_reader(user: fx.Node, node: fx.Node) -> Convolution | None:
    """The strided convolution that a node calls on a value; None if it uses the value for something else."""
    layer = module_of(user)
    if not isinstance(layer, Convolution) or not layer.window.strided:
        return None
    return layer if user.args[0] is node and node not in user.args[1:] else None
