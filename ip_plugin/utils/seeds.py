"""Seeds of independent random streams."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose, derived from a user's seed.

    One seed for several purposes would give equal streams: random scores would rank the weights that were initialised
    with the same seed, and their masks would keep the most negative weights.

    >>> derived_seed(0, "masks") == derived_seed(0, "masks"), derived_seed(0, "masks") == derived_seed(0, "order")
    (True, False)
    """
    digest = hashlib.blake2b(f"{purpose}:{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
