"""The largest of very many numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_FEW = 1 << 17
_AT_ONCE = 1 << 20


def kth_largest(values: Sequence[Tensor], k: int, *, magnitudes: bool = False) -> Tensor:
    """The k-th largest of all entries of several tensors, counted from 1, exactly.

    Found without a copy of all of them (`torch.kthvalue` makes three): by their leading bits first, then in one bin.

    Args:
        values: floating point, on one device; NaN must not be among them.
        k: at least 1, at most as many as there are.
        magnitudes: rank absolute values.

    >>> kth_largest([torch.tensor([3.0, -5.0]), torch.tensor([4.0])], 2)
    tensor(3.)
    >>> kth_largest([torch.tensor([3.0, -5.0]), torch.tensor([4.0])], 2, magnitudes=True)
    tensor(4.)
    """

    def parts() -> Iterator[Tensor]:
        for part in values:
            for few in part.flatten().split(_AT_ONCE):
                wide = few.to(torch.promote_types(few.dtype, torch.float32))
                yield wide.abs() if magnitudes else wide

    if sum(part.numel() for part in values) <= _FEW:
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

    Where equal values must be told apart, they are taken evenly over all entries that have them, and always alike.

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
    # Fractional parts of multiples of the golden ratio are spread evenly, and follow no period of the kernels.
    spread = torch.arange(sum(counts), dtype=torch.float64, device=threshold.device) * ((math.sqrt(5) - 1) / 2) % 1
    taken = torch.zeros(sum(counts), dtype=torch.bool, device=threshold.device)
    taken[spread.topk(k - sum(int(mask.sum()) for mask in masks), largest=False).indices] = True
    for mask, places, chosen in zip(masks, tied, taken.split(counts), strict=True):
        mask.view(-1)[places[chosen]] = True
    return masks


def _kth(values: Tensor, k: int) -> Tensor:
    return values.kthvalue(len(values) - k + 1).values


def _leading_bits(values: Tensor) -> Tensor:
    """The sixteen leading bits as numbers from 0 that are ordered as the values are.

    Floats of one sign are ordered as their bits are; those of negative numbers the other way round. Both zeros are
    one number.
    """
    wide = values.dtype == torch.float64
    bits = (values + 0.0).view(torch.int64 if wide else torch.int32) >> (48 if wide else 16)
    return torch.where(bits < 0, -1 - (bits & 0x7FFF), bits) + (1 << 15)
