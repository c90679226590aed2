"""What a sparse network does for inputs of one shape: steps, in order."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, fx

from .memory import Workspace
from .steps import Step, Values

Call = Callable[[tuple[Tensor, ...]], Any]


class Program:
    """Steps, in order, for all nodes of a traced network but the output, for inputs of one shape.

    Calls from several threads at once work in memory of their own.

    Attributes:
        regions: of all steps, each once.
        last_uses: number of the step that reads the value of a node last; of outputs, the number of steps.
    """

    def __init__(self, module: fx.GraphModule, steps: list[Step]) -> None:
        self.steps, self.module = steps, module
        self.regions = list(dict.fromkeys(region.root for step in steps for region in step.regions))
        *_, self._output = module.graph.nodes
        nodes = [*((step.node, *step.node.all_input_nodes) for step in steps), tuple(self._output.all_input_nodes)]
        self.last_uses = {node: number for number, used in enumerate(nodes) for node in used}
        self._unused: list[list[fx.Node]] = [[] for _ in nodes]
        for node, number in self.last_uses.items():
            self._unused[number].append(node)
        self._spare: list[Call] = []

    def __call__(self, inputs: tuple[Tensor, ...]) -> Any:
        """Run all steps; the outputs have memory of their own."""
        try:
            call = self._spare.pop()
        except IndexError:
            call = self.bind(self.workspace())
        try:
            return call(inputs)
        finally:
            self._spare.append(call)

    @property
    def scratch(self) -> int:
        """Length of the working memory of a step, at most."""
        return max((math.prod(step.scratch_shape) for step in self.steps), default=0)

    def workspace(self) -> Workspace:
        """Memory for one call at a time."""
        return Workspace(self.module, self.regions, self.scratch)

    def timed(self, inputs: tuple[Tensor, ...]) -> tuple[Any, list[float]]:
        """Run all steps once; the outputs, and the seconds of each step."""
        took: list[list[float]] = [[] for _ in self.steps]
        outputs = self.bind(self.workspace(), took=took)(inputs)
        return outputs, [seconds[0] for seconds in took]

    def profile(self, inputs: tuple[Tensor, ...], rounds: int) -> list[float]:
        """Median seconds of each step."""
        took: list[list[float]] = [[] for _ in self.steps]
        call = self.bind(self.workspace(), took=took)
        for _ in range(rounds + 1):
            call(inputs)
        return [statistics.median(times[1:]) for times in took]

    def bind(
        self,
        workspace: Workspace,
        watch: Callable[[fx.Node, Any], None] | None = None,
        took: list[list[float]] | None = None,
    ) -> Call:
        """A function that runs all steps in a workspace.

        Args:
            workspace: its memory.
            watch: gets each node with every part of its value.
            took: of each step, a list that its seconds are appended to.
        """
        output = self._output.args[0]
        runs = [(step.node, step.bind(workspace)) for step in self.steps]
        if took is not None:
            runs = [(node, partial(_timed, run, took, number)) for number, (node, run) in enumerate(runs)]
        steps = [(*run, unused) for run, unused in zip(runs, self._unused, strict=False)]

        def call(inputs: tuple[Tensor, ...]) -> Any:
            workspace.interpreter.args_iter = iter(inputs)
            values: Values = {}
            for node, run, unused in steps:
                run(values)
                if watch is not None:
                    fx.node.map_aggregate(values.get(node), partial(watch, node))
                for other in unused:
                    del values[other]
            return fx.node.map_aggregate(fx.node.map_arg(output, values.__getitem__), _owned)

        return call


def _timed(run: Callable[[Values], None], took: list[list[float]], number: int, values: Values) -> None:
    """Run a step, and note how long that took."""
    begin = perf_counter()
    run(values)
    took[number].append(perf_counter() - begin)


def _owned(value: Any) -> Any:
    """An output that no later call writes to, as ordinary in memory as torch's."""
    return value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
