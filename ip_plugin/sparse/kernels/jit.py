"""How loops are compiled."""

from __future__ import annotations

from typing import Any

import numba

_unchecked = {"boundscheck": False, "error_model": "numpy", "nogil": True}

#: Drawn in by numba where it is called. A call of what takes arrays counts references, atomically.
inline: Any = numba.njit(**_unchecked, inline="always")
#: For what other loops call rarely, or what takes no arrays: compiled once.
helper: Any = numba.njit(**_unchecked, no_cpython_wrapper=True, no_cfunc_wrapper=True)
serial: Any = numba.njit(**_unchecked, cache=True)
parallel: Any = numba.njit(**_unchecked, cache=True, parallel=True)
