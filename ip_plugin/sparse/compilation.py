"""How the program of a sparse network is made: what each step reads and writes, and in which buffer that lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from . import tuning
from .convolution import Window, looped, places
from .graph import Convolution, Network, changes_a_value
from .layout import Layout
from .program import Dense, Laid, Looped, Mean, Pool, Program, Step, Torch, Workspace, execute

#: Offsets into buffers are of 32 bits.
_FARTHEST = 2**31 - 1


def compiled(network: Network, inputs: tuple[Tensor, ...], choose: tuning.Chooser) -> Program:
    """The program for inputs of these shapes; run once, to see which values are views of which buffer."""
    shapes = network.shapes(inputs)
    gaps: dict[tuple[int, ...], tuple[int, int]] = {}
    for each in network.convolutions.values():
        size, (rows, columns) = shapes[each.source][2:], gaps.get(shapes[each.source][2:], (0, 0))
        if not each.window.steps:
            gaps[size] = max(rows, each.window.padding[0]), max(columns, each.window.padding[1])

    steps: list[Step] = []
    slots: list[int] = []
    laid: dict[fx.Node, Laid] = {}

    def new(layout: Layout, channels: int) -> Laid:
        slots.append(layout.size(channels))
        return Laid(len(slots) - 1, layout, channels)

    modules = dict(network.module.named_modules())
    copied: set[fx.Node] = set()
    for node in network.module.graph.nodes:
        if node in network.drawn_in:
            continue
        convolution = network.convolutions.get(node)
        if convolution is None and node in network.poolings and node.args[0] in laid:
            pooled = _pool(node, network.poolings[node], shapes, gaps, laid, new)
            steps.append(pooled)
            laid[node] = pooled.target
            continue
        if convolution is None and node in network.means and node.all_input_nodes[0] in laid:
            steps.append(Mean(node, laid[node.all_input_nodes[0]]))
            continue
        if convolution is None:
            steps.append(Torch(node))
            if changes_a_value(node, modules):  # which a copy does not see
                laid = {each: at for each, at in laid.items() if each not in copied}
            continue
        step = _looped(node, convolution, shapes, gaps, laid, new, choose)
        if step is None:
            steps.append(Dense(node, convolution, convolution.weight()))
            continue
        steps.append(step)
        laid[node] = step.target
        if step.packs[0] and not convolution.window.steps:
            laid[convolution.source] = step.source
            copied.add(convolution.source)
    program = Program(steps, slots, _last_uses(steps))
    return _shared(network, program, inputs)


def _looped(
    node: fx.Node, convolution: Convolution, shapes: dict[fx.Node, torch.Size],
    gaps: dict[tuple[int, ...], tuple[int, int]], laid: dict[fx.Node, Laid],
    new: Callable[[Layout, int], Laid], choose: tuning.Chooser,
) -> Looped | None:  # fmt: skip
    images, channels, height, width = shapes[convolution.source]
    gap = gaps.get(shapes[node][2:], (0, 0))
    source = laid.get(convolution.source)
    where = None
    if source is not None:
        where = places(convolution.window, images, height, width, gap, source.layout)
    packs = where is None
    if where is None:
        here = gaps.get((height, width), (0, 0))
        gap = max(gap[0], here[0]), max(gap[1], here[1])
        where = places(convolution.window, images, height, width, gap)
        assert where is not None
    if channels * len(where.phases) * where.source.stride > _FARTHEST:
        return None
    choice = choose(convolution, where, (height, width), packs)
    if choice is None:
        return None
    if packs:
        source = new(where.source, channels * len(where.phases))
    target = new(where.target, shapes[node][1])
    residual, packs_residual = None, False
    if convolution.residual is not None:
        residual = laid.get(convolution.residual)
        packs_residual = residual is None or residual.layout != where.target
        if packs_residual:
            residual = new(where.target, shapes[node][1])
    run = looped(convolution.entries, convolution.bias, where, choice, convolution.limits)
    assert source is not None
    return Looped(node, convolution, run, source, target, residual, (packs, packs_residual))


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
