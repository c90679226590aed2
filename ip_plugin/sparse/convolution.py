"""One convolution on buffers, and the loops that run it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numba
import numpy as np

from . import plan
from .kernels import nonzero, winograd
from .kernels.vectors import lanes
from .layout import Floats, aligned
from .places import Places
from .plan import Choice, Entries, Plan

_NOTHING = np.empty(0, np.float32)


class LoopedConvolution(ABC):
    """A convolution that is run by a loop of our own, on buffers; `looped` makes it.

    Args:
        entries: its coefficients.
        bias: of output channels.
        where: layouts, and taps.
        choice: how it is run.
        limits: what results are clamped to.
    """

    def __init__(
        self, entries: Entries, bias: Floats, where: Places, choice: Choice, limits: tuple[float, float]
    ) -> None:
        self.bias, self.where, self.choice = bias, where, choice
        self.limits = np.float32(limits[0]), np.float32(limits[1])
        self.plan: Plan = plan.make(entries, where.offsets, where.source.stride * len(where.phases), choice)
        self._residual = (where.target.first, where.target.stride)

    def scratch(self) -> Floats:
        """Memory for one call at a time."""
        rows, columns = self.scratch_shape()
        return aligned(rows * columns).reshape(rows, columns)

    @abstractmethod
    def scratch_shape(self) -> tuple[int, int]:
        """Of what a call needs to work with, float32; not to be used by two calls at once."""

    @abstractmethod
    def __call__(self, source: Floats, target: Floats, scratch: Floats, residual: Floats | None = None) -> None:
        """Read one buffer, write the other."""

    def _added(self, residual: Floats | None) -> tuple[Floats, int, int]:
        """The residual, its first pixel and the distance of its channels, which is 0 where there is none."""
        return (_NOTHING, 0, 0) if residual is None else (residual, *self._residual)


def looped(
    entries: Entries, bias: Floats, where: Places, choice: Choice,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> LoopedConvolution:  # fmt: skip
    """A convolution that is run as it was chosen; arguments as of `LoopedConvolution`."""
    kind = _AtPoints if choice.order == "winograd" else _ByNonzeros
    return kind(entries, bias, where, choice, limits)


class _ByNonzeros(LoopedConvolution):
    """The loops of `kernels`."""

    def __init__(
        self, entries: Entries, bias: Floats, where: Places, choice: Choice, limits: tuple[float, float]
    ) -> None:
        super().__init__(entries, bias, where, choice, limits)
        self._first = where.source.first
        target = where.target
        tiles = -(-target.pixels // choice.width)
        self._head = (lanes(choice.width), tiles, choice.parts, *self.plan.arrays, self.bias, target.stored())
        self._to = (target.first, target.stride, *target.around(tiles * choice.width))

    def scratch_shape(self) -> tuple[int, int]:
        if self.choice.order == "direct":
            return 0, 0
        size = self.plan.responses * self.choice.response + len(self.bias) * self.choice.width
        return numba.config.NUMBA_NUM_THREADS, size

    def __call__(self, source: Floats, target: Floats, scratch: Floats, residual: Floats | None = None) -> None:
        common = (source, self._first, *self._added(residual), *self.limits, target, *self._to)
        if self.choice.order == "direct":
            nonzero.direct(*self._head, *common)
        else:
            nonzero.fused(*self._head, *common, scratch, self.plan.responses)


class _AtPoints(LoopedConvolution):
    """The loop of `winograd`."""

    def __init__(
        self, entries: Entries, bias: Floats, where: Places, choice: Choice, limits: tuple[float, float]
    ) -> None:
        super().__init__(entries, bias, where, choice, limits)
        across = -(-where.target.width // winograd.TILE)
        rows = max(1, choice.width // across)
        self._tiles = -(-rows * across // 16) * 16
        read, made = where.source, where.target
        self._head = (
            rows, self._tiles, choice.parts, *self.plan.arrays, self.bias,
            *winograd.borders(self._tiles, across), made.images, made.height, made.width,
        )  # fmt: skip
        self._from = read.distances()
        self._to = (made.first, made.stride, made.reach)

    def scratch_shape(self) -> tuple[int, int]:
        return numba.config.NUMBA_NUM_THREADS, winograd.memory(len(self.plan.arrays[0]), self._tiles)

    def __call__(self, source: Floats, target: Floats, scratch: Floats, residual: Floats | None = None) -> None:
        added = self._added(residual)
        winograd.winograd(*self._head, source, *self._from, *added, *self.limits, target, *self._to, scratch)
