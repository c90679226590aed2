"""The k-th largest, against sorting."""

from __future__ import annotations

import math

import pytest
import torch

from ip_plugin import ranking
from ip_plugin.ranking import kth_largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("magnitudes", [False, True])
@pytest.mark.parametrize("few", [0, 1 << 17])
def test_against_sorting(few: int, magnitudes: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_FEW", few)
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(500, generator=generator, dtype=dtype) * torch.logspace(-30, 30, 500, dtype=dtype)
    special = torch.tensor([0.0, -0.0, 1.0, 1.0, -1.0, 1e-42, -1e-42, -math.inf, math.inf], dtype=dtype)
    alike = 1 + torch.randn(300, generator=generator, dtype=dtype) * 1e-5  # many in one bin
    parts = [spread.reshape(50, 10), special, alike, -alike]
    everything = torch.cat([part.flatten() for part in parts])
    expected = (everything.abs() if magnitudes else everything).sort(descending=True).values
    for k in range(1, len(expected) + 1):
        assert kth_largest(parts, k, magnitudes=magnitudes) == expected[k - 1], k


def test_many_numbers() -> None:
    values = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    for k in (1, 7, 40_000, 399_999, 400_000):
        assert kth_largest([values[:100], values[100:]], k) == values.sort(descending=True).values[k - 1]
