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

    A step behind that is no convolution and reads what one has made, as a pooling, counts with it: how long it takes
    depends on which core made what.

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
        counted = [number for first, _ in layers[:_LAYERS] for number in _with_reader(program, first)]
        times = [sum(seconds[number] for number in counted) for seconds in took[: len(ways[kind])]]
        best = min(range(len(times)), key=times.__getitem__)
        if times[best] < _CLEARLY * times[0]:
            for number, step in layers:
                program.steps[number] = step.run_by(ways[kind][best])


def _with_reader(program: Program, number: int) -> list[int]:
    """Numbers of a convolution's step and of the next one, if that is none and reads what the convolution makes."""
    step, *behind = program.steps[number : number + 2]
    assert isinstance(step, SparseConvolution)
    reads = any(step.target in other.regions for other in behind if not isinstance(other, SparseConvolution))
    return [number, number + 1] if reads else [number]


def _seconds(programs: list[Program], inputs: tuple[Tensor, ...]) -> list[list[float]]:
    """Seconds of the steps of programs that take turns in the same memory: of each step the fastest run."""
    workspace = max(programs, key=lambda program: program.scratch).workspace()
    took: list[list[list[float]]] = [[[] for _ in program.steps] for program in programs]
    calls = [program.bind(workspace, took=times) for program, times in zip(programs, took, strict=True)]
    for _ in range(_RUNS):
        for call in calls:
            call(tuple(tensor.clone() for tensor in inputs))
    return [[min(seconds) for seconds in times] for times in took]
