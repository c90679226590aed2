"""Lower a traced graph to steps and assign memory."""

from __future__ import annotations

from itertools import accumulate
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
    _share_memory(program, inputs)
    return program


def _share_memory(program: Program, inputs: tuple[Tensor, ...]) -> None:
    """Let regions that are not in use at the same time lie in the same memory, as far in front as they fit."""
    last_uses, steps = _last_uses(program, inputs), list(enumerate(program.steps))
    first_uses = {region.root: number for number, step in reversed(steps) for region in step.regions}
    overwritten = {
        new: old
        for number, step in steps
        for new, old in step.overwrites.items()
        if number == last_uses[old.root] == first_uses[new.root] and old.root is old
        if (new.layout, new.channels) == (old.layout, old.channels)
    }
    placed: list[Region] = []
    for region in program.regions:
        placed = [other for other in placed if last_uses[other] >= first_uses[region]]
        region.offset = 0
        for other in sorted(placed, key=lambda other: other.offset):
            if other.offset - region.offset >= region.size:
                break
            region.offset = other.offset + other.size
        if region in overwritten:  # stays in the cache
            region.offset = overwritten[region].offset
        placed.append(region)


def _last_uses(program: Program, inputs: tuple[Tensor, ...]) -> dict[Region, int]:
    """Number of the last step that uses each region; run once, to see which values are views of which region."""
    ends = accumulate(region.size for region in program.regions)
    for region, end in zip(program.regions, ends, strict=True):  # each in memory of its own
        region.offset = end - region.size
    workspace = program.workspace()
    owners = {workspace.view(region).untyped_storage().data_ptr(): region for region in program.regions}
    last_uses = {region.root: number for number, step in enumerate(program.steps) for region in step.regions}

    def watch(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor) and (region := owners.get(value.untyped_storage().data_ptr())):
            last_uses[region] = max(last_uses[region], program.last_uses[node])

    program.bind(workspace, watch)(inputs)
    return last_uses
