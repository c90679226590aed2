"""Top-k selection, against sorting."""

from __future__ import annotations

import math

import pytest
import torch

from ip_plugin.utils.topk import keep_largest, kth_largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("magnitudes", [False, True])
@pytest.mark.parametrize("few", [0, 1 << 17])
def test_against_sorting(few: int, magnitudes: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = (torch.randn(500, generator=generator) * torch.logspace(-30, 30, 500)).to(dtype)
    special = torch.tensor([0.0, -0.0, 1.0, 1.0, -1.0, 1e-42, -1e-42, -math.inf, math.inf], dtype=dtype)
    alike = (1 + torch.randn(300, generator=generator) * 1e-5).to(dtype)  # many in one bin
    parts = [spread.reshape(50, 10), special, alike, -alike]
    everything = torch.cat([part.flatten() for part in parts])
    expected = (everything.abs() if magnitudes else everything).sort(descending=True).values
    for k in (*range(1, 20), *range(20, len(expected) - 300, 13), *range(len(expected) - 300, len(expected) + 1, 7)):
        assert kth_largest(parts, k, magnitudes=magnitudes, few=few) == expected[k - 1], k


def test_many_numbers() -> None:
    values = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    for k in (1, 7, 40_000, 399_999, 400_000):
        assert kth_largest([values[:100], values[100:]], k) == values.sort(descending=True).values[k - 1]


@pytest.mark.parametrize("k", range(8))
def test_masks_count_exactly(k: int) -> None:
    values = [torch.tensor([1.0, -2.0, 2.0]), torch.tensor([[2.0], [-3.0]]), torch.tensor([2.0, 0.5])]
    masks = keep_largest(values, k, magnitudes=True)
    assert [mask.shape for mask in masks] == [part.shape for part in values]
    kept = torch.cat([part.flatten()[mask.flatten()] for part, mask in zip(values, masks, strict=True)]).abs()
    assert sorted(kept.tolist(), reverse=True) == [3.0, 2.0, 2.0, 2.0, 2.0, 1.0, 0.5][:k]


def test_equal_values_are_taken_evenly_from_all_tensors() -> None:
    masks = keep_largest([torch.ones(1000), torch.ones(10, 100)], 500)
    assert [int(mask.sum()) for mask in masks] == [250, 250]
    assert all(20 <= int(row.sum()) <= 30 for row in masks[1])
