"""A whole network for inference, sparse where that is faster."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from ..errors import SparseExecutionError
from ..reporting.measure import LayerCall
from .autotune import Chooser
from .dense import Dense
from .graph import ROOT, Structure, Traced
from .lowering import lower
from .profile import Profile, profile_of
from .program import Program
from .refinement import refine
from .steps import Run
from .threads import one_at_a_time, share_threads


class SparseNetwork(nn.Module):
    """A network for inference that runs convolutions by their non-zeros where that is faster; `prepare` makes it.

    Its weights are those that the model had then. Floating point inputs are float32 on the CPU; each new shape is
    prepared for once. Calls from several threads at once work in memory of their own.

    Attributes:
        dense: how the whole network is run instead for inputs of one shape, where that is faster; or None.

    Args:
        traced: what `graph.trace` has made of the model.
        choose: how convolutions are run.
        forward: whose parameters `forward` takes: the model's own forward.
    """

    def __init__(self, traced: Traced, choose: Chooser, forward: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.plain, self._structure, self._outputs = traced
        self._choose, self._signature = choose, inspect.signature(forward) if forward else None
        self._programs: dict[tuple[torch.Size, ...], Program] = {}
        self._lock = threading.Lock()
        self.noted: list[LayerCall] | None = None
        self.dense: Dense | None = None

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the model; no gradients.

        Raises:
            SparseExecutionError: the arguments differ from those prepared for by more than shapes and values of
                tensors, a floating point tensor is not float32 on the CPU, or a convolution gets no batch of images.
        """
        program, tensors = self._program(args, kwargs)
        dense = self._dense_for(tensors)
        seconds: list[float] = []
        with one_at_a_time():
            if dense is not None:
                leaves = dense.run(tensors)
            elif self.noted is None:
                leaves = program(tensors)
            else:
                leaves, seconds = program.timed(tensors)
        if self.noted is not None:
            self.noted.extend(_calls(program, dense, seconds))
        return tree_unflatten(leaves, self._outputs)

    def runs(self, *args: Any, **kwargs: Any) -> list[Run]:
        """How each layer is run for inputs of these shapes, in order."""
        program, tensors = self._program(args, kwargs)
        dense = self._dense_for(tensors)
        runs = [step.layer.run for step in program.steps if step.layer is not None]
        return runs if dense is None else [run._replace(how=f"dense by {dense.name}") for run in runs]

    def profile(self, *args: Any, rounds: int = 20, **kwargs: Any) -> Profile:
        """How long each step takes in a call with these arguments: the median of so many calls.

        >>> from ip_plugin.sparse import prepare
        >>> network = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.rand(1, 3, 8, 8))
        >>> [step.layer for step in network.profile(torch.rand(1, 3, 8, 8)) if step.layer]
        ['0']
        """
        program, tensors = self._program(args, kwargs)
        with torch.no_grad(), one_at_a_time():
            return profile_of(program, program.profile(tensors, rounds))

    def first_calls(self) -> list[LayerCall]:
        """Calls of convolutions for the inputs that the network was prepared for, for `ip_plugin.report`."""
        return _calls(next(iter(self._programs.values())), self.dense)

    def extra_repr(self) -> str:
        """Whether it is run dense, and why."""
        return "" if self.dense is None else str(self.dense)

    def _dense_for(self, tensors: tuple[Tensor, ...]) -> Dense | None:
        """The dense way, if inputs of these shapes are run by it."""
        shapes = tuple(tensor.shape for tensor in tensors)
        return self.dense if self.dense is not None and self.dense.shapes == shapes else None

    def layers_by_torch(self) -> dict[str, nn.Module]:
        """Modules with parameters of which torch runs calls, by their names in the model."""
        return {
            name.removeprefix(ROOT).removeprefix("."): module
            for name, module in self.plain.named_modules()
            if name.split(".")[0] == ROOT and module._parameters
        }

    def train(self, mode: bool = True) -> SparseNetwork:  # noqa: ARG002
        """Stays in evaluation mode."""
        return super().train(False)

    def _program(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Program, tuple[Tensor, ...]]:
        """The program for a call, and the tensors that it takes."""
        structure, tensors = Structure.of(args, kwargs)
        if structure != self._structure and kwargs and self._signature is not None:
            with suppress(TypeError):  # the same arguments, given by name
                bound = self._signature.bind(*args, **kwargs)
                structure, tensors = Structure.of(bound.args, bound.kwargs)
        if structure != self._structure:
            raise SparseExecutionError(
                "A sparse network must be called as it was prepared: tensors of any shape, everything else equal.",
                f"{structure}; prepared for {self._structure}",
                "prepare another network with an `example_input` like these arguments",
            )
        for value in tensors:
            check_input(value)
        share_threads()
        key = tuple(value.shape for value in tensors)
        with self._lock:
            if key not in self._programs:
                with one_at_a_time(), torch.random.fork_rng(devices=[]):  # trial runs, which must leave no trace
                    program = lower(self.plain, tuple(map(torch.clone, tensors)), self._choose)
                    refine(program, tensors)
                    self._programs[key] = program
            return self._programs[key], tensors


def _calls(program: Program, dense: Dense | None, seconds: Sequence[float] = ()) -> list[LayerCall]:
    """The layers that a program, whose steps take so long, runs, or a dense way instead."""
    times = [1e3 * took for step, took in zip(program.steps, seconds, strict=False) if step.layer is not None]
    layers = [step.layer for step in program.steps if step.layer is not None]
    if dense is not None:
        how = f"dense by {dense.name}"
        return [LayerCall(r.run.layer, how, 4 * math.prod(r.layer.shape), r.positions) for r in layers]
    milliseconds: Sequence[float | None] = times or [None] * len(layers)
    return [
        LayerCall(layer.run.layer, layer.run.how, layer.run.bytes, layer.positions, took)
        for layer, took in zip(layers, milliseconds, strict=True)
    ]


def check_input(value: Tensor) -> None:
    """Raise SparseExecutionError unless a tensor is on the CPU, and float32 if it is one of floating point numbers."""
    if not value.is_cpu or (value.dtype != torch.float32 and value.is_floating_point()):
        raise SparseExecutionError(
            "A sparse network must be given tensors on the CPU, and floating point numbers as float32.",
            f"{value.dtype} on {value.device}",
            "move model and inputs to the CPU, and to float32: model.cpu().float()",
        )
