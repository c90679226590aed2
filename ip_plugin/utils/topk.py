"""Exact top-k selection among very many numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_AT_ONCE = 1 << 20


def kth_largest(values: Sequence[Tensor], k: int, *, magnitudes: bool = False, few: int = 1 << 17) -> Tensor:
    """The exact k-th largest entry of several tensors, counted from 1.

    Needs no copy of all entries (`torch.kthvalue` makes three): a histogram of their leading bits, then one bin.

    Args:
        values: floating point tensors on one device, without NaN.
        k: at least 1, at most the number of entries.
        magnitudes: rank absolute values.
        few: up to this number of entries, they are copied.

    >>> kth_largest([torch.tensor([3.0, -5.0]), torch.tensor([4.0])], 2)
    tensor(3.)
    >>> kth_largest([torch.tensor([3.0, -5.0]), torch.tensor([4.0])], 2, magnitudes=True)
    tensor(4.)
    """

    def parts() -> Iterator[Tensor]:
        for part in values:
            for chunk in part.flatten().split(_AT_ONCE):
                wide = chunk.to(torch.promote_types(chunk.dtype, torch.float32))
                yield wide.abs() if magnitudes else wide

    if sum(part.numel() for part in values) <= few:
        return _kth(torch.cat(list(parts())), k)
    counts = torch.zeros(1 << 16, dtype=torch.int64, device=values[0].device)
    for part in parts():
        counts += _leading_bits(part).bincount(minlength=len(counts))
    from_above = counts.flip(0).cumsum(0)
    place = int((from_above < k).sum())
    bin_number = len(counts) - 1 - place
    inside = torch.cat([part[_leading_bits(part) == bin_number] for part in parts()])
    return _kth(inside, k - int(from_above[place] - counts[bin_number]))


def keep_largest(values: Sequence[Tensor], k: int, *, magnitudes: bool = False) -> list[Tensor]:
    """Masks of exactly the k largest entries of several tensors together.

    Ties at the threshold are broken evenly over all entries with that value, and deterministically.

    Args: as `kth_largest`; `k` may be 0.

    >>> keep_largest([torch.tensor([3.0, 5.0]), torch.tensor([[4.0]])], 2)
    [tensor([False,  True]), tensor([[True]])]
    """
    if k in (0, sum(part.numel() for part in values)):
        return [torch.full_like(part, bool(k), dtype=torch.bool) for part in values]
    threshold = kth_largest(values, k, magnitudes=magnitudes)
    masks, tied = [], []
    for part in values:
        ranked = part.abs() if magnitudes else part
        masks.append((ranked > threshold).contiguous())
        tied.append((ranked == threshold).flatten().nonzero().squeeze(1))
    counts = [len(places) for places in tied]
    # Fractional parts of multiples of the golden ratio are spread evenly, without any period.
    spread = torch.arange(sum(counts), dtype=torch.float64, device=threshold.device) * ((math.sqrt(5) - 1) / 2) % 1
    taken = torch.zeros(sum(counts), dtype=torch.bool, device=threshold.device)
    taken[spread.topk(k - sum(int(mask.sum()) for mask in masks), largest=False).indices] = True
    for mask, places, chosen in zip(masks, tied, taken.split(counts), strict=True):
        mask.view(-1)[places[chosen]] = True
    return masks


def _kth(values: Tensor, k: int) -> Tensor:
    return values.kthvalue(len(values) - k + 1).values


def _leading_bits(values: Tensor) -> Tensor:
    """The sixteen leading bits as numbers from 0, in the order of the values.

    Positive floats are ordered like their bits, negative ones the other way round. Both zeros get the same number.
    """
    wide = values.dtype == torch.float64
    bits = (values + 0.0).view(torch.int64 if wide else torch.int32) >> (48 if wide else 16)
    return torch.where(bits < 0, -1 - (bits & 0x7FFF), bits) + (1 << 15)
