"""Compiled loops over images in the channel-major layout: packing, pooling, averages, and what acts on single pixels.

Arrays are as in `nonzero`.
"""

from __future__ import annotations

import numba
import numpy as np

from .activations import activated
from .jit import inline, parallel
from .vectors import (
    ROW,
    add,
    broadcast,
    clamp_max,
    clamp_min,
    evens,
    fma,
    keep,
    leading,
    load,
    maximum,
    multiply,
    store,
    store_zeros,
    total_of,
)


@inline
def _copy_row(count, X, x, step, Y, y):
    """Copy every `step`-th number, and fill up the last vector with zeros."""
    for k in range(0, count, 16):
        at = x + k * step
        if step == 1 and at + 16 <= len(X):
            store(Y, y + k, leading(count - k, load(ROW, X, at)))
        elif step == 2 and at + 32 <= len(X):
            store(Y, y + k, leading(count - k, evens(load(ROW, X, at), load(ROW, X, at + 16))))
        else:
            for lane in range(16):
                Y[y + k + lane] = X[at + lane * step] if k + lane < count else np.float32(0)


@parallel
def pack(images, channels, phases, X, of_image, of_channel, of_row, of_column, down, right, Y, y0, ldy, ldi, pitch):
    """Copy images, split into phases of every n-th row and column, one after the other, with zeros around them.

    Args:
        images, channels: how many.
        phases: of each: first row and column of the input, row and column where they go, numbers of rows and columns.
        X, of_image, of_channel, of_row, of_column: input, and its strides.
        down, right: distance of the rows, and of the columns, of one phase.
        Y, y0, ldy, ldi, pitch: output, its first pixel, and the distances between channels, images and rows.
    """
    for channel in numba.prange(channels):
        store_zeros(ldy, Y, channel * ldy)
        for phase in range(len(phases)):
            row, column, at_row, at_column, rows, columns = phases[phase]
            for image in range(images):
                x = image * of_image + channel * of_channel + row * of_row + column * of_column
                y = channel * ldy + y0 + (phase * images + image) * ldi + at_row * pitch + at_column
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
            store(line, x, broadcast(ROW, lowest))
        store_zeros(ldy, Y, channel * ldy)
        for image in range(images):
            for y in range(out_height):
                for x in range(0, width, 16):
                    most = broadcast(ROW, lowest)
                    for k in range(kernel[0]):
                        row = y * stride[0] - padding[0] + k * dilation[0]
                        if 0 <= row < height:
                            at = x0 + channel * ldx + image * ldi + row * pitch + x
                            most = maximum(most, load(ROW, X, at))
                    store(line, padding[1] + x, most)
                for x in range(padding[1] + width, len(line) - 15, 16):
                    store(line, x, broadcast(ROW, lowest))
                for x in range(0, span, 16):
                    most = load(ROW, line, x)
                    for k in range(1, kernel[1]):
                        most = maximum(most, load(ROW, line, x + k * dilation[1]))
                    store(maxima, x, most)
                at = y0 + channel * ldy + image * ldo + y * out_pitch
                _copy_row(out_width, maxima, 0, stride[1], Y, at)


@parallel
def mean(images, channels, length, count, X, x0, ldx, ldi, zeros, Y, y0, ldy, ldo):
    """The average of all pixels of each channel.

    Args:
        images, channels: how many.
        length, count: numbers from the first to the last pixel of an image, gaps included, which are zero; its pixels.
        X, x0, ldx, ldi: input, its first pixel, and the distances between channels and images.
        zeros: of each channel, how many numbers of the output become zero first.
        Y, y0, ldy, ldo: output, likewise.
    """
    for channel in numba.prange(channels):
        for at in range(channel * ldy, channel * ldy + zeros):
            Y[at] = np.float32(0)
        for image in range(images):
            at = x0 + channel * ldx + image * ldi
            total = broadcast(ROW, np.float32(0))
            for k in range(0, length, 16):
                total = add(total, leading(length - k, load(ROW, X, at + k)))
            Y[y0 + channel * ldy + image * ldo] = total_of(total) / np.float32(count)


@inline
def _zero_around(images, height, width, Y, begin, y0, ldy, ldo, pitch):
    """Store zeros where a channel has no pixels."""
    for at in range(begin, begin + y0):
        Y[at] = np.float32(0)
    for image in range(images):
        for row in range(height):
            at = begin + y0 + image * ldo + row * pitch
            end = at + pitch
            if row == height - 1:
                end = begin + y0 + (image + 1) * ldo if image < images - 1 else begin + ldy
            for k in range(at + width, end):
                Y[k] = np.float32(0)


@parallel
def average_pool(
    images, channels, width, row_begin, row_end, row_scale, column_begin, column_end, column_scale,
    X, x0, ldx, ldi, pitch, Y, y0, ldy, ldo, out_pitch, scratch
):  # fmt: skip
    """Average pooling, with zeros around its images.

    Args:
        images, channels, width: of the input.
        row_begin, row_end, row_scale, column_begin, column_end, column_scale: of rows and columns of the output: which
            of the input are added, and what the sum is multiplied with.
        X, x0, ldx, ldi, pitch, Y, y0, ldy, ldo, out_pitch: as in `max_pool`.
        scratch: a row for each thread: sums over the rows of a window.
    """
    for channel in numba.prange(channels):
        line = scratch[numba.get_thread_id()]
        for image in range(images):
            for y in range(len(row_begin)):
                for x in range(0, width, 16):
                    total = broadcast(ROW, np.float32(0))
                    for row in range(row_begin[y], row_end[y]):
                        total = add(total, load(ROW, X, x0 + channel * ldx + image * ldi + row * pitch + x))
                    store(line, x, multiply(total, broadcast(ROW, row_scale[y])))
                at = y0 + channel * ldy + image * ldo + y * out_pitch
                for x in range(len(column_begin)):
                    number = np.float32(0)
                    for column in range(column_begin[x], column_end[x]):
                        number += line[column]
                    Y[at + x] = number * column_scale[x]
        _zero_around(images, len(row_begin), len(column_begin), Y, channel * ldy, y0, ldy, ldo, out_pitch)


@parallel
def pointwise(
    images, channels, height, width, bits, shift, S, s0, lds, ldsi, X, x0, ldx, ldi, pitch,
    R, r0, ldr, ldri, added_pitch, kind, low, high, Y, y0, ldy, ldo, out_pitch
):  # fmt: skip
    """Scale, shift, add and activate images, with zeros around the result.

    Args:
        images, channels, height, width: of input and output.
        bits: which pixels from the first to the last one of an image are none of a gap, for rows of one distance in all
            arrays, which are run as one; empty for others.
        shift: of channels; empty for zero.
        S, s0, lds, ldsi: scales, the first one, and the distances between channels and images; empty for one.
        X, x0, ldx, ldi, pitch: input, its first pixel, and the distances between channels, images and rows.
        R, r0, ldr, ldri, added_pitch: what is added, likewise; `ldr` is 0 if there is nothing.
        kind, low, high: the activation, as of `activations`.
        Y, y0, ldy, ldo, out_pitch: output, likewise.
    """
    rows = 1 if len(bits) else height
    columns = (height - 1) * pitch + width if len(bits) else width
    for channel in numba.prange(channels):
        offset = broadcast(ROW, shift[channel] if len(shift) else np.float32(0))
        for image in range(images):
            scale = broadcast(ROW, S[s0 + channel * lds + image * ldsi] if len(S) else np.float32(1))
            for row in range(rows):
                x = x0 + channel * ldx + image * ldi + row * pitch
                y = y0 + channel * ldy + image * ldo + row * out_pitch
                r = r0 + channel * ldr + image * ldri + row * added_pitch
                for k in range(0, columns, 16):
                    if x + k + 16 > len(X):
                        for lane in range(16):
                            Y[y + k + lane] = X[x + k + lane] if k + lane < columns else np.float32(0)
                        values = load(ROW, Y, y + k)
                    else:
                        values = load(ROW, X, x + k)
                    values = fma(scale, values, offset)
                    if ldr > 0:
                        values = add(values, load(ROW, R, r + k))
                    if kind == 0:
                        values = clamp_max(clamp_min(values, broadcast(ROW, low)), broadcast(ROW, high))
                    else:
                        values = activated(kind, low, values)
                    values = keep(bits, k // 8, values) if len(bits) else leading(columns - k, values)
                    store(Y, y + k, values)
        _zero_around(images, rows, columns, Y, channel * ldy, y0, ldy, ldo, out_pitch)
