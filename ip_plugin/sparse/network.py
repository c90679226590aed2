"""A whole network for inference, sparse where that is faster."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numba
import torch
from torch import Tensor, fx

from ..errors import SparseExecutionError
from ..reporting.measure import Prepared
from ..reporting.table import Row
from .autotune import Chooser
from .lowering import lower
from .program import Program
from .steps import LayerRun, Run


class SparseNetwork(Prepared):
    """A network for inference that runs convolutions by their non-zeros where that is faster; `prepare` makes it.

    Its weights are those that the model had then. Inputs are float32 on the CPU; each new shape is prepared for once.
    Calls from several threads at once work in memory of their own.

    Args:
        plain: what `graph.trace` has made of the model.
        choose: how convolutions are run.
    """

    def __init__(self, plain: fx.GraphModule, choose: Chooser) -> None:
        super().__init__()
        self.plain: fx.GraphModule = plain
        self._choose = choose
        self._programs: dict[tuple[torch.Size, ...], Program] = {}
        self._lock = threading.Lock()

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Any:
        """The outputs of the model; no gradients.

        Raises:
            SparseExecutionError: an input is no float32 tensor on the CPU, or a convolution gets no batch of images.
        """
        for value in inputs:
            check_input(value)
        program = self._program(inputs)
        with _one_at_a_time():
            return program(inputs)

    def runs(self, *inputs: Tensor) -> list[Run]:
        """How each convolution is run for inputs of these shapes, in order."""
        return [step.layer.run for step in self._program(inputs).steps if step.layer is not None]

    def rows(self, calls: Sequence[tuple[Tensor, ...]]) -> list[Row]:
        """Rows of the convolutions for `ip_plugin.report`, which itself lists the layers that torch runs.

        Args:
            calls: inputs of each call; if there are none, the rows say how the inputs are run that the network was
                prepared for.
        """
        programs = [self._program(inputs) for inputs in calls] or [next(iter(self._programs.values()))]
        owners: dict[bytes, str] = {}
        first = _layers(programs[:1])
        return [
            _row(runs, sum(record.run.bytes for record in first[name]), bool(calls), owners)
            for name, runs in _layers(programs).items()
        ]

    def train(self, mode: bool = True) -> SparseNetwork:  # noqa: ARG002
        """Stays in evaluation mode."""
        return super().train(False)

    def _program(self, inputs: tuple[Tensor, ...]) -> Program:
        _share_threads()
        key = tuple(value.shape for value in inputs)
        with self._lock:
            if key not in self._programs:
                self._programs[key] = lower(self.plain, inputs, self._choose)
            return self._programs[key]


def _layers(programs: Sequence[Program]) -> dict[str, list[LayerRun]]:
    """Layers that programs run, by name."""
    layers: dict[str, list[LayerRun]] = {}
    for record in (step.layer for program in programs for step in program.steps if step.layer is not None):
        layers.setdefault(record.run.layer, []).append(record)
    return layers


def _row(runs: Sequence[LayerRun], stored: int, counted: bool, owners: dict[bytes, str]) -> Row:
    """The row of a layer.

    Args:
        runs: of the layer.
        stored: bytes of its coefficients and positions.
        counted: whether `runs` are those of known calls, so that multiply-adds can be counted.
        owners: of bases: the first layer that uses them; changed in place.
    """
    layer, basis = runs[0].layer, runs[0].layer.coefficients.basis
    parameters, nonzeros = math.prod(layer.shape), len(layer.coefficients.values)
    owner = "" if basis is None else owners.setdefault(basis.tobytes(), layer.name)
    transform = 0 if basis is None else basis.size * min(layer.inputs, layer.coefficients.channels)
    positions = sum(record.positions for record in runs)
    return Row(
        layer=layer.name,
        space="spatial" if basis is None else "interspace",
        shape=layer.shape,
        parameters=parameters,
        nonzeros=nonzeros,
        sparsity=1 - nonzeros / parameters if parameters else 0.0,
        basis=owner,
        basis_parameters=basis.size if basis is not None and owner == layer.name else 0,
        bytes_dense=4 * parameters,
        bytes_sparse=stored,
        macs_dense=positions * parameters if counted else None,
        macs_nonzero=positions * nonzeros if counted else None,
        macs_basis=positions * transform if counted else None,
        runs=", ".join(dict.fromkeys(record.run.how for record in runs)),
    )


def _share_threads() -> None:
    """Give numba as many threads as torch has; OpenMP has one number for both, which numba sets when it starts."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


_SERIAL = threading.Lock()


def _one_at_a_time() -> AbstractContextManager[object]:
    """A lock where numba has neither OpenMP nor TBB: its own threads can serve one call at a time."""
    try:
        return _SERIAL if numba.threading_layer() == "workqueue" else nullcontext()
    except ValueError:  # no loop has run yet
        return _SERIAL


def check_input(value: Any) -> None:
    """Raise SparseExecutionError unless a value is a float32 tensor on the CPU."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.device.type != "cpu":
        raise SparseExecutionError(
            "A sparse network must be given float32 tensors on the CPU.",
            f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__,
            "move model and inputs to the CPU, and to float32: model.cpu().float()",
        )
