"""How the program of a sparse network is made: what each step reads and writes, and in which buffer that lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from . import autotune
from .convolution import looped
from .graph import Convolution, Network, changes_a_value
from .layout import Layout
from .places import Places, Window, beside, places
from .program import Dense, Laid, Looped, Mean, Pool, Program, Step, Torch, Workspace, execute

#: Offsets into buffers are of 32 bits.
_FARTHEST = 2**31 - 1


@dataclass
class _Placed:
    """Where values lie, as far as a program is made.

    Attributes:
        laid: by node.
        copied: which of them are copies.
        dealt: what was dealt out by phases, for which convolution, and how.
    """

    laid: dict[fx.Node, Laid] = field(default_factory=dict)
    copied: set[fx.Node] = field(default_factory=set)
    dealt: dict[fx.Node, tuple[Laid, Window, Places]] = field(default_factory=dict)

    def add(self, step: Looped) -> None:
        """What a step has made, and what it has packed."""
        source, window = step.convolution.source, step.convolution.window
        self.laid[step.node] = step.target
        if step.packs[0] and window.steps:
            self.dealt[source] = step.source, window, step.run.where
        elif step.packs[0]:
            self.laid[source] = step.source
            self.copied.add(source)

    def forget_copies(self) -> None:
        """They do not see that a value is changed."""
        self.laid = {node: laid for node, laid in self.laid.items() if node not in self.copied}
        self.dealt.clear()

    def read(
        self, convolution: Convolution, height: int, width: int, gap: tuple[int, int]
    ) -> tuple[Laid, Places] | None:
        """Where a convolution finds its input, if that lies in a way that it can read."""
        window = convolution.window
        if convolution.source in self.dealt:
            laid, dealt, beside_it = self.dealt[convolution.source]
            where = beside(window, height, width, dealt, beside_it)
            if where is not None:
                return laid, where
        if convolution.source in self.laid:
            laid = self.laid[convolution.source]
            where = places(window, laid.layout.images, height, width, gap, laid.layout)
            if where is not None:
                return laid, where
        return None


def compiled(network: Network, inputs: tuple[Tensor, ...], choose: autotune.Chooser) -> Program:
    """The program for inputs of these shapes; run once, to see which values are views of which buffer."""
    shapes = network.shapes(inputs)
    gaps: dict[tuple[int, ...], tuple[int, int]] = {}
    for each in network.convolutions.values():
        size, (rows, columns) = shapes[each.source][2:], gaps.get(shapes[each.source][2:], (0, 0))
        if not each.window.steps:
            gaps[size] = max(rows, each.window.padding[0]), max(columns, each.window.padding[1])

    steps: list[Step] = []
    slots: list[int] = []
    placed = _Placed()

    def new(layout: Layout, channels: int) -> Laid:
        slots.append(layout.size(channels))
        return Laid(len(slots) - 1, layout, channels)

    modules = dict(network.module.named_modules())
    for node in network.module.graph.nodes:
        if node in network.drawn_in:
            continue
        convolution = network.convolutions.get(node)
        if convolution is None and node in network.poolings and node.args[0] in placed.laid:
            pooled = _pool(node, network.poolings[node], shapes, gaps, placed.laid, new)
            steps.append(pooled)
            placed.laid[node] = pooled.target
            continue
        if convolution is None and node in network.means and node.all_input_nodes[0] in placed.laid:
            steps.append(Mean(node, placed.laid[node.all_input_nodes[0]]))
            continue
        if convolution is None:
            steps.append(Torch(node))
            if changes_a_value(node, modules):
                placed.forget_copies()
            continue
        step = _looped(node, convolution, shapes, gaps, placed, new, choose)
        if step is None:
            steps.append(Dense(node, convolution, convolution.weight()))
            continue
        steps.append(step)
        placed.add(step)
    program = Program(steps, slots, _last_uses(steps))
    return _shared(network, program, inputs)


def _looped(
    node: fx.Node, convolution: Convolution, shapes: dict[fx.Node, torch.Size],
    gaps: dict[tuple[int, ...], tuple[int, int]], placed: _Placed,
    new: Callable[[Layout, int], Laid], choose: autotune.Chooser,
) -> Looped | None:  # fmt: skip
    images, channels, height, width = shapes[convolution.source]
    gap = gaps.get(shapes[node][2:], (0, 0))
    found = placed.read(convolution, height, width, gap)
    if found is None:
        here = gaps.get((height, width), (0, 0))
        gap = max(gap[0], here[0]), max(gap[1], here[1])
        where = places(convolution.window, images, height, width, gap)
        assert where is not None
    else:
        where = found[1]
    if channels * len(where.phases) * where.source.stride > _FARTHEST:
        return None
    choice = choose(convolution, where, (height, width), found is None)
    if choice is None:
        return None
    source = new(where.source, channels * len(where.phases)) if found is None else found[0]
    target = new(where.target, shapes[node][1])
    residual, packs_residual = None, False
    if convolution.residual is not None:
        residual = placed.laid.get(convolution.residual)
        packs_residual = residual is None or residual.layout != where.target
        if packs_residual:
            residual = new(where.target, shapes[node][1])
    run = looped(convolution.entries, convolution.bias, where, choice, convolution.limits)
    return Looped(node, convolution, run, source, target, residual, (found is None, packs_residual))


def _pool(
    node: fx.Node, window: Window, shapes: dict[fx.Node, torch.Size], gaps: dict[tuple[int, ...], tuple[int, int]],
    laid: dict[fx.Node, Laid], new: Callable[[Layout, int], Laid],
) -> Pool:  # fmt: skip
    source = laid[node.all_input_nodes[0]]
    images, channels, height, width = shapes[node]
    rows, columns = gaps.get((height, width), (0, 0))
    pitch = width + columns
    layout = Layout(images, height, width, height + rows, pitch, rows * pitch + columns)
    return Pool(node, window, source, new(layout, channels))


def _reads(step: Step) -> list[fx.Node]:
    if isinstance(step, (Looped, Dense)):
        return [each for each in (step.convolution.source, step.convolution.residual) if each is not None]
    return step.node.all_input_nodes


def _last_uses(steps: list[Step]) -> dict[fx.Node, list[fx.Node]]:
    last: dict[fx.Node, fx.Node] = {}
    for step in steps:
        for each in (step.node, *_reads(step)):
            last[each] = step.node
    by_step: dict[fx.Node, list[fx.Node]] = {}
    for each, step_node in last.items():
        by_step.setdefault(step_node, []).append(each)
    return by_step


def _shared(network: Network, program: Program, inputs: tuple[Tensor, ...]) -> Program:
    """The same program with as few buffers as can be: run once, to see which values are views of which buffer."""
    workspace = Workspace(program)
    owner = {torch.from_numpy(each).untyped_storage().data_ptr(): slot for slot, each in enumerate(workspace.buffers)}
    ends = [0] * len(program.slots)
    begins = [len(program.steps)] * len(program.slots)
    number = {step.node: place for place, step in enumerate(program.steps)}
    use: dict[fx.Node, int] = {each: number[step] for step, nodes in program.last.items() for each in nodes}
    for place, step in enumerate(program.steps):
        for laid in step.laid:
            begins[laid.slot] = min(begins[laid.slot], place)
            ends[laid.slot] = max(ends[laid.slot], place)

    def watch(node: fx.Node, value: Any) -> None:
        for each in _tensors(value):
            slot = owner.get(each.untyped_storage().data_ptr())
            if slot is not None:
                ends[slot] = max(ends[slot], use[node])

    execute(network, program, workspace, inputs, watch)

    sizes: list[int] = []
    busy_until: list[int] = []
    place_of: dict[int, int] = {}
    for slot in sorted(range(len(program.slots)), key=begins.__getitem__):
        size = program.slots[slot]
        free = [each for each in range(len(sizes)) if busy_until[each] < begins[slot]]
        # the one that fits best; if none is large enough, the largest grows
        chosen = min(free, key=lambda each: (sizes[each] < size, abs(sizes[each] - size)), default=len(sizes))
        if chosen == len(sizes):
            sizes.append(0)
            busy_until.append(0)
        sizes[chosen], busy_until[chosen] = max(size, sizes[chosen]), ends[slot]
        place_of[slot] = chosen

    def moved(laid: Laid) -> Laid:
        return replace(laid, slot=place_of[laid.slot])

    steps: list[Step] = []
    for step in program.steps:
        if isinstance(step, (Looped, Pool)):
            step = replace(step, source=moved(step.source), target=moved(step.target))
        if isinstance(step, Looped) and step.residual is not None:
            step = replace(step, residual=moved(step.residual))
        if isinstance(step, Mean):
            step = replace(step, source=moved(step.source))
        steps.append(step)
    return Program(steps, sizes, program.last)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [each for item in value for each in _tensors(item)]
    return []
