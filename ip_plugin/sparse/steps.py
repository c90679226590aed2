"""Steps of a sparse network: a class for each kind, which knows how it is lowered and run; here those of layers.

The others are in `pooling` and `elementwise`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import SparseExecutionError
from .addressing import Addressing
from .convolution import Convolution
from .images import Images, Packing
from .kernels import images as image_loops
from .linear import Linear
from .loops import Choice, Loop
from .memory import Region, Workspace
from .nodes import changes_a_value, module_of, needs_contiguous
from .placement import Placement
from .pointwise import Pointwise

Values = dict[fx.Node, Any]


class Run(NamedTuple):
    """How a layer of a sparse network is run.

    Attributes:
        layer: name of the module.
        density: share of its coefficients that are not zero.
        how: ``"direct"`` (every non-zero reads its input), ``"columns"`` (likewise, with a sum for each column of the
            kernels), ``"fused"`` (basis-filter responses first), ``"winograd"`` (dense, with a quarter of the
            multiplications), ``"dense"`` (torch).
        width, parts: pixels of a tile (for Winograd: tiles at a time), and parts of the output channels; 0 if dense.
        bytes: memory of coefficients and positions, or of the dense weight.
    """

    layer: str
    density: float
    how: str
    width: int
    parts: int
    bytes: int


class LayerRun(NamedTuple):
    """A layer of the model that a step runs: what, how, and at how many output positions over all images."""

    layer: Convolution | Linear
    run: Run
    positions: int


@dataclass(eq=False)
class Step(ABC):
    """Makes the value of a node. A new kind is a subclass, and a place in `lowering.KINDS`.

    Attributes:
        node: whose value it makes.
        layer: what it runs, if that is a layer of the model, so that a report can list it.
    """

    node: fx.Node
    layer: LayerRun | None = field(default=None, kw_only=True)

    @classmethod
    def lower(cls, node: fx.Node, placement: Placement) -> list[Step]:  # noqa: ARG003
        """The steps that make the value of a node; none if it is not of this kind."""
        return []

    @abstractmethod
    def bind(self, workspace: Workspace) -> Callable[[Values], None]:
        """A function that runs the step: reads values and regions, writes a region or the value of its node."""

    @property
    def regions(self) -> list[Region]:
        """Regions that it reads and writes: those among its attributes."""
        attributes = (getattr(self, attribute.name) for attribute in fields(self))
        return [value for value in attributes if isinstance(value, Region)]

    @property
    def overwrites(self) -> dict[Region, Region]:
        """Its target, and a region in whose place that may be written: no other pixel of it is read afterwards."""
        return {}

    @property
    def scratch_shape(self) -> tuple[int, int]:
        """Shape of its working memory."""
        return 0, 0


@dataclass(eq=False)
class Torch(Step):
    """A node that torch runs."""

    @classmethod
    def lower(cls, node: fx.Node, placement: Placement) -> list[Step]:
        if changes_a_value(node):
            placement.forget_copies()
        return [cls(node)]

    def bind(self, workspace: Workspace) -> Callable[[Values], None]:
        node, module, interpreter = self.node, module_of(self.node), workspace.interpreter
        call, target = getattr(interpreter, node.op), node.target
        if module is not None:  # looked up once
            call, target = interpreter.call_function, module
        contiguous = not isinstance(module, (Convolution, Linear, Pointwise)) and needs_contiguous(node)

        def run(values: Values) -> None:
            arguments = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            if contiguous:
                arguments = fx.node.map_aggregate(arguments, lambda a: a.contiguous() if isinstance(a, Tensor) else a)
            values[node] = call(target, *arguments)

        return run


@dataclass(eq=False)
class Pack(Step):
    """Copies a value for the convolution of the node, which cannot read it where it is: in `original`, or elsewhere."""

    value: fx.Node
    shape: torch.Size
    packing: Packing
    target: Region
    original: Region | None

    def bind(self, workspace: Workspace) -> Callable[[Values], None]:
        value, shape, pack, target = self.value, self.shape, self.packing.pack, workspace.buffer(self.target)
        original = None if self.original is None else Images.of(workspace.view(self.original))

        def run(values: Values) -> None:
            images = original or Images.of(values[value])
            if images.shape != shape:
                raise SparseExecutionError(
                    "Shapes must not depend on values of the input.",
                    f"shape {tuple(images.shape)} instead of {tuple(shape)} before a convolution",
                    "prepare the parts of the network before and behind separately",
                )
            pack(images, target)

        return run


@dataclass(eq=False)
class SparseConvolution(Step):
    """A convolution by one of the compiled loops; `scales` has a number for each input channel of the only image."""

    choice: Choice
    loop: Loop
    addressing: Addressing
    source: Region
    target: Region
    residual: Region | None
    scales: fx.Node | None

    @classmethod
    def lower(cls, node: fx.Node, placement: Placement) -> list[Step]:
        """The convolution, after steps that pack what it reads; or torch's, if that is chosen."""
        layer = module_of(node)
        if not isinstance(layer, Convolution):
            return []
        nodes = [argument for argument in node.args if isinstance(argument, fx.Node)]
        scaled, addend = nodes[0], nodes[1] if len(nodes) > 1 else None
        value = placement.scaled.get(scaled, scaled)
        images, channels, height, width = placement.shapes[node]
        source, addressing, packed = placement.reading(node)
        choice, reader = placement.choice(node), placement.reader_of_phases(node)
        if choice is None:
            return DenseConvolution.lower(node, placement)
        steps: list[Step] = []
        if source is None:
            original = placement.original(value)
            source = placement.place_copy(value, packed)
            steps.append(Pack(node, value, placement.shapes[value], Packing.to_read(packed), source, original))
        residual = None if addend is None else placement.regions.get(addend)
        if addend is not None and (residual is None or residual.layout != addressing.target):
            residual = Region(addressing.target, channels)
            original, shape = placement.original(addend), placement.shapes[addend]
            steps.append(Pack(node, addend, shape, Packing.whole(residual.layout), residual, original))
        scales = None if scaled is value else scaled
        loop, run = _loop(layer, addressing, choice, scales is not None)
        record = LayerRun(layer, run, images * height * width)
        target = placement.place_phases(node, reader) if reader else placement.place(node, addressing.target)
        return [*steps, cls(node, choice, loop, addressing, source, target, residual, scales, layer=record)]

    def run_by(self, choice: Choice) -> SparseConvolution:
        """The same step, run another way."""
        assert self.layer is not None
        assert isinstance(self.layer.layer, Convolution)
        loop, run = _loop(self.layer.layer, self.addressing, choice, self.scales is not None)
        return replace(self, choice=choice, loop=loop, layer=self.layer._replace(run=run))

    @property
    def overwrites(self) -> dict[Region, Region]:
        if self.residual is None or self.residual.root is self.source.root:
            return {}
        return {self.target: self.residual}

    @property
    def scratch_shape(self) -> tuple[int, int]:
        return self.loop.scratch_shape

    def bind(self, workspace: Workspace) -> Callable[[Values], None]:
        residual = None if self.residual is None else workspace.buffer(self.residual)
        source, target, scratch = workspace.buffer(self.source), workspace.buffer(self.target), self.scratch_shape
        if self.scales is None:
            call = self.loop.bind(source, target, residual, workspace.scratch(scratch))
            return into(self.node, workspace.view(self.target), call)
        node, scales, view = self.node, self.scales, workspace.view(self.target)
        scaled = self.loop.bind_scaled(source, target, residual, workspace.scratch(scratch))

        def run(values: Values) -> None:
            scaled(values[scales].numpy().reshape(-1))
            values[node] = view

        return run


def _loop(layer: Convolution, addressing: Addressing, choice: Choice, scaled: bool) -> tuple[Loop, Run]:
    """A convolution by one of the compiled loops, and how it is run."""
    loop = Loop(layer.entries(choice.order), layer.bias, addressing, choice, layer.activation, scaled)
    return loop, Run(layer.name, layer.density, choice.order, choice.width, choice.parts, loop.bytes)


def into(node: fx.Node, view: Tensor, call: Callable[[], Any]) -> Callable[[Values], None]:
    """A function that runs a loop and makes the view of the region that it writes the value of a node."""

    def run(values: Values) -> None:
        call()
        values[node] = view

    return run


def read(node: fx.Node, value: fx.Node, placement: Placement) -> tuple[list[Step], Region]:
    """Steps before that of a node, and the region that they let it read a value in, which is a batch of images."""
    if value in placement.regions:
        return [], placement.regions[value]
    layout = placement.layout(value)
    region = Region(layout, placement.shapes[value][1])
    placement.remember_copy(value, region)
    return [Pack(node, value, placement.shapes[value], Packing.whole(layout), region, None)], region


#: Arguments of `pointwise` where there is no scale, and nothing is added.
NO_SCALE = NOTHING = np.empty(0, np.float32), 0, 0, 0
NO_ADDEND = (*NOTHING, 0)


def images_in(workspace: Workspace, region: Region | None) -> tuple[Any, ...]:
    """The arguments of a loop that reads a region: its buffer, and where the pixels are."""
    return NO_ADDEND if region is None else (workspace.buffer(region), *region.layout.distances())


@dataclass(eq=False)
class DenseConvolution(Step):
    """A convolution by torch, whose result is moved to a region, where other steps read it."""

    value: fx.Node
    source: Region | None
    target: Region
    residual: Region | None

    @classmethod
    def lower(cls, node: fx.Node, placement: Placement) -> list[Step]:
        layer = module_of(node)
        assert isinstance(layer, Convolution)
        nodes = [argument for argument in node.args if isinstance(argument, fx.Node)]
        images, _, height, width = placement.shapes[node]
        steps, residual = ([], None) if len(nodes) == 1 else read(node, nodes[1], placement)
        run = Run(layer.name, layer.density, "dense", 0, 0, 4 * math.prod(layer.shape))
        record, source = LayerRun(layer, run, images * height * width), placement.original(nodes[0])
        return [*steps, cls(node, nodes[0], source, placement.place(node), residual, layer=record)]

    def bind(self, workspace: Workspace) -> Callable[[Values], None]:
        assert self.layer is not None
        assert isinstance(self.layer.layer, Convolution)
        node, value, layer, layout = self.node, self.value, self.layer.layer, self.target.layout
        source = None if self.source is None else workspace.view(self.source)
        view, target = workspace.view(self.target), images_in(workspace, self.target)
        sizes = layout.images, self.target.channels, layout.height, layout.width
        by_rows = np.empty(0, np.uint8)
        rest = (*images_in(workspace, self.residual), *layer.activation.arguments, *target)

        def run(values: Values) -> None:
            made = layer.convolved(values[value] if source is None else source).contiguous()
            image_loops.pointwise(
                *sizes,
                by_rows,
                NOTHING[0],
                *NO_SCALE,
                made.numpy().reshape(-1),
                0,
                *made.stride()[1::-1],
                made.stride(2),
                *rest,
            )
            values[node] = view

        return run


@dataclass(eq=False)
class SparseLinear(Step):
    """A linear layer by its non-zeros, or by torch where that was faster."""

    value: fx.Node
    choice: Choice | None

    @classmethod
    def lower(cls, node: fx.Node, placement: Placement) -> list[Step]:
        layer = module_of(node)
        if not isinstance(layer, Linear):
            return []
        rows = math.prod(placement.shapes[node][:-1])
        addressing = Addressing.new(layer.window, 1, 1, rows)
        fits = layer.inputs * addressing.source.stride <= placement.max_offset
        choice = placement.choose(layer, addressing, False, None) if fits else None
        run = Run(layer.name, layer.density, "dense", 0, 0, 4 * math.prod(layer.shape))
        if choice is not None:
            size = layer.coefficients.values.nbytes + layer.coefficients.inputs.nbytes
            run = Run(layer.name, layer.density, choice.order, choice.width, choice.parts, size)
        return [cls(node, node.all_input_nodes[0], choice, layer=LayerRun(layer, run, rows))]

    def bind(self, workspace: Workspace) -> Callable[[Values], None]:  # noqa: ARG002
        assert self.layer is not None
        assert isinstance(self.layer.layer, Linear)
        node, layer, value = self.node, self.layer.layer, self.value
        call = layer.bind(self.choice, self.layer.positions)

        def run(values: Values) -> None:
            rows = values[value].reshape(-1, layer.inputs)
            values[node] = call(rows).view(layer.output_shape(values[value].shape))

        return run
