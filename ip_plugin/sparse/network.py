"""A whole network for inference, sparse where that is faster."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numba
import torch
from torch import Tensor

from ..errors import SparseExecutionError
from ..reporting.measure import Prepared
from ..reporting.table import Row
from . import autotune
from .graph import Network
from .lowering import compiled
from .program import Dense, Looped, Program, execute


class Run(NamedTuple):
    """How a convolution of a sparse network is run.

    Attributes:
        layer: name of the module.
        density: share of its coefficients that are not zero.
        how: ``"direct"`` (each non-zero reads its input), ``"fused"`` (responses to the basis first),
            ``"winograd"`` (dense, with a quarter of the multiplications), ``"dense"`` (torch).
        width, parts: pixels of a tile (of Winograd's tiles: how many at a time), and parts of the output channels; 0
            where it is dense.
        bytes: of coefficients and positions, or of the dense kernels.
    """

    layer: str
    density: float
    how: str
    width: int
    parts: int
    bytes: int


class SparseNetwork(Prepared):
    """A network for inference that runs convolutions by their non-zeros where that is faster; `prepare` makes it.

    It has the values that the model had then. Inputs are float32 on the CPU; each new shape is prepared for once. Calls
    from several threads at once work in memory of their own.
    """

    def __init__(self, network: Network, choose: autotune.Chooser) -> None:
        super().__init__()
        self.plain = network.module
        self._network, self._choose = network, choose
        self._programs: dict[tuple[torch.Size, ...], Program] = {}
        self._lock = threading.Lock()

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Any:
        """The outputs of the model; no gradients.

        Raises:
            SparseExecutionError: an input is no float32 tensor on the CPU.
        """
        for each in inputs:
            check_input(each)
        program = self._program(inputs)
        with _one_at_a_time(), program.workspace() as workspace:
            return execute(self._network, program, workspace, inputs)

    def runs(self, *inputs: Tensor) -> list[Run]:
        """How each convolution is run for inputs of these shapes, in order."""
        return [_run(step) for step in self._program(inputs).steps if isinstance(step, (Looped, Dense))]

    def rows(self, calls: Sequence[tuple[Tensor, ...]]) -> list[Row]:
        """Of each convolution, for `ip_plugin.report`, which lists what is left to torch itself.

        Args:
            calls: inputs; if there are none, it is said how the inputs are run that the network was prepared for.
        """
        programs = [self._program(inputs) for inputs in calls] or [next(iter(self._programs.values()))]
        shapes = [self._network.shapes(inputs) for inputs in calls]
        steps: dict[str, list[tuple[int, Looped | Dense]]] = {}
        for number, program in enumerate(programs):
            for step in program.steps:
                if isinstance(step, (Looped, Dense)):
                    steps.setdefault(step.convolution.name, []).append((number, step))
        first_user: dict[bytes, str] = {}
        rows = []
        for name, taken in steps.items():
            positions = None
            if calls:
                positions = sum(shapes[number][step.node].numel() for number, step in taken)
                positions //= taken[0][1].convolution.entries.channels
            rows.append(_row(name, taken, positions, first_user))
        return rows

    def train(self, mode: bool = True) -> SparseNetwork:  # noqa: ARG002
        """Stays in evaluation mode."""
        return super().train(False)

    def _program(self, inputs: tuple[Tensor, ...]) -> Program:
        _share_threads()
        key = tuple(each.shape for each in inputs)
        with self._lock:
            if key not in self._programs:
                self._programs[key] = compiled(self._network, inputs, self._choose)
            return self._programs[key]


def _share_threads() -> None:
    """Give numba as many threads as torch has. OpenMP has one number for both, which numba sets when it begins."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _run(step: Looped | Dense) -> Run:
    name, density = step.convolution.name, step.convolution.density
    if isinstance(step, Dense):
        return Run(name, density, "dense", 0, 0, step.weight.numel() * step.weight.element_size())
    choice = step.run.choice
    return Run(name, density, choice.order, choice.width, choice.parts, step.run.plan.bytes)


def _row(
    name: str, taken: Sequence[tuple[int, Looped | Dense]], positions: int | None, first_user: dict[bytes, str]
) -> Row:
    """Of a convolution, from its steps with the numbers of their programs."""
    convolution, runs = taken[0][1].convolution, [_run(step) for _, step in taken]
    shape = (convolution.entries.channels, convolution.inputs // convolution.groups, *convolution.window.kernel)
    parameters, nonzeros = math.prod(shape), len(convolution.entries.values)
    basis = convolution.entries.basis
    owner = "" if basis is None else first_user.setdefault(basis.tobytes(), name)
    narrow = min(convolution.inputs, convolution.entries.channels)
    transform = 0 if basis is None else basis.size * narrow
    return Row(
        layer=name,
        space="spatial" if basis is None else "interspace",
        shape=shape,
        parameters=parameters,
        nonzeros=nonzeros,
        sparsity=1 - nonzeros / parameters if parameters else 0.0,
        basis=owner,
        basis_parameters=basis.size if basis is not None and owner == name else 0,
        bytes_dense=4 * parameters,
        bytes_sparse=sum(run.bytes for (number, _), run in zip(taken, runs, strict=True) if number == 0),
        macs_dense=None if positions is None else positions * parameters,
        macs_nonzero=None if positions is None else positions * nonzeros,
        macs_basis=None if positions is None else positions * transform,
        runs=", ".join(dict.fromkeys(run.how for run in runs)),
    )


_SERIAL = threading.Lock()


def _one_at_a_time() -> AbstractContextManager[object]:
    """Numba's own threads, which it has where there is neither OpenMP nor TBB, can serve one call at a time."""
    try:
        return _SERIAL if numba.threading_layer() == "workqueue" else nullcontext()
    except ValueError:  # nothing has run yet
        return _SERIAL


def check_input(value: Any) -> None:
    """Raise SparseExecutionError unless it is a float32 tensor on the CPU."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.device.type != "cpu":
        found = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        raise SparseExecutionError(
            "A sparse network must be given float32 tensors on the CPU.",
            found,
            "move model and inputs to the CPU, and to float32: model.cpu().float()",
        )
