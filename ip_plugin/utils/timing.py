"""Comparable times: calls are timed in turn in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def side_by_side(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 30, warmup: int = 5, prepared: bool = False,
    untimed: int = 0,
) -> dict[str, list[float]]:  # fmt: skip
    """Time several functions in turn, so that whatever slows the machine down slows all of them.

    Args:
        calls: functions by name; their results are dropped.
        rounds: how often each function is timed.
        warmup: how often each function is called before that.
        prepared: each function returns the function to time, and is not timed itself.
        untimed: calls before each timed one, so that short functions run with warm caches.

    Returns:
        Seconds of each round, by name; compare their medians.

    >>> times = side_by_side({"a list": lambda: [0] * 100, "a tuple": lambda: (0,) * 100}, rounds=3)
    >>> {name: len(seconds) for name, seconds in times.items()}
    {'a list': 3, 'a tuple': 3}
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + rounds):
        for name, call in calls.items():
            for _ in range(untimed):
                call()
            timed = call() if prepared else call
            assert callable(timed)
            started = time.perf_counter()
            timed()
            seconds = time.perf_counter() - started
            if turn >= warmup:
                times[name].append(seconds)
    return times
