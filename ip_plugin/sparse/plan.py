"""What the compiled loops run: the non-zero coefficients of a convolution, in the order in which they are read."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .kernels import winograd
from .layout import Floats, Ints


class Entries(NamedTuple):
    """Non-zero coefficients of a convolution, sorted by output channel, input channel, filter of the basis.

    Attributes:
        outputs, inputs, filters, values: of each: output and input channel, filter of the basis, and what it is.
        channels: how many output channels there are.
        basis: ``(filters, taps)``; None for the standard one.
    """

    outputs: npt.NDArray[np.uint16]
    inputs: npt.NDArray[np.uint16]
    filters: npt.NDArray[np.uint16]
    values: Floats
    channels: int
    basis: Floats | None

    @classmethod
    def of(cls, coefficients: Floats, groups: int, basis: Floats | None) -> Entries:
        """The non-zero ones of ``(outputs, inputs / groups, taps)``."""
        outputs, inputs, filters = np.nonzero(coefficients)
        values = coefficients[outputs, inputs, filters]
        members = max(1, len(coefficients) // groups)
        inputs = inputs + outputs // members * coefficients.shape[1]
        narrow = [each.astype(np.uint16) for each in (outputs, inputs, filters)]
        return cls(narrow[0], narrow[1], narrow[2], values, len(coefficients), basis)

    def kernels(self, inputs: int, groups: int, taps: int) -> Floats:
        """Composed: ``(outputs, inputs / groups, taps)``."""
        found = np.zeros((self.channels, inputs // groups, taps), np.float32)
        members = max(1, self.channels // groups)
        local = self.inputs - self.outputs // members * (inputs // groups)
        found[self.outputs, local, self.filters] = self.values
        return found if self.basis is None else found @ self.basis


class Choice(NamedTuple):
    """How a convolution is run.

    Attributes:
        order: ``"direct"``: every non-zero reads its input; ``"fused"``: responses to the basis first;
            ``"winograd"``: dense, at `winograd`'s points.
        width: pixels of a tile; of Winograd's tiles so many at a time.
        parts: into how many parts the output channels are divided.
        budget: bytes of responses at a time.
        narrow: whether responses to a basis are kept as bfloat16.
    """

    order: Literal["direct", "fused", "winograd"]
    width: int
    parts: int = 1
    budget: int = 80_000
    narrow: bool = False

    @property
    def response(self) -> int:
        """Numbers of float32 that a tile of one response takes."""
        return self.width // 2 if self.narrow else self.width


@dataclass(frozen=True)
class Plan:
    """Arrays for one of the loops of `kernels` and `winograd`, which say what they are."""

    choice: Choice
    arrays: tuple[Any, ...]
    responses: int = 0

    @property
    def bytes(self) -> int:
        """Of the arrays."""
        return sum(each.nbytes for each in self.arrays if isinstance(each, np.ndarray))


def make(entries: Entries, offsets: Ints, stride: int, choice: Choice) -> Plan:
    """Lay out the entries.

    Args:
        entries: of the convolution; with a basis only for the order ``"fused"``.
        offsets: of taps, in pixels.
        stride: distance of input channels, in pixels.
        choice: how it is run.
    """
    if choice.order == "winograd":
        return _winograd(entries, choice)
    if choice.order == "direct":
        return _direct(entries, offsets, stride, choice)
    return _fused(entries, offsets, stride, choice)


def _parts(entries: Entries, parts: int) -> Ints:
    """First output channel of each part, and the end: parts of about equally many entries and channels."""
    work = np.bincount(entries.outputs, minlength=entries.channels) + 1
    done = np.concatenate([[0], np.cumsum(work)])
    bounds = np.searchsorted(done, np.linspace(0, done[-1], parts + 1))
    return bounds.clip(0, entries.channels)


def _winograd(entries: Entries, choice: Choice) -> Plan:
    used = np.unique(entries.inputs)
    kernels = entries.kernels(int(used.max(initial=0)) + 1, groups=1, taps=9)
    return Plan(choice, (used, winograd.filters(kernels[:, used]).reshape(-1)))


def _direct(entries: Entries, offsets: Ints, stride: int, choice: Choice) -> Plan:
    counts = np.bincount(entries.outputs, minlength=entries.channels)
    arrays = (
        _parts(entries, choice.parts),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32),
        np.arange(entries.channels, dtype=np.uint16),
        (entries.inputs.astype(np.int64) * stride + offsets[entries.filters]).astype(np.int32),
        entries.values,
    )
    return Plan(choice, arrays)


def _fused(entries: Entries, offsets: Ints, stride: int, choice: Choice) -> Plan:
    taps = len(offsets)
    bounds = _parts(entries, choice.parts)
    most = max(taps, choice.budget // (4 * choice.response))
    pieces = []
    for first, last in pairwise(bounds):
        begin, end = np.searchsorted(entries.outputs, (first, last))
        response = entries.inputs[begin:end].astype(np.int64) * taps + entries.filters[begin:end]
        used, where = np.unique(response, return_inverse=True)
        pieces.append((begin, end, used, where, _chunk_of(used // taps, most)))
    chunks = max(1, *(int(chunk.max(initial=0)) + 1 for *_, chunk in pieces))

    made: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in ("used", "channels", "counts", "index", "values")}
    respond_begin, row_begin, entry_begin = [0], [0], [0]
    largest = 1
    for (begin, end, used, where, chunk), (first, last) in zip(pieces, pairwise(bounds), strict=True):
        outputs, values = entries.outputs[begin:end].astype(np.int64), entries.values[begin:end]
        starts = np.searchsorted(chunk, np.arange(chunks + 1))
        of_entry = chunk[where]
        for number in range(chunks):
            chosen = np.nonzero(of_entry == number)[0]
            counts = np.bincount(outputs[chosen] - first, minlength=last - first)
            rows = np.argsort(counts, kind="stable")
            if 0 < number < chunks - 1:
                rows = rows[counts[rows] > 0]
            rank = np.empty(last - first, np.int64)
            rank[rows] = np.arange(len(rows))
            chosen = chosen[np.argsort(rank[outputs[chosen] - first], kind="stable")]
            made["used"].append(used[starts[number] : starts[number + 1]])
            made["channels"].append(rows + first)
            made["counts"].append(counts[rows])
            made["index"].append(where[chosen] - starts[number])
            made["values"].append(values[chosen])
            respond_begin.append(respond_begin[-1] + len(made["used"][-1]))
            row_begin.append(row_begin[-1] + len(rows))
            entry_begin.append(entry_begin[-1] + len(chosen))
            largest = max(largest, len(made["used"][-1]))
    whole = {name: np.concatenate(parts) for name, parts in made.items()}
    basis = np.empty(0, np.float32) if entries.basis is None else np.ascontiguousarray(entries.basis).reshape(-1)
    arrays = (
        (0,) if choice.narrow else (),
        chunks,
        np.array(respond_begin, np.int32),
        (whole["used"] // taps * stride).astype(np.int32),
        (whole["used"] % taps).astype(np.uint8),
        offsets,
        basis,
        np.array(row_begin, np.uint32),
        np.array(entry_begin, np.uint32),
        whole["channels"].astype(np.uint16),
        whole["counts"].astype(np.uint16),
        whole["index"].astype(np.uint16),
        whole["values"].astype(np.float32),
    )
    return Plan(choice, arrays, largest)


def _chunk_of(channels: Ints, most: int) -> Ints:
    """Number of the chunk of each response, given its input channel: whole channels, at most so many responses."""
    _, counts = np.unique(channels, return_counts=True)
    numbers, filled, number = np.empty(len(counts), np.int64), 0, 0
    for channel, count in enumerate(counts):
        if filled and filled + count > most:
            number, filled = number + 1, 0
        numbers[channel] = number
        filled += count
    return np.repeat(numbers, counts)
