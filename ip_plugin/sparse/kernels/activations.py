"""Activations of vectors of 16 lanes, and of numbers: what a kind number and its parameters stand for.

Kind 0 is a clamp to ``low`` and ``high``, which the loops do themselves; `low` is the slope of a leaky ReLU.
"""

from __future__ import annotations

import math

import numpy as np

from .jit import helper
from .vectors import (
    ROW,
    add,
    broadcast,
    clamp_max,
    clamp_min,
    divide,
    fma,
    keep,
    load,
    multiply,
    power_of_two,
    store,
    subtract,
)

SIGMOID, SILU, HARD_SIGMOID, HARD_SWISH, GELU, GELU_TANH, LEAKY_RELU = range(1, 8)

_ROUNDS, _LOG2_E = np.float32(1.5 * 2**23), np.float32(1 / math.log(2))
#: ln 2 as a sum of two numbers, the first of few bits.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_TANH_1, _TANH_3 = np.float32(2 * math.sqrt(2 / math.pi)), np.float32(2 * math.sqrt(2 / math.pi) * 0.044715)


@helper
def _constant(value):
    return broadcast(ROW, np.float32(value))


@helper
def _exp(values):
    """The exponential function, to two units in the last place, for values from -87 to 88; those beyond are clamped."""
    values = clamp_max(clamp_min(values, _constant(-87.0)), _constant(88.0))
    shifted = fma(values, broadcast(ROW, _LOG2_E), broadcast(ROW, _ROUNDS))
    whole = subtract(shifted, broadcast(ROW, _ROUNDS))
    rest = fma(whole, broadcast(ROW, -_LN2_HIGH), values)
    rest = fma(whole, broadcast(ROW, -_LN2_LOW), rest)
    series = fma(_constant(1.9875691500e-4), rest, _constant(1.3981999507e-3))
    series = fma(series, rest, _constant(8.3334519073e-3))
    series = fma(series, rest, _constant(4.1665795894e-2))
    series = fma(series, rest, _constant(1.6666665459e-1))
    series = fma(series, rest, _constant(5.0000001201e-1))
    # never the square of a small rest: subnormal numbers take many times as long
    series = add(fma(multiply(series, rest), rest, rest), _constant(1.0))
    return multiply(series, power_of_two(shifted))


@helper
def _gate(values):
    """``1 + exp(-values)``."""
    return add(_constant(1.0), _exp(subtract(_constant(0.0), values)))


@helper
def _magnitude(values):
    """The absolute value, or 1e-18 where that is larger, so that its square is not subnormal: that would be slow."""
    return clamp_min(clamp_min(values, subtract(_constant(0.0), values)), _constant(1e-18))


@helper
def _normal(values):
    """The distribution function of the normal distribution, by 7.1.26 of Abramowitz and Stegun: error 8e-8."""
    positive = _magnitude(values)
    t = divide(_constant(1.0), fma(positive, _constant(0.3275911 * 0.5**0.5), _constant(1.0)))
    series = fma(_constant(1.061405429), t, _constant(-1.453152027))
    series = fma(series, t, _constant(1.421413741))
    series = fma(series, t, _constant(-0.284496736))
    series = fma(series, t, _constant(0.254829592))
    tail = multiply(multiply(series, t), _exp(multiply(_constant(-0.5), multiply(positive, positive))))
    tail = multiply(_constant(0.5), tail)  # of the positive value, above it
    sign = multiply(_constant(1e38), values)
    above = clamp_max(clamp_min(multiply(_constant(1e38), sign), _constant(0.0)), _constant(1.0))
    return add(multiply(above, subtract(_constant(1.0), tail)), multiply(subtract(_constant(1.0), above), tail))


@helper
def activated(kind, parameter, values):
    """The values of an activation; `parameter` is the slope of a leaky ReLU."""
    if kind == SIGMOID:
        return divide(_constant(1.0), _gate(values))
    if kind == SILU:
        return divide(values, _gate(values))
    if kind in (HARD_SIGMOID, HARD_SWISH):
        gate = fma(values, _constant(1 / 6), _constant(0.5))
        gate = clamp_max(clamp_min(gate, _constant(0.0)), _constant(1.0))
        return gate if kind == HARD_SIGMOID else multiply(values, gate)
    if kind == GELU:
        return multiply(values, _normal(values))
    if kind == GELU_TANH:
        positive = _magnitude(values)
        slope = fma(multiply(positive, positive), broadcast(ROW, _TANH_3), broadcast(ROW, _TANH_1))
        return divide(values, _gate(multiply(values, slope)))
    negative = multiply(broadcast(ROW, np.float32(parameter)), clamp_max(values, _constant(0.0)))
    return add(clamp_min(values, _constant(0.0)), negative)


@helper
def activate(kind, parameter, count, bits, bit, Y, y):
    """Activate so many vectors in place; numbers whose bit is not set become zero."""
    if kind == SILU:  # a loop of its own, in which constants stay in registers
        for k in range(count):
            values = load(ROW, Y, y + 16 * k)
            store(Y, y + 16 * k, keep(bits, bit + 2 * k, divide(values, _gate(values))))
        return
    for k in range(count):
        store(Y, y + 16 * k, keep(bits, bit + 2 * k, activated(kind, parameter, load(ROW, Y, y + 16 * k))))


@helper
def activated_number(kind, low, high, value):
    """The value of an activation for one number."""
    if kind == 0:
        return max(low, min(high, value)) if value == value else value
    one = np.empty(16, np.float32)
    store(one, 0, activated(kind, low, broadcast(ROW, value)))
    return one[0]
