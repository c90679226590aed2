"""What a sparse network does for inputs of one shape: steps, in order, on buffers that they use in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .convolution import LoopedConvolution
from .graph import Convolution, Network
from .images import Images, copy, mean, pack, pool
from .layout import Layout, aligned
from .places import Window

_FREE = (-math.inf, math.inf)


@dataclass(frozen=True)
class Laid:
    """Where a value lies: at the beginning of a buffer that values which are not alive together use in turn.

    Attributes:
        slot: number of the buffer.
        layout, channels: how, and how many.
    """

    slot: int
    layout: Layout
    channels: int


@dataclass(frozen=True)
class Step:
    """Makes the value of a node."""

    node: fx.Node

    @property
    def laid(self) -> tuple[Laid, ...]:
        """What it reads and writes in buffers."""
        return ()


@dataclass(frozen=True)
class Looped(Step):
    """A step: a convolution by a loop of our own. `source` and `residual` are packed first where `packs` says so."""

    convolution: Convolution
    run: LoopedConvolution
    source: Laid
    target: Laid
    residual: Laid | None
    packs: tuple[bool, bool]

    @property
    def laid(self) -> tuple[Laid, ...]:
        """Source and target, and residual if there is one."""
        return (self.source, self.target) if self.residual is None else (self.source, self.target, self.residual)


@dataclass(frozen=True)
class Pool(Step):
    """A step: a max pooling from one buffer into another."""

    window: Window
    source: Laid
    target: Laid

    @property
    def laid(self) -> tuple[Laid, ...]:
        """Source and target."""
        return self.source, self.target


@dataclass(frozen=True)
class Mean(Step):
    """A step: averages of what lies in a buffer."""

    source: Laid

    @property
    def laid(self) -> tuple[Laid, ...]:
        """The source."""
        return (self.source,)


@dataclass(frozen=True)
class Dense(Step):
    """A step: a convolution by torch."""

    convolution: Convolution
    weight: Tensor


@dataclass(frozen=True)
class Torch(Step):
    """A step: a node as torch runs it."""


@dataclass
class Program:
    """Steps for one shape of inputs.

    Attributes:
        steps: in order.
        slots: how many numbers each buffer has.
        last: values that nothing reads after a step.
        spare: workspaces that no call uses now.
    """

    steps: list[Step]
    slots: list[int]
    last: dict[fx.Node, list[fx.Node]]
    spare: list[Workspace] = field(default_factory=list)

    @contextmanager
    def workspace(self) -> Iterator[Workspace]:
        """One that no other call uses meanwhile."""
        try:
            found = self.spare.pop()
        except IndexError:
            found = Workspace(self)
        try:
            yield found
        finally:
            self.spare.append(found)


class Workspace:
    """The memory that one call at a time works in."""

    def __init__(self, program: Program) -> None:
        self.buffers = [aligned(size) for size in program.slots]
        looped = [step for step in program.steps if isinstance(step, Looped)]
        shapes = [step.run.scratch_shape() for step in looped]
        whole = aligned(max((rows * columns for rows, columns in shapes), default=0))
        self.scratch = {
            step.node: whole[: rows * columns].reshape(rows, columns)
            for step, (rows, columns) in zip(looped, shapes, strict=True)
        }

        made = [step for step in program.steps if isinstance(step, (Looped, Pool))]
        self.views = {
            step.node: step.target.layout.view(self.buffers[step.target.slot], step.target.channels) for step in made
        }
        self.images = {node: Images.of(view) for node, view in self.views.items()}

    def images_of(self, node: fx.Node, values: dict[fx.Node, Any]) -> Images:
        """Where the value of a node lies."""
        found = self.images.get(node)
        return Images.of(values[node]) if found is None else found


def execute(
    network: Network, program: Program, workspace: Workspace, inputs: tuple[Tensor, ...],
    watch: Callable[[fx.Node, Any], None] | None = None,
) -> Any:  # fmt: skip
    """Run all steps.

    Args:
        network: what the program is of.
        program: its steps.
        workspace: that no other call uses.
        inputs: of the shapes that the program is for.
        watch: called with each node and its value.

    Returns:
        The outputs, in memory of their own.
    """
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for step in program.steps:
        node = step.node
        if isinstance(step, Looped):
            values[node] = _run_looped(step, workspace, values)
        elif isinstance(step, Pool):
            read, write = workspace.buffers[step.source.slot], workspace.buffers[step.target.slot]
            pool(step.window, step.source.layout, step.source.channels, step.target.layout, read, write)
            values[node] = workspace.views[node]
        elif isinstance(step, Mean):
            values[node] = mean(step.source.layout, step.source.channels, workspace.buffers[step.source.slot])
        elif isinstance(step, Dense):
            values[node] = _run_dense(step, values)
        elif node.op == "placeholder":
            values[node] = next(given)
        else:
            arguments, named = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                return _owned(arguments[0])
            values[node] = _call(network.module, node, arguments, named)
        if watch is not None:
            watch(node, values[node])
        for each in program.last.get(node, ()):
            values.pop(each, None)
    raise AssertionError("a graph ends with its output")


def _run_looped(step: Looped, workspace: Workspace, values: dict[fx.Node, Any]) -> Tensor:
    convolution, run = step.convolution, step.run
    source, target = workspace.buffers[step.source.slot], workspace.buffers[step.target.slot]
    if step.packs[0]:
        pack(workspace.images_of(convolution.source, values), run.where, convolution.window, source)
    residual = None
    if step.residual is not None:
        residual = workspace.buffers[step.residual.slot]
        if step.packs[1]:
            assert convolution.residual is not None
            copy(workspace.images_of(convolution.residual, values), step.residual.layout, residual)
    run(source, target, workspace.scratch[step.node], residual)
    return workspace.views[step.node]


def _run_dense(step: Dense, values: dict[fx.Node, Any]) -> Tensor:
    convolution, bias = step.convolution, torch.from_numpy(step.convolution.bias)
    made = F.conv2d(values[convolution.source], step.weight, bias, *convolution.window[1:], convolution.groups)
    if convolution.residual is not None:
        made += values[convolution.residual]
    return made if convolution.limits == _FREE else made.clamp_(*convolution.limits)


def _call(module: fx.GraphModule, node: fx.Node, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    if node.op == "call_function":
        return node.target(*arguments, **named)  # type: ignore[operator]
    if node.op == "call_method":
        return getattr(arguments[0], str(node.target))(*arguments[1:], **named)
    found: Any = module
    for name in str(node.target).split("."):
        found = getattr(found, name)
    return found if node.op == "get_attr" else found(*arguments, **named)


def _owned(value: Any) -> Any:
    """Outputs that no later call writes to."""
    return fx.node.map_aggregate(value, lambda each: each.clone() if isinstance(each, Tensor) else each)
