"""Steps that pool images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from .addressing import Window
from .convolution import Convolution
from .kernels import images as loops
from .layout import Floats, Ints
from .memory import Region, Workspace
from .nodes import bound, called_plainly, module_of
from .placement import Placement
from .steps import Step, Values, into, read

_MAX = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGE = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_ADAPTIVE = ("input", "output_size")


def _arguments(node: fx.Node, kind: type[nn.Module], function: Any, names: tuple[str, ...]) -> dict[str, Any] | None:
    """The arguments of a pooling, be it a module or a function; None if the node is something else."""
    module = module_of(node)
    if module is not None:
        ours = type(module) is kind and called_plainly(node)
        return {"input": node.args[0], **{name: getattr(module, name) for name in names[1:]}} if ours else None
    return bound(node, *names) if node.op == "call_function" and node.target is function else None


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _constant(arguments: dict[str, Any], placement: Placement) -> bool:
    """Whether a pooling has a batch of images for an input, and numbers for everything else."""
    images = arguments.get("input")
    rest = [value for name, value in arguments.items() if name != "input"]
    return isinstance(images, fx.Node) and placement.is_images(images) and not _nodes(rest)


def _nodes(values: Any) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    fx.node.map_arg(values, nodes.append)
    return nodes


@dataclass(eq=False)
class MaxPool(Step):
    """A max pooling from one region into another."""

    window: Window
    source: Region
    target: Region

    @classmethod
    def lower(cls, node: fx.Node, placement: Placement) -> list[Step]:
        arguments = _arguments(node, nn.MaxPool2d, F.max_pool2d, _MAX)
        if arguments is None or arguments.get("return_indices") or not _constant(arguments, placement):
            return []
        kernel = _pair(arguments["kernel_size"])
        stride = arguments.get("stride")
        others = (_pair(arguments.get(name, default)) for name, default in (("padding", 0), ("dilation", 1)))
        window = Window(kernel, kernel if stride is None else _pair(stride), *others)
        steps, source = read(node, arguments["input"], placement)
        return [*steps, cls(node, window, source, placement.place(node))]

    @property
    def scratch_shape(self) -> tuple[int, int]:
        span = max(self.source.layout.width, (self.target.layout.width - 1) * self.window.stride[1] + 1)
        length = span + 2 * self.window.padding[1] + self.window.kernel[1] * self.window.dilation[1] + 64
        return 2 * numba.config.NUMBA_NUM_THREADS, length

    def bind(self, workspace: Workspace) -> Callable[[Values], None]:
        source, target = self.source.layout, self.target.layout
        call = partial(
            loops.max_pool, source.images, self.source.channels, source.height, source.width, *self.window,
            workspace.buffer(self.source), *source.distances(), target.height, target.width,
            workspace.buffer(self.target), *target.distances(), workspace.scratch(self.scratch_shape),
        )  # fmt: skip
        return into(self.node, workspace.view(self.target), call)


@dataclass(eq=False)
class Mean(Step):
    """The average over all pixels of each channel of a region, into a region if a convolution or a product reads it."""

    shape: torch.Size
    source: Region
    target: Region | None

    @classmethod
    def lower(cls, node: fx.Node, placement: Placement) -> list[Step]:
        value = _whole_mean(node, placement)
        source = placement.regions.get(value) if value is not None else None
        if source is None:
            return []
        small = not any(isinstance(module_of(user), Convolution) for user in node.users)
        keeps_dimensions = len(placement.shapes[node]) == 4
        return [
            cls(node, placement.shapes[node], source, None if small or not keeps_dimensions else placement.place(node))
        ]

    def bind(self, workspace: Workspace) -> Callable[[Values], None]:
        node, layout, buffer = self.node, self.source.layout, workspace.buffer(self.source)
        channels, distances = self.source.channels, layout.distances()[:3]
        sizes = (
            layout.images,
            channels,
            (layout.height - 1) * layout.pitch + layout.width,
            layout.height * layout.width,
        )
        if self.target is not None:
            layout = self.target.layout
            zeros = layout.stride if layout.reach else 0
            target = zeros, workspace.buffer(self.target), *layout.distances()[:3]
            return into(node, workspace.view(self.target), partial(loops.mean, *sizes, buffer, *distances, *target))
        means = torch.empty(self.shape)
        return into(
            node, means, partial(loops.mean, *sizes, buffer, *distances, 0, means.numpy().reshape(-1), 0, 1, channels)
        )


def _whole_mean(node: fx.Node, placement: Placement) -> fx.Node | None:
    """The value whose pixels a node averages in each channel; None if it does something else."""
    adaptive = _arguments(node, nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, _ADAPTIVE)
    if adaptive is not None and _constant(adaptive, placement) and adaptive["output_size"] in (1, (1, 1), [1, 1]):
        return adaptive["input"]  # type: ignore[no-any-return]
    if (node.op == "call_method" and node.target == "mean") or (
        node.op == "call_function" and node.target is torch.mean
    ):
        mean = bound(node, "input", "dim", "keepdim")
        if (
            mean is not None
            and _constant(mean, placement)
            and sorted(d % 4 for d in _listed(mean.get("dim"))) == [2, 3]
        ):
            return mean["input"]  # type: ignore[no-any-return]
    return None


def _listed(value: Any) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else []


@dataclass(eq=False)
class AveragePool(Step):
    """An average pooling from one region into another.

    Attributes:
        rows, columns: of each of the output: the first one of the input, the end, and a factor for their sum.
    """

    rows: tuple[Ints, Ints, Floats]
    columns: tuple[Ints, Ints, Floats]
    source: Region
    target: Region

    @classmethod
    def lower(cls, node: fx.Node, placement: Placement) -> list[Step]:
        arguments = _arguments(node, nn.AvgPool2d, F.avg_pool2d, _AVERAGE)
        adaptive = _arguments(node, nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, _ADAPTIVE)
        known = arguments if adaptive is None else adaptive
        if known is None or not _constant(known, placement):
            return []
        sizes = list(zip(placement.shapes[known["input"]][2:], placement.shapes[node][2:], strict=True))
        if arguments is None:
            rows, columns = (_adaptive(*size) for size in sizes)
        else:
            kernel = _pair(arguments["kernel_size"])
            stride = _pair(arguments.get("stride") or kernel)
            padding, whole = _pair(arguments.get("padding", 0)), arguments.get("count_include_pad", True)
            windows = zip(sizes, kernel, stride, padding, strict=True)
            rows, columns = (_windows(*size, k, s, p, whole) for size, k, s, p in windows)
            if divisor := arguments.get("divisor_override"):
                rows, columns = (
                    (*rows[:2], np.full_like(rows[2], 1 / divisor)),
                    (*columns[:2], np.ones_like(columns[2])),
                )
        steps, source = read(node, known["input"], placement)
        return [*steps, cls(node, rows, columns, source, placement.place(node))]

    @property
    def scratch_shape(self) -> tuple[int, int]:
        return numba.config.NUMBA_NUM_THREADS, self.source.layout.width + 16

    def bind(self, workspace: Workspace) -> Callable[[Values], None]:
        source, target = self.source.layout, self.target.layout
        call = partial(
            loops.average_pool, source.images, self.source.channels, source.width, *self.rows, *self.columns,
            workspace.buffer(self.source), *source.distances(), workspace.buffer(self.target), *target.distances(),
            workspace.scratch(self.scratch_shape),
        )  # fmt: skip
        return into(self.node, workspace.view(self.target), call)


def _windows(size: int, count: int, kernel: int, stride: int, padding: int, whole: bool) -> tuple[Ints, Ints, Floats]:
    """Where the windows begin and end along one side, and one over the number of pixels; with padding if `whole`."""
    begin = np.arange(count, dtype=np.int64) * stride - padding
    end = np.minimum(begin + kernel, size + padding)
    pixels = end - begin
    begin, end = begin.clip(0), end.clip(max=size)
    return begin, end, (1 / (pixels if whole else end - begin)).astype(np.float32)


def _adaptive(size: int, count: int) -> tuple[Ints, Ints, Floats]:
    """Likewise, for windows that cover everything."""
    number = np.arange(count, dtype=np.int64)
    begin, end = number * size // count, -(-(number + 1) * size // count)
    return begin, end, (1 / (end - begin)).astype(np.float32)
