"""Validation of fractions and counts: numbers of Python or numpy, but no bools."""

from __future__ import annotations

import numbers
from typing import TypeGuard

from ..errors import AmountError


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


def check_fraction(value: object, name: str = "sparsity") -> float:
    """Return the value of the argument `name`; raise AmountError if it is no number in [0, 1].

    >>> check_fraction(0.5)
    0.5
    """
    if not is_fraction(value):
        rule = f"`{name}` must be a fraction in [0, 1]."
        raise AmountError(rule, _described(value), "pass a number between 0.0 and 1.0")
    return float(value)


def check_count(value: object, available: int, name: str = "count") -> int:
    """Return the value of the argument `name`; raise AmountError unless it is a whole number from 0 to `available`.

    >>> check_count(3, available=4)
    3
    """
    if not is_count(value) or value > available:
        rule = f"`{name}` must be a whole number of at most {available}, the number of entries."
        raise AmountError(rule, _described(value), f"pass an int between 0 and {available}")
    return int(value)


def _described(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"
