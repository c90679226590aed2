"""Compact encoding of the positions of the stored entries of a sparse tensor.

Positions are indices into the flattened tensor. Codings: ``"all"`` (every entry is stored, no data), a bit mask, or
gaps of 4 or 8 bits: the number of skipped entries before each stored one. The largest number that fits means that many
skipped entries, and that the gap goes on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError

#: Bits per gap, by coding.
GAP_BITS = {"gaps4": 4, "gaps8": 8}
CODINGS = ("all", "bits", *GAP_BITS)


class Positions(NamedTuple):
    """Encoded positions: the name of the coding, and its bytes."""

    coding: str
    data: Tensor


def encode(kept: Tensor) -> tuple[Positions, Tensor]:
    """Encode the positions of the True entries, whatever the shape, in the coding that takes the fewest bytes.

    Returns:
        The encoded positions, and the positions (int64, 1-D), both on the device of `kept`.

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
    """Pack gaps into bytes, each as a run of largest codes and one smaller code; the last byte is filled with ones."""
    largest = 2**bits - 1
    ends = (1 + gaps // largest).cumsum(0) - 1
    codes = torch.full((int(ends[-1]) + 1 if len(ends) else 0,), largest, dtype=torch.uint8, device=gaps.device)
    codes[ends] = (gaps % largest).to(torch.uint8)
    return _pack(codes, bits, fill=largest)


def _pack(numbers: Tensor, bits: int, fill: int = 0) -> Tensor:
    """Pack numbers of a few bits into bytes, the first in the lowest bits."""
    per_byte = 8 // bits
    numbers = F.pad(numbers.to(torch.uint8), (0, -len(numbers) % per_byte), value=fill)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=numbers.device)
    return (numbers.reshape(-1, per_byte) << shifts).sum(1, dtype=torch.uint8)


def _unpack(data: Tensor, bits: int) -> Tensor:
    """Inverse of `_pack`; includes the numbers that fill up the last byte."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return data[:, None].bitwise_right_shift(shifts).bitwise_and(2**bits - 1).reshape(-1)


def decode(positions: Positions, count: int | None, total: int, name: str = "") -> Tensor:
    """Decode what `encode` has encoded: positions as int64, ascending.

    Memory is proportional to the number of bytes (or to `count`, if all entries are kept), whatever `total` claims.

    Args:
        positions: on the CPU; the data is untrusted.
        count: the number of positions; None if it is not known.
        total: number of entries of the tensor.
        name: name of the tensor, for errors.

    Raises:
        CheckpointError: the data does not encode `count` positions below `total`.

    >>> decode(Positions("gaps4", torch.tensor([0x2F, 0xF0], dtype=torch.uint8)), 2, 30)
    tensor([17, 18])
    """
    coding, data = positions
    if coding == "all":
        require(len(data) == 0 and count in (None, total), f"{count} of {total} entries, coded as all of them", name)
        return torch.arange(total)
    if coding == "bits":
        require(len(data) == (total + 7) // 8, f"a bit mask of {len(data)} bytes for {total} entries", name)
        numbers = _unpack(data, 1)
        require(not bool(numbers[total:].any()), "a position past the end", name)
        index = numbers.nonzero().squeeze(1)
        require(count in (None, len(index)), f"positions of {len(index)} entries, and {count} values", name)
        return index
    bits = GAP_BITS[coding]
    codes = _unpack(data, bits)
    ends = (codes != 2**bits - 1).nonzero().squeeze(1)
    require(count in (None, len(ends)), f"positions of {len(ends)} entries, and {count} values", name)
    needed = int(ends[-1]) + 1 if len(ends) else 0
    require((needed * bits + 7) // 8 == len(data), "bytes behind the last position", name)
    index = codes.cumsum(0, dtype=torch.int64).index_select(0, ends) + torch.arange(len(ends))
    require(len(index) == 0 or int(index[-1]) < total, "a position past the end", name)
    return index


def invalid_file(found: str, remedy: str = "save the model again, or use another copy of the file") -> CheckpointError:
    """The error for a file that is corrupt, inconsistent, or no compact file."""
    return CheckpointError("A compact file must be complete, and as `ip_plugin.save` writes it.", found, remedy)


def require(condition: bool, found: str, name: str | None = None) -> None:
    """Raise CheckpointError unless a condition on a file (on its tensor `name`) is met."""
    if not condition:
        raise invalid_file(found if name is None else f"{name!r}: {found}")
