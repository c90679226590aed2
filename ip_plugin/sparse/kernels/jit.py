"""Decorators with the options that loops are compiled with."""

from __future__ import annotations

from typing import Any

import numba

_unchecked = {"boundscheck": False, "error_model": "numpy", "nogil": True}

#: Inlined by numba, not by LLVM: a call of a function that takes arrays counts references, atomically.
inline: Any = numba.njit(**_unchecked, inline="always")
#: For functions that other loops call rarely, or that take no arrays: compiled once.
helper: Any = numba.njit(**_unchecked, no_cpython_wrapper=True, no_cfunc_wrapper=True)
serial: Any = numba.njit(**_unchecked, cache=True)
parallel: Any = numba.njit(**_unchecked, cache=True, parallel=True)
