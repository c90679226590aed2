"""Seeds of independent random streams, and code that runs with one."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose, derived from a user's seed.

    One seed for several purposes would give equal streams: random scores would rank the weights that were initialised
    with the same seed, and their masks would keep the most negative weights.

    >>> derived_seed(0, "masks") == derived_seed(0, "masks"), derived_seed(0, "masks") == derived_seed(0, "order")
    (True, False)
    """
    digest = hashlib.blake2b(f"{purpose}:{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Random numbers of torch, numpy and Python from a seed, and their states restored afterwards.

    Args:
        seed: of all of them.
        device: a GPU whose random numbers are included.
    """
    import numpy as np  # torch does without it

    states = random.getstate(), np.random.get_state()
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed) if devices else torch.default_generator.manual_seed(seed)
        np.random.seed(seed % (1 << 32))
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
