"""Compiled loops for the channel-major layout: packing, pooling, averages, and sparse convolutions.

All arrays are flat. A tile is a number of neighbouring pixels of one channel, and a tap of a kernel is an offset
(`layout`). Inputs `X` are read, and outputs `Y` written, beyond the end of the images by less than a tile; what is read
there is never stored.

A work item of a convolution is a tile of pixels and a part of the output channels. Each item adds in a fixed order, so
results do not depend on the number of threads.
"""

from __future__ import annotations

import numba
import numpy as np

from .jit import helper, inline, parallel, serial
from .vectors import (
    add,
    broadcast,
    clamp_max,
    clamp_min,
    evens,
    fma,
    keep,
    leading,
    load,
    load_responses,
    maximum,
    multiply,
    store,
    store_responses,
)

#: 32 lanes: so many pixels of nine taps stay in registers while basis filters are applied to them.
_HALF = (0, 0)
#: 16 lanes, for copies.
_ROW = (0,)


@inline
def _zero(count, Y, y):
    """Store zeros, in whole vectors."""
    for k in range(0, count, 16):
        store(Y, y + k, broadcast(_ROW, np.float32(0)))


@inline
def _finish(lanes, values, channel, tile, tiles, bits, R, r0, ldr, low, high, Y, y0, ldy, before, behind):
    """Add the residual, clamp, zero the gaps and store; with zeros before the first tile and after the last one."""
    pixel = tile * 16 * len(lanes)
    if ldr > 0:
        values = add(values, load(lanes, R, r0 + channel * ldr + pixel))
    values = clamp_max(clamp_min(values, broadcast(lanes, low)), broadcast(lanes, high))
    store(Y, y0 + channel * ldy + pixel, keep(bits, tile * 2 * len(lanes), values))
    if tile == 0:
        _zero(before, Y, y0 + channel * ldy - before)
    if tile == tiles - 1:
        _zero(behind, Y, y0 + channel * ldy + pixel + 16 * len(lanes))


@helper
def _copy_row(count, X, x, step, Y, y):
    """Copy every `step`-th number, and fill up the last vector with zeros."""
    for k in range(0, count, 16):
        at = x + k * step
        if step == 1 and at + 16 <= len(X):
            store(Y, y + k, leading(count - k, load(_ROW, X, at)))
        elif step == 2 and at + 32 <= len(X):
            store(Y, y + k, leading(count - k, evens(load(_ROW, X, at), load(_ROW, X, at + 16))))
        else:
            for lane in range(16):
                Y[y + k + lane] = X[at + lane * step] if k + lane < count else np.float32(0)


@parallel
def pack(images, channels, phases, X, of_image, of_channel, of_row, of_column, down, right, Y, y0, ldy, ldi, pitch):
    """Copy images, split into phases of every n-th row and column, with zeros around them.

    Args:
        images, channels: how many.
        phases: of each: first row and column of the input, row and column where they go, numbers of rows and columns.
        X, of_image, of_channel, of_row, of_column: input, and its strides.
        down, right: distance of the rows, and of the columns, of one phase.
        Y, y0, ldy, ldi, pitch: output, its first pixel, and the distances between channels, images and rows.
    """
    for channel in numba.prange(channels):
        for phase in range(len(phases)):
            row, column, at_row, at_column, rows, columns = phases[phase]
            begin = (channel * len(phases) + phase) * ldy
            _zero(ldy, Y, begin)
            for image in range(images):
                x = image * of_image + channel * of_channel + row * of_row + column * of_column
                y = begin + y0 + image * ldi + at_row * pitch + at_column
                for r in range(rows):  # in this order: zeros after a row may lie in the next one
                    _copy_row(columns, X, x + r * down * of_row, right * of_column, Y, y + r * pitch)


@parallel
def max_pool(
    images, channels, height, width, kernel, stride, padding, dilation, X, x0, ldx, ldi, pitch,
    out_height, out_width, Y, y0, ldy, ldo, out_pitch, scratch
):  # fmt: skip
    """Max pooling, with zeros around its images.

    Args:
        images, channels, height, width: of the input.
        kernel, stride, padding, dilation: as torch names them; two numbers each, rows first.
        X, x0, ldx, ldi, pitch: input, its first pixel, and the distances between channels, images and rows.
        out_height, out_width: of the output.
        Y, y0, ldy, ldo, out_pitch: output, likewise.
        scratch: two rows for each thread: maxima over the rows of a window, with padding, and then over its columns.
    """
    for channel in numba.prange(channels):
        lowest = np.float32(-np.inf)
        span = (out_width - 1) * stride[1] + 1
        line = scratch[2 * numba.get_thread_id()]
        maxima = scratch[2 * numba.get_thread_id() + 1]
        for x in range(0, len(line) - 15, 16):
            store(line, x, broadcast(_ROW, lowest))
        _zero(ldy, Y, channel * ldy)
        for image in range(images):
            for y in range(out_height):
                for x in range(0, width, 16):
                    most = broadcast(_ROW, lowest)
                    for k in range(kernel[0]):
                        row = y * stride[0] - padding[0] + k * dilation[0]
                        if 0 <= row < height:
                            at = x0 + channel * ldx + image * ldi + row * pitch + x
                            most = maximum(most, load(_ROW, X, at))
                    store(line, padding[1] + x, most)
                for x in range(padding[1] + width, len(line) - 15, 16):
                    store(line, x, broadcast(_ROW, lowest))
                for x in range(0, span, 16):
                    most = load(_ROW, line, x)
                    for k in range(1, kernel[1]):
                        most = maximum(most, load(_ROW, line, x + k * dilation[1]))
                    store(maxima, x, most)
                at = y0 + channel * ldy + image * ldo + y * out_pitch
                _copy_row(out_width, maxima, 0, stride[1], Y, at)


@serial
def mean(images, channels, length, count, X, x0, ldx, ldi, Y):
    """The average of all pixels of each channel.

    Args:
        images, channels: how many.
        length, count: numbers from the first to the last pixel of an image, gaps included, which are zero; its pixels.
        X, x0, ldx, ldi: input, its first pixel, and the distances between channels and images.
        Y: output, ``(images, channels)``, flat.
    """
    lanes = np.empty(16, np.float32)
    for channel in range(channels):
        for image in range(images):
            at = x0 + channel * ldx + image * ldi
            total = broadcast(_ROW, np.float32(0))
            for k in range(0, length, 16):
                total = add(total, leading(length - k, load(_ROW, X, at + k)))
            store(lanes, 0, total)
            Y[image * channels + channel] = lanes.sum() / np.float32(count)


@parallel
def direct(
    lanes, tiles, parts, begin, row_begin, channels, offsets, values, bias, bits, X, x0, R, r0, ldr, low, high,
    Y, y0, ldy, before, behind
):  # fmt: skip
    """A convolution by rows of (offset, value): every non-zero reads its shifted input.

    Args:
        lanes: width of a tile.
        tiles: number of tiles.
        parts, begin: part `p` has the rows ``begin[p]`` to ``begin[p + 1]``.
        row_begin, channels: row `r` has the entries ``row_begin[r]`` to ``row_begin[r + 1]``, and makes this channel.
        offsets, values: of entries.
        bias: of channels.
        bits: which pixels are stored; the others become zero.
        X, x0: input, and its first pixel.
        R, r0, ldr: residual, its first pixel and the distance between its channels, which is 0 if there is none.
        low, high: what results are clamped to.
        Y, y0, ldy: output, its first pixel and the distance between its channels.
        before, behind: zeros that each channel needs before its tiles, and after them, in whole vectors of 16.
    """
    for item in numba.prange(tiles * parts):
        width = 16 * len(lanes)
        tile = item // parts
        part = item - tile * parts
        pixel = tile * width
        for row in range(begin[part], begin[part + 1]):
            channel = np.intp(channels[row])
            total = broadcast(lanes, bias[channel])
            for j in range(row_begin[row], row_begin[row + 1]):
                total = fma(broadcast(lanes, values[j]), load(lanes, X, x0 + pixel + offsets[j]), total)
            _finish(lanes, total, channel, tile, tiles, bits, R, r0, ldr, low, high, Y, y0, ldy, before, behind)


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
def _respond(width, bfloat16, G, first, last, source, used, offsets, X, pixel, buffer, b0):
    """Responses to basis filters with any number of taps."""
    size = width >> len(bfloat16)
    taps = len(offsets)
    for n in range(first, last):
        g = np.intp(used[n]) * taps
        for part in range(0, width, 32):
            z = pixel + source[n] + part
            total = multiply(broadcast(_HALF, G[g]), load(_HALF, X, z + offsets[0]))
            for tap in range(1, taps):
                total = fma(broadcast(_HALF, G[g + tap]), load(_HALF, X, z + offsets[tap]), total)
            store_responses(bfloat16, buffer, b0 + (n - first) * size + (part >> len(bfloat16)), total)


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
    channels, counts, index, values, bias, bits, X, x0, R, r0, ldr, low, high, Y, y0, ldy, before, behind, scratch
):  # fmt: skip
    """A convolution by chunks of input channels: responses to basis filters, then rows of (response, value).

    Args:
        lanes, tiles, parts, bias, bits, X, x0, R, r0, ldr, low, high, Y, y0, ldy, before, behind: as in `direct`.
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
            if len(G) == 0:
                _unfold(width, bfloat16, first, last, source, used, offsets, X, x0 + pixel, buffer, 0)
            elif len(offsets) == 9:
                _respond_9(width, bfloat16, G, first, last, source, used, offsets, X, x0 + pixel, buffer, 0)
            else:
                _respond(width, bfloat16, G, first, last, source, used, offsets, X, x0 + pixel, buffer, 0)
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
                while j < end:
                    response = load_responses(lanes, bfloat16, buffer, np.intp(index[j]) * size)
                    total = fma(broadcast(lanes, values[j]), response, total)
                    j += np.uintp(1)
                if ends:
                    _finish(lanes, total, channel, tile, tiles, bits, R, r0, ldr, low, high, Y, y0, ldy, before, behind)
                else:
                    store(buffer, sums + channel * width, total)
