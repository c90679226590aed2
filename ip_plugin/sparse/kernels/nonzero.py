"""Compiled loops for sparse convolutions and sparse linear layers.

All arrays are flat. A tile is a number of neighbouring pixels of one channel, and a tap of a kernel is an offset
(`layout`). Inputs `X` are read, and outputs `Y` written, beyond the end of the images by less than a tile; what is read
there is never stored.

A work item of a convolution is a tile of pixels and a part of the output channels. Each item adds in a fixed order, so
results do not depend on the number of threads.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite.binding import get_host_cpu_features

from .activations import activate, activated_number
from .jit import helper, inline, parallel, serial
from .vectors import (
    add,
    broadcast,
    clamp_max,
    clamp_min,
    fma,
    keep,
    load,
    load_responses,
    moved,
    multiply,
    store,
    store_responses,
    store_zeros,
)

#: Rows of 16 lanes in four vector registers. It takes eight to keep a machine busy while additions wait for those
#: before, so tiles of no more than four are summed up in two halves.
_FOUR_REGISTERS = 4 if get_host_cpu_features().get("avx512f") else 2
_ONE, _TWO = np.uintp(1), np.uintp(2)
#: 32 lanes: so many pixels of nine taps stay in registers while basis filters are applied to them.
_HALF = (0, 0)


@inline
def _finish(lanes, values, channel, tile, tiles, bits, R, r0, ldr, kind, low, high, Y, y0, ldy, before, behind):
    """Add the residual, activate, zero the gaps and store; with zeros before the first tile and after the last one."""
    pixel = tile * 16 * len(lanes)
    if ldr > 0:
        values = add(values, load(lanes, R, r0 + channel * ldr + pixel))
    if kind == 0:
        values = clamp_max(clamp_min(values, broadcast(lanes, low)), broadcast(lanes, high))
        store(Y, y0 + channel * ldy + pixel, keep(bits, tile * 2 * len(lanes), values))
    else:
        store(Y, y0 + channel * ldy + pixel, values)
        activate(kind, low, len(lanes), bits, tile * 2 * len(lanes), Y, y0 + channel * ldy + pixel)
    if tile == 0:
        store_zeros(before, Y, y0 + channel * ldy - before)
    if tile == tiles - 1:
        store_zeros(behind, Y, y0 + channel * ldy + pixel + 16 * len(lanes))


@inline
def _add_products(lanes, total, j, end, offsets, values, X, x):
    """Add the products of entries `j` to `end` with the inputs at their offsets."""
    if len(lanes) <= _FOUR_REGISTERS:
        other = broadcast(lanes, np.float32(0))
        while j + _ONE < end:
            k = j + _ONE
            total = fma(broadcast(lanes, values[j]), load(lanes, X, x + offsets[j]), total)
            other = fma(broadcast(lanes, values[k]), load(lanes, X, x + offsets[k]), other)
            j += _TWO
        total = add(total, other)
    while j < end:
        total = fma(broadcast(lanes, values[j]), load(lanes, X, x + offsets[j]), total)
        j += _ONE
    return total


@parallel
def direct(
    lanes, tiles, parts, begin, row_begin, offsets, values, bias, bits, X, x0, R, r0, ldr, kind, low, high,
    Y, y0, ldy, before, behind
):  # fmt: skip
    """A convolution by rows of (offset, value): every non-zero reads its shifted input.

    Args:
        lanes: width of a tile.
        tiles: number of tiles.
        parts, begin: part `p` makes the channels ``begin[p]`` to ``begin[p + 1]``.
        row_begin: channel `c` has the entries ``row_begin[c]`` to ``row_begin[c + 1]``.
        offsets, values: of entries.
        bias: of channels.
        bits: which pixels are stored; the others become zero.
        X, x0: input, and its first pixel.
        R, r0, ldr: residual, its first pixel and the distance between its channels, which is 0 if there is none.
        kind, low, high: the activation, as of `activations`.
        Y, y0, ldy: output, its first pixel and the distance between its channels.
        before, behind: zeros that each channel needs before its tiles, and after them, in whole vectors of 16.
    """
    for item in numba.prange(tiles * parts):
        tile = item // parts
        part = item - tile * parts
        x = x0 + tile * 16 * len(lanes)
        for channel in range(begin[part], begin[part + 1]):
            first = np.uintp(row_begin[channel])
            end = np.uintp(row_begin[channel + 1])
            total = _add_products(lanes, broadcast(lanes, bias[channel]), first, end, offsets, values, X, x)
            _finish(lanes, total, channel, tile, tiles, bits, R, r0, ldr, kind, low, high, Y, y0, ldy, before, behind)


@parallel
def columns(
    lanes, tiles, parts, begin, row_begin, rows, columns, offsets, values, bias, bits, X, x0, R, r0, ldr,
    kind, low, high, Y, y0, ldy, before, behind
):  # fmt: skip
    """A convolution by sums for each column of its kernels, whose loads are aligned: the sums are moved, not the input.

    A tile consists of whole rows, or of whole images with rows of 8 pixels, where each tap has a sum of its own. So
    what a sum needs from outside a tile is zero.

    Args:
        row_begin: the sum `s` of channel `c` has the entries ``row_begin[c * sums + s]`` to the next one.
        rows, columns: of sums: how far behind the pixels that they are added to they are read; rows of 8 pixels.
        others: as in `direct`; offsets are multiples of 16.
    """
    sums = len(columns)
    for item in numba.prange(tiles * parts):
        tile = item // parts
        part = item - tile * parts
        x = x0 + tile * 16 * len(lanes)
        for channel in range(begin[part], begin[part + 1]):
            total = broadcast(lanes, bias[channel])
            for number in range(sums):
                first = np.uintp(row_begin[channel * sums + number])
                end = np.uintp(row_begin[channel * sums + number + 1])
                made = _add_products(lanes, broadcast(lanes, np.float32(0)), first, end, offsets, values, X, x)
                for _ in range(-rows[number]):
                    made = moved(made, -8)
                for _ in range(rows[number]):
                    made = moved(made, 8)
                for _ in range(-columns[number]):
                    made = moved(made, -1)
                for _ in range(columns[number]):
                    made = moved(made, 1)
                total = add(total, made)
            _finish(lanes, total, channel, tile, tiles, bits, R, r0, ldr, kind, low, high, Y, y0, ldy, before, behind)


@serial
def scale(values, inputs, scales, out):
    """Multiply each value with the number of its input channel."""
    for j in range(len(values)):
        out[j] = values[j] * scales[np.intp(inputs[j])]


@helper
def _respond_9(width, bfloat16, G, first, last, source, used, offsets, X, pixel, buffer, b0):
    """Responses to basis filters with nine taps, which stay in registers."""
    size = width >> len(bfloat16)
    o0, o1, o2, o3, o4, o5, o6, o7, o8 = (
        offsets[0], offsets[1], offsets[2], offsets[3], offsets[4], offsets[5], offsets[6], offsets[7], offsets[8],
    )  # fmt: skip
    j = first
    while j < last:
        channel = source[j]
        end = j + 1
        while end < last and source[end] == channel:
            end += 1
        for part in range(0, width, 32):
            z = pixel + channel + part
            v0 = load(_HALF, X, z + o0)
            v1 = load(_HALF, X, z + o1)
            v2 = load(_HALF, X, z + o2)
            v3 = load(_HALF, X, z + o3)
            v4 = load(_HALF, X, z + o4)
            v5 = load(_HALF, X, z + o5)
            v6 = load(_HALF, X, z + o6)
            v7 = load(_HALF, X, z + o7)
            v8 = load(_HALF, X, z + o8)
            for n in range(j, end):
                g = np.intp(used[n]) * 9
                p = multiply(broadcast(_HALF, G[g]), v0)
                q = multiply(broadcast(_HALF, G[g + 1]), v1)
                p = fma(broadcast(_HALF, G[g + 2]), v2, p)
                q = fma(broadcast(_HALF, G[g + 3]), v3, q)
                p = fma(broadcast(_HALF, G[g + 4]), v4, p)
                q = fma(broadcast(_HALF, G[g + 5]), v5, q)
                p = fma(broadcast(_HALF, G[g + 6]), v6, p)
                q = fma(broadcast(_HALF, G[g + 7]), v7, q)
                p = fma(broadcast(_HALF, G[g + 8]), v8, p)
                store_responses(bfloat16, buffer, b0 + (n - first) * size + (part >> len(bfloat16)), add(p, q))
        j = end


@helper
def _respond(lanes, width, bfloat16, G, first, last, source, used, offsets, X, pixel, buffer, b0):
    """Responses to basis filters with any number of taps: up to four that read one channel at a time."""
    size = width >> len(bfloat16)
    taps = len(offsets)
    a = first
    while a < last:
        end = a + 1
        while end < min(a + 4, last) and source[end] == source[a]:
            end += 1
        b = min(a + 1, end - 1)  # of fewer than four the last one is computed again
        c = min(a + 2, end - 1)
        d = end - 1
        for part in range(0, width, 16 * len(lanes)):
            z = pixel + source[a] + part
            p = broadcast(lanes, np.float32(0))
            q = p
            r = p
            s = p
            for tap in range(taps):
                values = load(lanes, X, z + offsets[tap])
                p = fma(broadcast(lanes, G[np.intp(used[a]) * taps + tap]), values, p)
                q = fma(broadcast(lanes, G[np.intp(used[b]) * taps + tap]), values, q)
                r = fma(broadcast(lanes, G[np.intp(used[c]) * taps + tap]), values, r)
                s = fma(broadcast(lanes, G[np.intp(used[d]) * taps + tap]), values, s)
            at = b0 + (part >> len(bfloat16)) - first * size
            store_responses(bfloat16, buffer, at + a * size, p)
            store_responses(bfloat16, buffer, at + b * size, q)
            store_responses(bfloat16, buffer, at + c * size, r)
            store_responses(bfloat16, buffer, at + d * size, s)
        a = end


@helper
def _unfold(width, bfloat16, first, last, source, used, offsets, X, pixel, buffer, b0):
    """Responses to the standard basis: shifted copies."""
    size = width >> len(bfloat16)
    for n in range(first, last):
        for part in range(0, width, 32):
            values = load(_HALF, X, pixel + source[n] + offsets[used[n]] + part)
            store_responses(bfloat16, buffer, b0 + (n - first) * size + (part >> len(bfloat16)), values)


@parallel
def fused(
    lanes, tiles, parts, responses, bfloat16, chunks, respond_begin, source, used, offsets, G, row_begin, entry_begin,
    channels, counts, index, values, bias, bits, X, x0, R, r0, ldr, kind, low, high, Y, y0, ldy, before, behind, scratch
):  # fmt: skip
    """A convolution by chunks of input channels: responses to basis filters, then rows of (response, value).

    Args:
        lanes, tiles, parts, bias, bits, X, x0, R, r0, ldr, kind, low, high, Y, y0, ldy, before, behind: as in `direct`.
        responses: of a chunk, at most.
        bfloat16: dtype of responses: a tuple of one number for bfloat16, an empty one for float32.
        chunks: of each part; those of part `p` begin at ``p * chunks``.
        respond_begin: chunk `c` makes the responses ``respond_begin[c]`` to ``respond_begin[c + 1]``.
        source, used: of responses: offset of the input channel, and basis filter.
        offsets: of taps.
        G: the basis, row by row; empty for the standard basis.
        row_begin, entry_begin: where the rows, and the entries, of each chunk begin.
        channels, counts: of rows: output channel, and number of entries.
        index, values: of entries: response of the chunk, and coefficient.
        scratch: a row for each thread: tiles of the responses, then sums of the output channels.
    """
    for item in numba.prange(tiles * parts):
        width = 16 * len(lanes)
        tile = item // parts
        part = item - tile * parts
        pixel = tile * width
        buffer = scratch[numba.get_thread_id()]
        size = width >> len(bfloat16)
        sums = responses * size
        for chunk in range(part * chunks, (part + 1) * chunks):
            first = np.intp(respond_begin[chunk])
            last = np.intp(respond_begin[chunk + 1])
            rest = first, last, source, used, offsets, X, x0 + pixel, buffer, 0
            if len(G) == 0:
                _unfold(width, bfloat16, *rest)
            elif len(offsets) == 9:
                _respond_9(width, bfloat16, G, *rest)
            else:
                _respond(lanes[:_FOUR_REGISTERS], width, bfloat16, G, *rest)
            begins = chunk == part * chunks
            ends = chunk == (part + 1) * chunks - 1
            j = np.uintp(entry_begin[chunk])
            for row in range(row_begin[chunk], row_begin[chunk + 1]):
                channel = np.intp(channels[row])
                if begins:  # noqa: SIM108
                    total = broadcast(lanes, bias[channel])
                else:
                    total = load(lanes, buffer, sums + channel * width)
                end = j + np.uintp(counts[row])
                if len(lanes) <= _FOUR_REGISTERS:
                    other = broadcast(lanes, np.float32(0))
                    while j + _ONE < end:
                        response = load_responses(lanes, bfloat16, buffer, np.intp(index[j]) * size)
                        total = fma(broadcast(lanes, values[j]), response, total)
                        response = load_responses(lanes, bfloat16, buffer, np.intp(index[j + _ONE]) * size)
                        other = fma(broadcast(lanes, values[j + _ONE]), response, other)
                        j += _TWO
                    total = add(total, other)
                while j < end:
                    response = load_responses(lanes, bfloat16, buffer, np.intp(index[j]) * size)
                    total = fma(broadcast(lanes, values[j]), response, total)
                    j += _ONE
                if ends:
                    _finish(
                        lanes, total, channel, tile, tiles, bits, R, r0, ldr, kind, low, high,
                        Y, y0, ldy, before, behind,
                    )  # fmt: skip
                else:
                    store(buffer, sums + channel * width, total)


@parallel
def linear(parts, begin, row_begin, inputs, values, bias, X, ldx, kind, low, high, Y, ldy):
    """A linear layer by rows of (input, value), for few rows of inputs.

    Args:
        parts, begin: part `p` makes the outputs ``begin[p]`` to ``begin[p + 1]``.
        row_begin: output `r` has the entries ``row_begin[r]`` to ``row_begin[r + 1]``.
        inputs, values: of entries.
        bias: of outputs.
        X, ldx, Y, ldy: inputs and outputs, and the distances between their rows.
        kind, low, high: the activation, as of `activations`.
    """
    for part in numba.prange(parts):
        for row in range(begin[part], begin[part + 1]):
            first = np.intp(row_begin[row])
            last = np.intp(row_begin[row + 1])
            for image in range(len(X) // ldx):
                x = image * ldx
                a = np.float32(0)
                b = np.float32(0)
                c = np.float32(0)
                d = np.float32(0)
                j = first
                while j + 4 <= last:
                    a += values[j] * X[x + np.intp(inputs[j])]
                    b += values[j + 1] * X[x + np.intp(inputs[j + 1])]
                    c += values[j + 2] * X[x + np.intp(inputs[j + 2])]
                    d += values[j + 3] * X[x + np.intp(inputs[j + 3])]
                    j += 4
                while j < last:
                    a += values[j] * X[x + np.intp(inputs[j])]
                    j += 1
                Y[image * ldy + row] = activated_number(kind, low, high, bias[row] + ((a + b) + (c + d)))
