"""A dense 3x3 convolution with a quarter of the multiplications.

Winograd's minimal filtering F(4x4, 3x3) (A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks",
CVPR 2016, arXiv 1509.09308): a patch of 6x6 pixels is transformed to 36 points, multiplied there with the transformed
filters, summed over the input channels, and transformed back to a tile of 4x4 pixels. It is for layers that are still
too dense for loops over non-zeros. Stride 1, padding 1, no groups; buffers as in `nonzero`.

The points are the pairs of 0, A, -A, B, -B and infinity. A NaN or infinity may make all pixels of the tiles NaN whose
patches it is in.

A work item is some rows of tiles and a part of the output channels. Its scratch memory holds ``patches[point, channel,
tile]``, then ``products[channel, point, tile]`` of a block of output channels, then lines of single channels.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from ..layout import Floats
from .activations import activated
from .jit import helper, inline, parallel
from .vectors import (
    ROW,
    add,
    broadcast,
    clamp_max,
    clamp_min,
    fma,
    keep,
    leading,
    load,
    load_phases,
    multiply,
    store,
    store_leading,
    store_phases,
    subtract,
)

Bits = npt.NDArray[np.uint8]

#: Rows and columns of a tile; points of a patch; output channels of a block.
TILE, POINTS, BLOCK = 4, 36, 8

#: 1 and 2, as in the paper, have rounding errors that are two to three times as large.
_A, _B = 0.5**0.5, 2.0**0.5
_A1, _A2, _A3 = (np.float32(_A**power) for power in (1, 2, 3))
_B1, _B2, _B3 = (np.float32(_B**power) for power in (1, 2, 3))
_PRODUCT, _SUM = np.float32(_A**2 * _B**2), np.float32(_A**2 + _B**2)


def filters(kernels: Floats) -> Floats:
    """Transform kernels ``(outputs, inputs, 9)``: ``(blocks of outputs, points, inputs, outputs of a block)``."""
    rows = []
    points = (0.0, _A, -_A, _B, -_B)
    for point in points:
        scale = np.prod([point - other for other in points if other != point])
        rows.append([1 / scale, point / scale, point**2 / scale])
    matrix = np.array([*rows, [0, 0, 1]])
    outputs, inputs, _ = kernels.shape
    transformed = matrix @ kernels.reshape(outputs, inputs, 3, 3).astype(np.float64) @ matrix.T
    blocks = -(-outputs // BLOCK)
    whole = np.zeros((blocks * BLOCK, inputs, POINTS), np.float32)
    whole[:outputs] = transformed.reshape(outputs, inputs, POINTS)
    return np.ascontiguousarray(whole.reshape(blocks, BLOCK, inputs, POINTS).transpose(0, 3, 2, 1))


def borders(tiles: int, across: int) -> tuple[Bits, Bits]:
    """One bit for each tile, lowest first: which have a neighbour on the left, and which on the right."""
    place = np.arange(tiles) % across
    return np.packbits(place > 0, bitorder="little"), np.packbits(place < across - 1, bitorder="little")


def memory(inputs: int, tiles: int) -> int:
    """Length of the scratch memory of a work item: patches, products, and lines of single channels."""
    return POINTS * (inputs * tiles + 16 + BLOCK * tiles) + 48 * tiles + 1024


@helper
def _to_points(d0, d1, d2, d3, d4, d5):
    """Transform six neighbouring pixels of the input to six points."""
    even_a = fma(broadcast(ROW, -_B2), d2, d4)
    odd_a = multiply(broadcast(ROW, _A1), fma(broadcast(ROW, -_B2), d1, d3))
    even_b = fma(broadcast(ROW, -_A2), d2, d4)
    odd_b = multiply(broadcast(ROW, _B1), fma(broadcast(ROW, -_A2), d1, d3))
    first = fma(broadcast(ROW, _PRODUCT), d0, fma(broadcast(ROW, -_SUM), d2, d4))
    last = fma(broadcast(ROW, _PRODUCT), d1, fma(broadcast(ROW, -_SUM), d3, d5))
    return first, add(even_a, odd_a), subtract(even_a, odd_a), add(even_b, odd_b), subtract(even_b, odd_b), last


@helper
def _from_points(m0, m1, m2, m3, m4, m5):
    """Transform six points back to four neighbouring pixels of the output."""
    even_a, odd_a, even_b, odd_b = add(m1, m2), subtract(m1, m2), add(m3, m4), subtract(m3, m4)
    return (
        add(m0, add(even_a, even_b)),
        fma(broadcast(ROW, _A1), odd_a, multiply(broadcast(ROW, _B1), odd_b)),
        fma(broadcast(ROW, _A2), even_a, multiply(broadcast(ROW, _B2), even_b)),
        fma(broadcast(ROW, _A3), odd_a, fma(broadcast(ROW, _B3), odd_b, m5)),
    )


@inline
def _load_6(W, at, step):
    return (
        load(ROW, W, at), load(ROW, W, at + step), load(ROW, W, at + 2 * step),
        load(ROW, W, at + 3 * step), load(ROW, W, at + 4 * step), load(ROW, W, at + 5 * step),
    )  # fmt: skip


@inline
def _store_6(W, at, step, values):
    store(W, at, values[0])
    store(W, at + step, values[1])
    store(W, at + 2 * step, values[2])
    store(W, at + 3 * step, values[3])
    store(W, at + 4 * step, values[4])
    store(W, at + 5 * step, values[5])


@inline
def _store_4(W, at, step, values):
    store(W, at, values[0])
    store(W, at + step, values[1])
    store(W, at + 2 * step, values[2])
    store(W, at + 3 * step, values[3])


@inline
def _pixels(X, at, row, height, rest):
    """Load sixteen pixels of a row; zeros below the image and to the right of it."""
    return leading(rest, load(ROW, X, at)) if row <= height else broadcast(ROW, np.float32(0))


@helper
def _patches(channel, spread, tiles, first, rows, left, right, X, x, ldi, pitch, height, width, W, work):
    """Transform the patches of one channel: first the columns of all patches, then their rows, split into phases."""
    across, down = (width + 3) // 4, (height + 3) // 4
    line, phase = 4 * tiles + 16, tiles + 32
    for row in range(rows):
        image = (first + row) // down
        top = (first + row - image * down) * 4 - 1
        for column in range(0, 4 * across, 16):
            at, rest = x + image * ldi + top * pitch + column, width - column
            d0 = _pixels(X, at, top, height, rest)
            d1 = _pixels(X, at + pitch, top + 1, height, rest)
            d2 = _pixels(X, at + 2 * pitch, top + 2, height, rest)
            d3 = _pixels(X, at + 3 * pitch, top + 3, height, rest)
            d4 = _pixels(X, at + 4 * pitch, top + 4, height, rest)
            d5 = _pixels(X, at + 5 * pitch, top + 5, height, rest)
            _store_6(W, work + 4 * across * row + column, line, _to_points(d0, d1, d2, d3, d4, d5))
    phases = work + 6 * line + 16
    for point in range(6):  # all of them first, since a load that spans two recent stores is slow
        for tile in range(0, tiles, 16):
            _store_4(W, phases + point * 4 * phase + tile, phase, load_phases(W, work + point * line + 4 * tile))
    for point in range(6):
        for tile in range(0, tiles, 16):
            at = phases + point * 4 * phase + tile
            d0 = keep(left, tile // 8, load(ROW, W, at + 3 * phase - 1))
            d1 = load(ROW, W, at)
            d2 = load(ROW, W, at + phase)
            d3 = load(ROW, W, at + 2 * phase)
            d4 = load(ROW, W, at + 3 * phase)
            d5 = keep(right, tile // 8, load(ROW, W, at + 1))
            to = point * 6 * spread + channel * tiles + tile
            _store_6(W, to, spread, _to_points(d0, d1, d2, d3, d4, d5))


@helper
def _products(inputs, spread, tiles, U, u, W, made):
    """Sum products over the input channels, for a block of output channels."""
    zero = broadcast(ROW, np.float32(0))
    for point in range(POINTS):
        for tile in range(0, tiles, 16):
            s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
            x = np.uintp(point * spread + tile)
            y = np.uintp(u + point * inputs * BLOCK)
            for _ in range(inputs):
                patch = load(ROW, W, np.intp(x))
                s0 = fma(broadcast(ROW, U[y]), patch, s0)
                s1 = fma(broadcast(ROW, U[y + np.uintp(1)]), patch, s1)
                s2 = fma(broadcast(ROW, U[y + np.uintp(2)]), patch, s2)
                s3 = fma(broadcast(ROW, U[y + np.uintp(3)]), patch, s3)
                s4 = fma(broadcast(ROW, U[y + np.uintp(4)]), patch, s4)
                s5 = fma(broadcast(ROW, U[y + np.uintp(5)]), patch, s5)
                s6 = fma(broadcast(ROW, U[y + np.uintp(6)]), patch, s6)
                s7 = fma(broadcast(ROW, U[y + np.uintp(7)]), patch, s7)
                x += np.uintp(tiles)
                y += np.uintp(BLOCK)
            at = made + point * tiles + tile
            _store_4(W, at, POINTS * tiles, (s0, s1, s2, s3))
            _store_4(W, at + 4 * POINTS * tiles, POINTS * tiles, (s4, s5, s6, s7))


@helper
def _lines(tiles, made, W, work):
    """Transform the products of one channel back to lines of pixels, four for each row of tiles."""
    lines = work + 384
    for tile in range(0, tiles, 16):
        for point in range(6):
            products = _load_6(W, made + point * 6 * tiles + tile, tiles)
            _store_4(W, work + 64 * point, 16, _from_points(*products))
        for at in range(work, work + 64, 16):
            _store_4(W, at, 64, _from_points(*_load_6(W, at, 64)))
        for row in range(4):
            at = work + 64 * row
            phases = load(ROW, W, at), load(ROW, W, at + 16), load(ROW, W, at + 32), load(ROW, W, at + 48)
            store_phases(W, lines + 4 * (row * tiles + tile), *phases)


@inline
def _clear(Y, begin, end):
    for at in range(begin, end):
        Y[at] = np.float32(0)


@helper
def _finish(
    bias, first, rows, every, tiles, W, lines, height, width, ldi, pitch, R, r, adds, kind, low, high, Y, y, reach
):  # fmt: skip
    """Add bias and residual to the lines of one channel, activate and store; with zeros around images."""
    across, down = (width + 3) // 4, (height + 3) // 4
    for row in range(rows):
        image = (first + row) // down
        top = (first + row - image * down) * 4
        for k in range(min(4, height - top)):
            pixel = image * ldi + (top + k) * pitch
            for column in range(0, width, 16):
                values = add(load(ROW, W, lines + 4 * (k * tiles + row * across) + column), broadcast(ROW, bias))
                if adds:
                    values = add(values, load(ROW, R, r + pixel + column))
                if kind == 0:
                    values = clamp_max(clamp_min(values, broadcast(ROW, low)), broadcast(ROW, high))
                else:
                    values = activated(kind, low, values)
                store_leading(width - column, Y, y + pixel + column, values)
            _clear(Y, y + pixel + width, y + pixel + pitch)
        if top + 4 >= height:
            end = y + image * ldi + (height - 1) * pitch + width
            _clear(Y, end, end + reach if first + row == every - 1 else y + (image + 1) * ldi)
    if first == 0:
        _clear(Y, y - reach, y)


@parallel
def winograd(
    rows, tiles, parts, source, U, bias, left, right, images, height, width, X, x0, ldx, ldi, pitch,
    R, r0, ldr, kind, low, high, Y, y0, ldy, reach, scratch
):  # fmt: skip
    """A convolution by dense filters.

    Args:
        rows, tiles: of a work item: rows of tiles at most, and tiles, in whole vectors.
        parts: number of parts that the output channels are divided into.
        source: input channels of the filters.
        U: `filters`, flat.
        bias: of output channels.
        left, right: `borders`.
        images, height, width: of input and output.
        X, x0, ldx, ldi, pitch: input, its first pixel, and the distances between channels, images and rows; images and
            rows of the output have the same distances.
        R, r0, ldr, kind, low, high, Y, y0, ldy: as in `nonzero.direct`.
        reach: zeros that are needed before the first image and after the last one.
        scratch: a row for each thread, of the length `memory`.
    """
    inputs, outputs = len(source), len(bias)
    blocks = (outputs + BLOCK - 1) // BLOCK
    spread = inputs * tiles + 16  # a cache line more, or all points of a patch would be in one set of the cache
    made = POINTS * spread
    work = made + POINTS * BLOCK * tiles
    every = images * ((height + 3) // 4)
    for item in numba.prange((every + rows - 1) // rows * parts):
        W = scratch[numba.get_thread_id()]
        part = item % parts
        first = item // parts * rows
        count = min(rows, every - first)
        for channel in range(inputs):
            x = x0 + np.intp(source[channel]) * ldx
            _patches(channel, spread, tiles, first, count, left, right, X, x, ldi, pitch, height, width, W, work)
        for block in range(blocks * part // parts, blocks * (part + 1) // parts):
            _products(inputs, spread, tiles, U, block * POINTS * inputs * BLOCK, W, made)
            for channel in range(block * BLOCK, min((block + 1) * BLOCK, outputs)):
                _lines(tiles, made + (channel - block * BLOCK) * POINTS * tiles, W, work)
                _finish(
                    bias[channel], first, count, every, tiles, W, work + 384, height, width, ldi, pitch,
                    R, r0 + channel * ldr, ldr > 0, kind, low, high, Y, y0 + channel * ldy, reach,
                )  # fmt: skip
