"""What counts as an amount: fractions and counts, Python's or numpy's, but no bools."""

from __future__ import annotations

import numbers
from typing import TypeGuard


def is_fraction(value: object) -> TypeGuard[float]:
    """Whether a value is a number in [0, 1].

    >>> is_fraction(0.5), is_fraction(1), is_fraction(float("nan")), is_fraction(True)
    (True, True, False, False)
    """
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


def is_count(value: object, least: int = 0) -> TypeGuard[int]:
    """Whether a value is a whole number of at least `least`.

    >>> is_count(3), is_count(3.0), is_count(0, 1), is_count(True)
    (True, False, False, False)
    """
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least
