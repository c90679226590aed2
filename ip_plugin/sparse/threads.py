"""Threads: as many for loops as for torch, and what slows both down."""

from __future__ import annotations

import os
import threading
import warnings
from contextlib import AbstractContextManager, nullcontext

import numba
import torch

from ..errors import SparseFallbackWarning

_SERIAL = threading.Lock()


def share_threads() -> None:
    """Give numba as many threads as torch has; OpenMP has one number for both, which numba sets when it starts."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def one_at_a_time() -> AbstractContextManager[object]:
    """A lock where numba has neither OpenMP nor TBB: its own threads can serve one call at a time."""
    return _SERIAL if _layer() in ("", "workqueue") else nullcontext()


def warn_of_slow_threads(stacklevel: int) -> None:
    """Warn if numba's threads, or the environment, make loops far slower than they could be."""
    if torch.get_num_threads() == 1:
        return
    found, remedy = "", ""
    if _layer() == "workqueue":
        found = "numba starts loops by its workqueue layer, since it found no OpenMP"
        remedy = "install the system's libgomp (Debian, Ubuntu: apt install libgomp1), or pip install tbb"
    elif _layer() == "omp" and os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
        found, remedy = "OMP_WAIT_POLICY=passive lets threads sleep between loops", "unset it before Python starts"
    if found:
        warnings.warn(
            f"Sparse networks run at about half their speed. Found: {found}. What to do: {remedy}",
            SparseFallbackWarning,
            stacklevel=stacklevel,
        )


def _layer() -> str:
    """Numba's threading layer; empty before the first loop has run."""
    try:
        return str(numba.threading_layer())
    except ValueError:
        return ""
