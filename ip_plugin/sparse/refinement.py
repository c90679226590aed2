"""Choose again how convolutions are run: by timing the whole network.

A loop that is timed alone finds its input in other caches than behind the step that made it.
"""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor

from .program import Program
from .steps import SparseConvolution

#: How often each way is run.
_RUNS = 8
#: A way is taken instead of the one that was best alone if it takes less than this share of the time.
_CLEARLY = 0.98
#: So many layers of a kind are run in all ways.
_LAYERS = 2


def refine(program: Program, inputs: tuple[Tensor, ...]) -> None:
    """Let convolutions run the way that is fastest in their network, of those that took about as long alone.

    Args:
        program: whose steps are exchanged.
        inputs: of its network.
    """
    kinds: dict[int, list[tuple[int, SparseConvolution]]] = defaultdict(list)  # layers of one kind share one choice
    for number, step in enumerate(program.steps):
        if isinstance(step, SparseConvolution) and step.choice.others:
            kinds[id(step.choice)].append((number, step))
    if not kinds:
        return
    ways = {kind: (layers[0][1].choice, *layers[0][1].choice.others) for kind, layers in kinds.items()}
    programs = [program]
    for way in range(1, max(map(len, ways.values()))):
        steps = list(program.steps)
        for kind, layers in kinds.items():
            for number, step in layers[:_LAYERS] if way < len(ways[kind]) else ():
                steps[number] = step.run_by(ways[kind][way])
        programs.append(Program(program.module, steps))
    took = _seconds(programs, inputs)
    for kind, layers in kinds.items():
        times = [sum(seconds[number] for number, _ in layers[:_LAYERS]) for seconds in took[: len(ways[kind])]]
        best = min(range(len(times)), key=times.__getitem__)
        if times[best] < _CLEARLY * times[0]:
            for number, step in layers:
                program.steps[number] = step.run_by(ways[kind][best])


def _seconds(programs: list[Program], inputs: tuple[Tensor, ...]) -> list[list[float]]:
    """Seconds of the steps of programs that take turns in the same memory: of each step the fastest run."""
    workspace = max(programs, key=lambda program: program.scratch).workspace()
    took: list[list[list[float]]] = [[[] for _ in program.steps] for program in programs]
    calls = [program.bind(workspace, took=times) for program, times in zip(programs, took, strict=True)]
    for _ in range(_RUNS):
        for call in calls:
            call(tuple(tensor.clone() for tensor in inputs))
    return [[min(seconds) for seconds in times] for times in took]
