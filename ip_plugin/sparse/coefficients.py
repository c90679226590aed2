"""Non-zero coefficients of a convolution, and how they are arranged for the fused loop."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .layout import Floats, Ints


class Coefficients(NamedTuple):
    """Non-zero coefficients, sorted by output channel, input channel, basis filter.

    Attributes:
        outputs, inputs, filters, values: of each coefficient: output channel, input channel, basis filter, value.
        channels: number of output channels.
        basis: ``(filters, taps)``; None for the standard basis.
    """

    outputs: npt.NDArray[np.uint16]
    inputs: npt.NDArray[np.uint16]
    filters: npt.NDArray[np.uint16]
    values: Floats
    channels: int
    basis: Floats | None

    @classmethod
    def of(cls, dense: Floats, groups: int, basis: Floats | None) -> Coefficients:
        """Collect the non-zeros of ``(outputs, inputs / groups, filters)``."""
        outputs, inputs, filters = np.nonzero(dense)
        values = dense[outputs, inputs, filters]
        inputs = inputs + outputs // max(1, len(dense) // groups) * dense.shape[1]
        short = np.uint16
        return cls(outputs.astype(short), inputs.astype(short), filters.astype(short), values, len(dense), basis)

    def composed(self, inputs: int, groups: int, taps: int) -> Coefficients:
        """The same kernels in the standard basis."""
        return self if self.basis is None else Coefficients.of(self.kernels(inputs, groups, taps), groups, None)

    def kernels(self, inputs: int, groups: int, taps: int) -> Floats:
        """Compose the dense kernels, ``(outputs, inputs / groups, taps)``."""
        dense = np.zeros((self.channels, inputs // groups, taps), np.float32)
        group = self.outputs // max(1, self.channels // groups)
        dense[self.outputs, self.inputs - group * (inputs // groups), self.filters] = self.values
        return dense if self.basis is None else dense @ self.basis


def arrange(coefficients: Coefficients, bounds: Ints, taps: int, most: int) -> tuple[int, Ints, Ints, tuple[Any, ...]]:
    """Arrange coefficients for the fused loop, by parts of the output channels and chunks of the input channels.

    For each chunk that loop computes basis-filter responses, as many as fit in the cache, and adds their products with
    the coefficients to the output channels of its part. An output channel in one chunk is a row; rows are sorted by
    their number of coefficients. The first and the last chunk of a part have all of its channels as rows: there, sums
    begin with the bias, and results are written.

    Args:
        coefficients: of a convolution with `taps` basis filters.
        bounds: first output channel of each part, and the end.
        most: responses of a chunk at most, unless one input channel has more.

    Returns:
        The number of chunks of each part; where the responses of each chunk begin, and the end; each response as input
        channel times `taps` plus basis filter; and `row_begin, entry_begin, channels, counts, index, values` as
        `nonzero.fused` takes them.
    """
    parts, outputs = len(bounds) - 1, coefficients.outputs.astype(np.int64)
    part_of_channel = np.repeat(np.arange(parts), np.diff(bounds))
    inputs = int(coefficients.inputs.max(initial=0)) + 1
    read = (part_of_channel[outputs] * inputs + coefficients.inputs) * taps + coefficients.filters
    used, response = np.unique(read, return_inverse=True)
    part = used // (inputs * taps)
    numbers = [_chunk_numbers(used[part == number] // taps, most) for number in range(parts)]
    count = 1 + max(int(number.max(initial=0)) for number in numbers)
    chunk = part * count + np.concatenate(numbers)
    response_begin = np.searchsorted(chunk, np.arange(parts * count + 1))

    chunk = chunk[response]  # of each coefficient
    shape = parts * count, coefficients.channels
    lengths = np.bincount(chunk * shape[1] + outputs, minlength=shape[0] * shape[1]).reshape(shape)
    number = np.arange(parts * count)[:, None] % count
    is_row = (lengths > 0) | (number == 0) | (number == count - 1)
    is_row &= part_of_channel == np.arange(parts * count)[:, None] // count
    row_chunk, channels = np.nonzero(is_row)
    order = np.lexsort((lengths[is_row], row_chunk))
    rows = np.empty_like(lengths)
    rows[row_chunk, channels[order]] = np.arange(len(order))
    sequence = np.argsort(rows[chunk, outputs], kind="stable")
    arrays = (
        np.searchsorted(row_chunk, np.arange(parts * count + 1)).astype(np.uint32),
        np.append(0, lengths.sum(1).cumsum()).astype(np.uint32),
        channels[order].astype(np.uint16),
        lengths[is_row][order].astype(np.uint16),
        (response - response_begin[chunk])[sequence].astype(np.uint16),
        coefficients.values[sequence],
    )
    return count, response_begin, used % (inputs * taps), arrays


def _chunk_numbers(channels: Ints, most: int) -> Ints:
    """Number of the chunk of each response, by its input channel: whole channels, at most so many responses."""
    _, counts = np.unique(channels, return_counts=True)
    numbers, filled, number = np.empty(len(counts), np.int64), 0, 0
    for channel, count in enumerate(counts):
        if filled and filled + count > most:
            number, filled = number + 1, 0
        numbers[channel] = number
        filled += count
    return np.repeat(numbers, counts)
