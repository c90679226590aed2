"""Vectors of many float32 lanes inside numba, as values of LLVM's vector types.

LLVM splits them into the registers that the machine has. The number of lanes is part of the type of the argument
`lanes`: a tuple of `n` integers stands for ``16 n`` lanes, so that a kernel at module level, which numba can cache,
serves every width. Only powers of two are fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

from .jit import inline

_FLOAT, _INT32 = ir.FloatType(), ir.IntType(32)
#: Stands for 16 lanes, the narrowest vector.
ROW = (0,)


class Vector(types.Type):
    """The numba type of a vector of `width` float32 lanes."""

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(name=f"Vector({width})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]  # numba has no types
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, ir.VectorType(_FLOAT, vector.width))


def lanes(width: int) -> tuple[int, ...]:
    """The tuple that stands for a width, a multiple of 16."""
    return (0,) * (width // 16)


def _vector(lanes: Any) -> Vector:
    return Vector(16 * lanes.count)


def _address(context: Any, builder: Any, signature: Any, arguments: Any, at: int, to: Any) -> Any:
    """The address in the array that is argument number `at`, at the offset that is the next argument."""
    data = context.make_array(signature.args[at])(context, builder, arguments[at]).data
    return builder.bitcast(builder.gep(data, [arguments[at + 1]]), to.as_pointer())


def _register(vector: Vector) -> ir.VectorType:
    return ir.VectorType(_FLOAT, vector.width)


def _indices(lanes: Iterable[int]) -> ir.Constant:
    numbers = list(lanes)
    return ir.Constant(ir.VectorType(_INT32, len(numbers)), numbers)


def _splat(builder: Any, value: Any, register: ir.VectorType) -> Any:
    undefined = ir.Constant(register, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first, undefined, _indices([0] * register.count))


def _read(context: Any, builder: Any, signature: Any, arguments: Any, at: int, to: Any, align: int = 4) -> Any:
    loaded = builder.load(_address(context, builder, signature, arguments, at, to))
    loaded.align = align
    return loaded


def _write(context: Any, builder: Any, signature: Any, arguments: Any, at: int, values: Any) -> Any:
    builder.store(values, _address(context, builder, signature, arguments, at, values.type)).align = 4
    return context.get_dummy_value()


def _or_zeros(builder: Any, mask: Any, values: Any) -> Any:
    return builder.select(mask, values, ir.Constant(values.type, [0.0] * values.type.count))


def _below(builder: Any, count: Any, width: int) -> Any:
    """A mask of the first `count` lanes."""
    limit = _splat(builder, builder.trunc(count, _INT32), ir.VectorType(_INT32, width))
    return builder.icmp_signed("<", _indices(range(width)), limit)


@intrinsic  # type: ignore[untyped-decorator]
def load(typing: Any, lanes: Any, array: Any, offset: Any) -> Any:
    """Load a vector from a flat float32 array, at an offset of any alignment."""
    vector = _vector(lanes)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _read(context, builder, signature, arguments, 1, _register(vector))

    return vector(lanes, array, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def store(typing: Any, array: Any, offset: Any, values: Any) -> Any:
    """Store a vector in a flat float32 array, at an offset of any alignment."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _write(context, builder, signature, arguments, 0, arguments[2])

    return types.void(array, types.intp, values), generate


@intrinsic  # type: ignore[untyped-decorator]
def store_leading(typing: Any, count: Any, array: Any, offset: Any, values: Any) -> Any:
    """Store the first `count` lanes in a flat float32 array; nothing is written after them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        register, mask = _register(values), ir.VectorType(ir.IntType(1), values.width)
        address = _address(context, builder, signature, arguments, 1, register)
        kind = ir.FunctionType(ir.VoidType(), [register, register.as_pointer(), _INT32, mask])
        suffix = f"v{values.width}f32"
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.store.{suffix}.p0{suffix}")
        chosen = _below(builder, arguments[0], values.width)
        builder.call(function, [arguments[3], address, ir.Constant(_INT32, 4), chosen])
        return context.get_dummy_value()

    return types.void(types.intp, array, types.intp, values), generate


@intrinsic  # type: ignore[untyped-decorator]
def load_phases(typing: Any, array: Any, offset: Any) -> Any:
    """Load 64 neighbouring numbers as four vectors: every fourth one, from the first, second, third and fourth on."""
    vector = Vector(16)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        loaded = _read(context, builder, signature, arguments, 0, _register(Vector(64)))
        phases = [builder.shuffle_vector(loaded, loaded, _indices(range(first, 64, 4))) for first in range(4)]
        return context.make_tuple(builder, signature.return_type, phases)

    return types.containers.UniTuple(vector, 4)(array, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def store_phases(typing: Any, array: Any, offset: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Store four vectors as 64 neighbouring numbers: the inverse of `load_phases`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pairs = [builder.shuffle_vector(*arguments[at : at + 2], _indices(range(32))) for at in (2, 4)]
        turns = [phase * 16 + lane for lane in range(16) for phase in range(4)]
        mixed = builder.shuffle_vector(*pairs, _indices(turns))
        return _write(context, builder, signature, arguments, 0, mixed)

    return types.void(array, types.intp, a, b, c, d), generate


@intrinsic  # type: ignore[untyped-decorator]
def store_responses(typing: Any, bfloat16: Any, array: Any, offset: Any, values: Any) -> Any:
    """Store a vector as float32, or, if `bfloat16` is a tuple of one number, rounded to it: two lanes in one number.

    Of each 32 lanes the first 16 are the low halves of 16 numbers, the others the high halves.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        made = arguments[3]
        if signature.args[0].count:
            whole = ir.VectorType(_INT32, values.width)
            half = ir.VectorType(_INT32, values.width // 2)
            bits = builder.add(builder.bitcast(made, whole), ir.Constant(whole, [0x8000] * values.width))
            halves = ([lane for lane in range(values.width) if lane // 16 % 2 == half] for half in (0, 1))
            low, high = (builder.shuffle_vector(bits, bits, _indices(lanes)) for lanes in halves)
            low = builder.lshr(low, ir.Constant(half, [16] * half.count))
            high = builder.and_(high, ir.Constant(half, [0xFFFF0000] * half.count))
            made = builder.or_(low, high)
        return _write(context, builder, signature, arguments, 1, made)

    return types.void(bfloat16, array, types.intp, values), generate


@intrinsic  # type: ignore[untyped-decorator]
def load_responses(typing: Any, lanes: Any, bfloat16: Any, array: Any, offset: Any) -> Any:
    """Load a vector that `store_responses` has stored."""
    vector = _vector(lanes)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        count = vector.width // 2 if signature.args[1].count else vector.width
        kind = ir.VectorType(_INT32, count)
        loaded = _read(context, builder, signature, arguments, 2, kind)
        if signature.args[1].count:
            low = builder.shl(loaded, ir.Constant(kind, [16] * count))
            high = builder.and_(loaded, ir.Constant(kind, [0xFFFF0000] * count))
            mixed = [lane + half for at in range(0, count, 16) for half in (0, count) for lane in range(at, at + 16)]
            loaded = builder.shuffle_vector(low, high, _indices(mixed))
        return builder.bitcast(loaded, _register(vector))

    return vector(lanes, bfloat16, array, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def broadcast(typing: Any, lanes: Any, value: Any) -> Any:
    """One number in all lanes."""
    vector = _vector(lanes)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _splat(builder, arguments[1], _register(vector))

    return vector(lanes, types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def fma(typing: Any, factor: Any, other: Any, addend: Any) -> Any:
    """``factor * other + addend``, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        register = _register(factor)
        kind = ir.FunctionType(register, [register] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{factor.width}f32")
        return builder.call(function, arguments)

    return factor(factor, factor, factor), generate


def _binary(generate: Callable[[Any, Any, Any], Any], summary: str) -> Any:
    def operation(typing: Any, left: Any, right: Any) -> Any:
        return left(left, left), lambda context, builder, signature, arguments: generate(builder, *arguments)

    operation.__doc__ = summary
    return intrinsic(operation)


multiply = _binary(lambda builder, left, right: builder.fmul(left, right), "``left * right``")
subtract = _binary(lambda builder, left, right: builder.fsub(left, right), "``left - right``")
divide = _binary(lambda builder, left, right: builder.fdiv(left, right), "``left / right``")
add = _binary(lambda builder, left, right: builder.fadd(left, right), "``left + right``")
clamp_min = _binary(
    lambda builder, left, right: builder.select(builder.fcmp_ordered("<", left, right), right, left),
    "The larger of two values in each lane; NaN if the left one is.",
)
clamp_max = _binary(
    lambda builder, left, right: builder.select(builder.fcmp_ordered(">", left, right), right, left),
    "The smaller of two values in each lane; NaN if the left one is.",
)
maximum = _binary(
    lambda builder, left, right: builder.select(
        builder.or_(builder.fcmp_ordered(">", right, left), builder.fcmp_unordered("uno", right, right)), right, left
    ),
    "The larger of two values in each lane; NaN if either is.",
)


@intrinsic  # type: ignore[untyped-decorator]
def power_of_two(typing: Any, shifted: Any) -> Any:
    """Two to the power of `n` in each lane, given as ``1.5 * 2**23 + n``: a whole number from -126 to 127."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = ir.VectorType(_INT32, shifted.width)
        exponent = builder.shl(builder.bitcast(arguments[0], whole), ir.Constant(whole, [23] * shifted.width))
        made = builder.add(exponent, ir.Constant(whole, [127 << 23] * shifted.width))
        return builder.bitcast(made, _register(shifted))

    return shifted(shifted), generate


@intrinsic  # type: ignore[untyped-decorator]
def total_of(typing: Any, values: Any) -> Any:
    """The sum of all lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        summed, count = arguments[0], values.width
        while count > 1:
            count //= 2
            halves = [builder.shuffle_vector(summed, summed, _indices(range(at, at + count))) for at in (0, count)]
            summed = builder.fadd(*halves)
        return builder.extract_element(summed, ir.Constant(_INT32, 0))

    return types.float32(values), generate


@intrinsic  # type: ignore[untyped-decorator]
def keep(typing: Any, bits: Any, offset: Any, values: Any) -> Any:
    """The lanes whose bit is set, and zeros; the bits begin at a byte of a uint8 array, lowest bit first."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        loaded = _read(context, builder, signature, arguments, 0, ir.IntType(values.width), align=1)
        mask = builder.bitcast(loaded, ir.VectorType(ir.IntType(1), values.width))
        return _or_zeros(builder, mask, arguments[2])

    return values(bits, types.intp, values), generate


@intrinsic  # type: ignore[untyped-decorator]
def leading(typing: Any, count: Any, values: Any) -> Any:
    """The first `count` lanes, and zeros."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _or_zeros(builder, _below(builder, arguments[0], values.width), arguments[1])

    return values(types.intp, values), generate


@intrinsic  # type: ignore[untyped-decorator]
def evens(typing: Any, low: Any, high: Any) -> Any:
    """The first, third, and so on, lane of one vector, then those of another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.shuffle_vector(*arguments, _indices(range(0, 2 * low.width, 2)))

    return low(low, low), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def moved(typing: Any, values: Any, by: Any) -> Any:
    """Lane ``x + by`` in lane `x`, zeros where there is none; `by` is a literal."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zeros = ir.Constant(arguments[0].type, [0.0] * values.width)
        sources = (lane + by.literal_value for lane in range(values.width))
        chosen = _indices(lane if 0 <= lane < values.width else values.width for lane in sources)
        return builder.shuffle_vector(arguments[0], zeros, chosen)

    return values(values, by), generate


@inline  # type: ignore[untyped-decorator]
def store_zeros(count: Any, array: Any, offset: Any) -> None:
    """Store at least `count` zeros in a flat float32 array, in whole vectors."""
    for k in range(0, count, 16):
        store(array, offset + k, broadcast(ROW, np.float32(0)))
