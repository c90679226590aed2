"""The steps of a sparse network: one class for each kind, which knows how it is lowered and run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

import numba
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import SparseExecutionError
from .addressing import Window
from .convolution import Convolution
from .images import Images, Packing
from .kernels import nonzero
from .layout import Layout
from .loops import Loop
from .memory import Region, Workspace
from .nodes import called_plainly, changes_a_value, module_of, needs_contiguous
from .placement import Placement

Values = dict[fx.Node, Any]


class Run(NamedTuple):
    """How a layer of a sparse network is run.

    Attributes:
        layer: name of the module.
        density: share of its coefficients that are not zero.
        how: ``"direct"`` (every non-zero reads its input), ``"fused"`` (basis-filter responses first), ``"winograd"``
            (dense, with a quarter of the multiplications), ``"dense"`` (torch).
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

    layer: Convolution
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
        contiguous = not isinstance(module, Convolution) and needs_contiguous(node)

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
    """A convolution by one of the compiled loops."""

    loop: Loop
    source: Region
    target: Region
    residual: Region | None

    @classmethod
    def lower(cls, node: fx.Node, placement: Placement) -> list[Step]:
        """The convolution, after steps that pack what it reads; or torch's, if that is chosen."""
        layer = module_of(node)
        if not isinstance(layer, Convolution):
            return []
        nodes = [argument for argument in node.args if isinstance(argument, fx.Node)]
        value, addend = nodes[0], nodes[1] if len(nodes) > 1 else None
        images, channels, height, width = placement.shapes[node]
        source, addressing = placement.addressing(value, layer.window)
        choice = None
        if layer.inputs * addressing.channel_stride <= placement.max_offset:
            choice = placement.choose(layer, addressing, source is None)
        if choice is None:
            run = Run(layer.name, layer.density, "dense", 0, 0, 4 * math.prod(layer.shape))
            return [Torch(node, layer=LayerRun(layer, run, images * height * width))]
        steps: list[Step] = []
        if source is None:
            original, source = placement.original(value), placement.place_copy(value, addressing)
            steps.append(Pack(node, value, placement.shapes[value], Packing.to_read(addressing), source, original))
        residual = None if addend is None else placement.regions.get(addend)
        if addend is not None and (residual is None or residual.layout != addressing.target):
            residual = Region(addressing.target, channels)
            original, shape = placement.original(addend), placement.shapes[addend]
            steps.append(Pack(node, addend, shape, Packing.whole(residual.layout), residual, original))
        loop = Loop(layer.coefficients, layer.bias, addressing, choice, layer.limits)
        run = Run(layer.name, layer.density, choice.order, choice.width, choice.parts, loop.bytes)
        record = LayerRun(layer, run, images * height * width)
        return [*steps, cls(node, loop, source, placement.place(node, addressing.target), residual, layer=record)]

    @property
    def scratch_shape(self) -> tuple[int, int]:
        return self.loop.scratch_shape

    def bind(self, workspace: Workspace) -> Callable[[Values], None]:
        residual = None if self.residual is None else workspace.buffer(self.residual)
        source, target = workspace.buffer(self.source), workspace.buffer(self.target)
        call = self.loop.bind(source, target, residual, workspace.scratch(self.scratch_shape))
        return _into(self.node, workspace.view(self.target), call)


@dataclass(eq=False)
class MaxPool(Step):
    """A max pooling from one region into another."""

    window: Window
    source: Region
    target: Region

    @classmethod
    def lower(cls, node: fx.Node, placement: Placement) -> list[Step]:
        """The pooling, if its input lies in a buffer."""
        module = module_of(node)
        if type(module) is not nn.MaxPool2d or module.ceil_mode or module.return_indices or not called_plainly(node):
            return []
        source = placement.regions.get(node.all_input_nodes[0])
        if source is None:
            return []
        sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
        window = Window(*((size, size) if isinstance(size, int) else (size[0], size[1]) for size in sizes))
        images, _, height, width = placement.shapes[node]
        rows, columns = placement.gap((height, width))
        pitch = width + columns
        layout = Layout(images, height, width, height + rows, pitch, rows * pitch + columns)
        return [cls(node, window, source, placement.place(node, layout))]

    @property
    def scratch_shape(self) -> tuple[int, int]:
        span = max(self.source.layout.width, (self.target.layout.width - 1) * self.window.stride[1] + 1)
        length = span + 2 * self.window.padding[1] + self.window.kernel[1] * self.window.dilation[1] + 64
        return 2 * numba.config.NUMBA_NUM_THREADS, length

    def bind(self, workspace: Workspace) -> Callable[[Values], None]:
        source, target = self.source.layout, self.target.layout
        call = partial(
            nonzero.max_pool, source.images, self.source.channels, source.height, source.width, *self.window,
            workspace.buffer(self.source), *source.distances(), target.height, target.width,
            workspace.buffer(self.target), *target.distances(), workspace.scratch(self.scratch_shape),
        )  # fmt: skip
        return _into(self.node, workspace.view(self.target), call)


@dataclass(eq=False)
class GlobalMean(Step):
    """The average over all pixels of each channel of a region."""

    source: Region

    @classmethod
    def lower(cls, node: fx.Node, placement: Placement) -> list[Step]:
        """The average pooling, if it makes one pixel and its input lies in a buffer."""
        module = module_of(node)
        if module is None:
            averages = node.target is F.adaptive_avg_pool2d
            size: Any = node.args[1] if len(node.args) == 2 else node.kwargs.get("output_size")
        else:
            averages = type(module) is nn.AdaptiveAvgPool2d and called_plainly(node)
            size = module.output_size if averages else None
        source = placement.regions.get(node.all_input_nodes[0]) if averages else None
        return [] if source is None or size not in (1, (1, 1), [1, 1]) else [cls(node, source)]

    def bind(self, workspace: Workspace) -> Callable[[Values], None]:
        node, layout, buffer = self.node, self.source.layout, workspace.buffer(self.source)
        shape, distances = (layout.images, self.source.channels), layout.distances()[:3]
        sizes = (*shape, (layout.height - 1) * layout.pitch + layout.width, layout.height * layout.width)

        def run(values: Values) -> None:
            values[node] = means = torch.empty(*shape, 1, 1)
            nonzero.mean(*sizes, buffer, *distances, means.numpy().reshape(-1))

        return run


def _into(node: fx.Node, view: Tensor, call: Callable[[], Any]) -> Callable[[Values], None]:
    """A function that runs a loop and makes the view of the region that it writes the value of a node."""

    def run(values: Values) -> None:
        call()
        values[node] = view

    return run
