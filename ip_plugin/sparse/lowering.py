"""Lower a traced graph to steps and assign buffers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from .autotune import Chooser
from .elementwise import Concatenation, Elementwise, Scale
from .memory import Region
from .placement import Placement
from .pooling import AveragePool, MaxPool, Mean
from .program import Program
from .steps import SparseConvolution, SparseLinear, Step, Torch

#: Kinds of steps; the first one that can make the value of a node does.
KINDS: tuple[type[Step], ...] = (
    SparseConvolution, SparseLinear, MaxPool, Mean, AveragePool, Concatenation, Elementwise, Scale, Torch,
)  # fmt: skip


def lower(
    module: fx.GraphModule, inputs: tuple[Tensor, ...], choose: Chooser, *, max_offset: int = 2**31 - 1
) -> Program:
    """The program of a traced network.

    Args:
        module: a traced network.
        inputs: of the shapes that it is lowered for.
        choose: how convolutions are run.
        max_offset: largest offset into the input of a sparse convolution.
    """
    placement = Placement(module, inputs, choose, max_offset)
    steps: list[Step] = []
    for node in module.graph.nodes:
        if node.op != "output":
            steps.extend(next(filter(None, (kind.lower(node, placement) for kind in KINDS))))
    program = Program(module, steps)
    _share_buffers(program, inputs)
    return program


def _share_buffers(program: Program, inputs: tuple[Tensor, ...]) -> None:
    """Let regions that are not in use at the same time have one buffer."""
    last_uses, steps = _last_uses(program, inputs), list(enumerate(program.steps))
    first_uses = {region.root: number for number, step in reversed(steps) for region in step.regions}
    overwritten = {
        new: old
        for number, step in steps
        for new, old in step.overwrites.items()
        if number == last_uses[old.root] == first_uses[new.root] and new.root is new and old.root is old
        if (new.layout, new.channels) == (old.layout, old.channels)
    }
    sizes: list[int] = []
    busy_until: list[int] = []
    for region in program.regions:
        free = [buffer for buffer, last in enumerate(busy_until) if last < first_uses[region]]
        if region in overwritten:  # stays in the cache
            free = [overwritten[region].buffer]
        # the one that fits best; if none is large enough, the largest grows
        region.buffer = min(
            free, key=lambda buffer: (sizes[buffer] < region.size, abs(sizes[buffer] - region.size)), default=len(sizes)
        )
        if region.buffer == len(sizes):
            sizes.append(0)
            busy_until.append(0)
        sizes[region.buffer] = max(region.size, sizes[region.buffer])
        busy_until[region.buffer] = last_uses[region]


def _last_uses(program: Program, inputs: tuple[Tensor, ...]) -> dict[Region, int]:
    """Number of the last step that uses each region; run once, to see which values are views of which buffer."""
    workspace = program.workspace()
    owners = {workspace.view(region).untyped_storage().data_ptr(): region for region in program.regions}
    last_uses = {region.root: number for number, step in enumerate(program.steps) for region in step.regions}

    def watch(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor) and (region := owners.get(value.untyped_storage().data_ptr())):
            last_uses[region] = max(last_uses[region], program.last_uses[node])

    program.bind(workspace, watch)(inputs)
    return last_uses
