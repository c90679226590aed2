"""Encoded positions: by hand, against a slow encoder, and from untrusted input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ip_plugin.checkpoint.index_encoding import CODINGS, Positions, decode, encode
from ip_plugin.errors import CheckpointError


def kept_at(total: int, *index: int) -> torch.Tensor:
    kept = torch.zeros(total, dtype=torch.bool)
    kept[list(index)] = True
    return kept


BY_HAND = {
    "everything": (torch.ones(2, 3, dtype=torch.bool), "all", []),
    "no entries": (torch.ones(0, dtype=torch.bool), "all", []),
    "nothing kept": (torch.zeros(9, dtype=torch.bool), "gaps4", []),
    "a bit mask, lowest bit first": (kept_at(10, 0, 3, 4, 9), "bits", [0b0001_1001, 0b10]),
    "gaps of 4 bits, the first in the low half": (kept_at(40, 2, 8), "gaps4", [0x52]),
    "an odd number of them ends with ones": (kept_at(40, 2), "gaps4", [0xF2]),
    "15 zeros: the gap goes on": (kept_at(40, 15), "gaps4", [0x0F]),
    "14 zeros: it does not": (kept_at(40, 14), "gaps4", [0xFE]),
    "30 zeros, and none": (kept_at(64, 30, 31, 32), "gaps4", [0xFF, 0x00, 0xF0]),
    "gaps of 8 bits": (kept_at(999, 254, 300), "gaps8", [254, 45]),
    "255 zeros: the gap goes on": (kept_at(999, 255), "gaps8", [255, 0]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    kept, coding, data = BY_HAND[name]
    positions, index = encode(kept)
    assert (positions.coding, positions.data.tolist()) == (coding, data)
    assert torch.equal(index, kept.flatten().nonzero().squeeze(1))
    assert torch.equal(decode(positions, len(index), kept.numel()), index)


def gap_codes(kept: list[bool], largest: int) -> list[int]:
    """A slow encoder, one entry after the other."""
    codes, zeros = [], 0
    for bit in kept:
        if not bit:
            zeros += 1
            continue
        while zeros >= largest:
            codes.append(largest)
            zeros -= largest
        codes.append(zeros)
        zeros = 0
    return codes


def runs(lengths: list[int]) -> list[bool]:
    return [bit for i, length in enumerate(lengths) for bit in [i % 2 == 1] * length]


@given(st.lists(st.integers(0, 600), max_size=12).map(runs) | st.lists(st.booleans(), max_size=300))
def test_against_a_slow_coder(kept: list[bool]) -> None:
    positions, index = encode(torch.tensor(kept, dtype=torch.bool))
    assert index.tolist() == [i for i, bit in enumerate(kept) if bit]
    assert torch.equal(decode(positions, sum(kept), len(kept)), index)
    assert torch.equal(decode(positions, None, len(kept)), index)
    four, eight = gap_codes(kept, 15), gap_codes(kept, 255)
    sizes = {"all": 0 if all(kept) else 2**60, "bits": -(-len(kept) // 8), "gaps4": -(-len(four) // 2)}
    sizes["gaps8"] = len(eight)
    assert len(positions.data) == sizes[positions.coding] == min(sizes.values())
    if positions.coding == "gaps8":
        assert positions.data.tolist() == eight
    if positions.coding == "gaps4":
        nibbles = [n for byte in positions.data.tolist() for n in (byte & 15, byte >> 4)]
        assert nibbles == four + [15] * (len(four) % 2)


WRONG = {
    "fewer than all": ("all", [], 2, 3, "2 of 3 entries"),
    "bytes where all are there": ("all", [1], 3, 3, "3 of 3 entries"),
    "a bit mask too short": ("bits", [255], 8, 9, "1 bytes for 9 entries"),
    "a bit mask too long": ("bits", [1, 0], 1, 8, "2 bytes for 8 entries"),
    "a bit past the end": ("bits", [0b0100_0001], 2, 6, "past the end"),
    "more bits than values": ("bits", [0b11], 1, 6, "positions of 2 entries, and 1 values"),
    "a gap past the end": ("gaps8", [2, 3], 2, 6, "past the end"),
    "a gap just past the end": ("gaps4", [0xF6], 1, 6, "past the end"),
    "more gaps than values": ("gaps8", [0, 0], 1, 6, "positions of 2 entries, and 1 values"),
    "fewer gaps than values": ("gaps4", [0xF0], 2, 6, "positions of 1 entries, and 2 values"),
    "a gap that goes on for ever": ("gaps8", [0, 255], 1, 900, "bytes behind"),
    "half a byte too much is none": ("gaps4", [0xF0, 0xFF], 1, 900, "bytes behind"),
    "only gaps that go on": ("gaps4", [0xFF], 0, 900, "bytes behind"),
    "a huge tensor of nothing": ("bits", [], 0, 2**61, "0 bytes for"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_encode_does_not_write_is_refused(name: str) -> None:
    coding, data, count, total, text = WRONG[name]
    with pytest.raises(CheckpointError, match=f"'conv.weight': .*{text}"):
        decode(Positions(coding, torch.tensor(data, dtype=torch.uint8)), count, total, "conv.weight")


@given(st.sampled_from(CODINGS[1:]), st.binary(max_size=60), st.integers(0, 500))
def test_any_bytes_are_positions_or_refused(coding: str, data: bytes, total: int) -> None:
    coded = Positions(coding, torch.tensor(list(data), dtype=torch.uint8))
    try:
        index = decode(coded, None, total)
    except CheckpointError:
        return
    assert len(index) == 0 or (index[0] >= 0 and index[-1] < total and bool((index.diff() > 0).all()))
    # The coding is canonical.
    kept = torch.zeros(total, dtype=torch.bool).index_fill_(0, index, True).tolist()
    if coding == "bits":
        packed = [sum(bit << i for i, bit in enumerate(kept[j : j + 8])) for j in range(0, total, 8)]
    else:
        codes = gap_codes(kept, 255 if coding == "gaps8" else 15)
        packed = codes
        if coding == "gaps4":
            codes += [15] * (len(codes) % 2)
            packed = [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]
    assert packed == list(data)
