"""Where the stored entries of a sparse tensor are, in few bytes.

Positions count the entries of the flattened tensor. They are coded as nothing at all (every entry is stored), as a bit
mask, or as gaps of 4 or 8 bits: the zeros before each entry, where the largest number of a gap means that many zeros
and that the gap goes on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidFileError

#: Bits of a gap by the name of the coding.
GAP_BITS = {"gaps4": 4, "gaps8": 8}
CODINGS = ("all", "bits", *GAP_BITS)


class Positions(NamedTuple):
    """Coded positions: the name of the coding, and its bytes."""

    coding: str
    data: Tensor


def encode(kept: Tensor) -> tuple[Positions, Tensor]:
    """The positions of the True entries, in the coding that takes the fewest bytes.

    Args:
        kept: bools, any shape.

    Returns:
        The coded positions, and the positions themselves (int64, 1-D), both on the device of `kept`.

    >>> positions, index = encode(torch.tensor([[False, False, True], [True, False, False]]))
    >>> positions.coding, positions.data, index
    ('bits', tensor([12], dtype=torch.uint8), tensor([2, 3]))
    """
    flat = kept.reshape(-1)
    index = flat.nonzero().squeeze(1)
    if len(index) == len(flat):
        return Positions("all", flat.new_empty(0, dtype=torch.uint8)), index
    gaps = index.diff(prepend=index.new_full((1,), -1)) - 1
    sizes = {"bits": (len(flat) + 7) // 8}
    for coding, bits in GAP_BITS.items():
        codes = len(index) + int((gaps // (2**bits - 1)).sum())
        sizes[coding] = (codes * bits + 7) // 8
    coding = min(sizes, key=lambda name: sizes[name])
    data = _pack(flat, 1) if coding == "bits" else _codes(gaps, GAP_BITS[coding])
    return Positions(coding, data), index


def _codes(gaps: Tensor, bits: int) -> Tensor:
    """Each gap as so many largest codes and one smaller one, packed into bytes; what is left of a byte is ones."""
    largest = 2**bits - 1
    ends = (1 + gaps // largest).cumsum(0) - 1
    codes = torch.full((int(ends[-1]) + 1 if len(ends) else 0,), largest, dtype=torch.uint8, device=gaps.device)
    codes[ends] = (gaps % largest).to(torch.uint8)
    return _pack(codes, bits, fill=largest)


def _pack(numbers: Tensor, bits: int, fill: int = 0) -> Tensor:
    """Numbers of a few bits as bytes, the first in the lowest bits."""
    numbers = numbers.to(torch.uint8)
    each = 8 // bits
    missing = -len(numbers) % each
    if missing:
        numbers = torch.cat([numbers, numbers.new_full((missing,), fill)])
    packed = numbers[0::each].clone()
    for i in range(1, each):
        packed |= numbers[i::each] << (i * bits)
    return packed


def _unpack(data: Tensor, bits: int) -> Tensor:
    """The numbers that `_pack` has packed, those of the last byte that were filled up included."""
    if bits == 8:
        return data
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return data[:, None].bitwise_right_shift(shifts).bitwise_and(2**bits - 1).reshape(-1)


def decode(positions: Positions, count: int | None, total: int, name: str = "") -> Tensor:
    """The positions that `encode` has coded: int64, ascending.

    Takes memory in proportion to the bytes given (or to `count`, if all entries are kept), whatever `total` claims.

    Args:
        positions: on the CPU; the data may be anything.
        count: how many positions there must be; None if that is not known.
        total: entries of the tensor.
        name: of the tensor, for errors.

    Raises:
        InvalidFileError: the data does not code `count` positions below `total`.

    >>> decode(Positions("gaps4", torch.tensor([0x2F, 0xF0], dtype=torch.uint8)), 2, 30)
    tensor([17, 18])
    """
    coding, data = positions
    if coding == "all":
        _require(len(data) == 0 and count in (None, total), name, f"{count} of {total} entries, which are to be all")
        return torch.arange(total)
    if coding == "bits":
        _require(len(data) == (total + 7) // 8, name, f"a bit mask of {len(data)} bytes for {total} entries")
        numbers = _unpack(data, 1)
        _require(not bool(numbers[total:].any()), name, "a position past the end")
        index = numbers.nonzero().squeeze(1)
        _require(count in (None, len(index)), name, f"positions of {len(index)} entries, and {count} values")
        return index
    bits = GAP_BITS[coding]
    codes = _unpack(data, bits)
    ends = (codes != 2**bits - 1).nonzero().squeeze(1)
    _require(count in (None, len(ends)), name, f"positions of {len(ends)} entries, and {count} values")
    needed = int(ends[-1]) + 1 if len(ends) else 0
    _require((needed * bits + 7) // 8 == len(data), name, "bytes behind the last position")
    index = codes.cumsum(0, dtype=torch.int64).index_select(0, ends) + torch.arange(len(ends))
    _require(len(index) == 0 or int(index[-1]) < total, name, "a position past the end")
    return index


def _require(condition: bool, name: str, found: str) -> None:
    if not condition:
        raise InvalidFileError(f"{name!r}: {found}")
