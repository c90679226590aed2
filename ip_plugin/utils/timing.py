"""Times that can be compared: of calls that take turns in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def side_by_side(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 30, warmup: int = 5, prepared: bool = False,
    untimed: int = 0,
) -> dict[str, list[float]]:  # fmt: skip
    """Call each in turn, again and again, so that whatever slows the machine down slows all of them.

    Args:
        calls: by name; what they return is not kept.
        rounds: how often each is timed.
        warmup: how often each is called before that.
        prepared: time what each call returns, a function, and not the call itself.
        untimed: calls before each that is timed, so that short ones find in the caches what they left there.

    Returns:
        Seconds of each round, by name; compare their medians.

    >>> times = side_by_side({"a list": lambda: [0] * 100, "a tuple": lambda: (0,) * 100}, rounds=3)
    >>> {name: len(found) for name, found in times.items()}
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
            took = time.perf_counter() - started
            if turn >= warmup:
                times[name].append(took)
    return times
