"""Seeds of random streams that have nothing to do with each other."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose, made of a user's seed.

    Equal seeds give equal streams: random scores from the stream that has initialised the weights rank the weights, and
    masks made of them keep the most negative ones.

    >>> derived_seed(0, "masks") == derived_seed(0, "masks"), derived_seed(0, "masks") == derived_seed(0, "order")
    (True, False)
    """
    digest = hashlib.blake2b(f"{purpose}:{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
