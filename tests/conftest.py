from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch starts its threads: tests share the machine with a second worker.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    yield
