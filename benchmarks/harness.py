"""Ratios of times, measured side by side: the two alternate in one run, and an unsteady run is thrown away."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from ip_plugin.utils import timing

UNSTEADY = 0.10


@dataclass(frozen=True)
class Ratio:
    """Median time of a variant over the median time of the baseline, in one run.

    Attributes:
        ratio: of the medians.
        low, high: quartiles of the ratios of neighbouring measurements.
        baseline: median time of the baseline in milliseconds.
        drift: how far the baseline's median moved between the halves of the run, as a fraction.
    """

    ratio: float
    low: float
    high: float
    baseline: float
    drift: float

    def __str__(self) -> str:
        return (
            f"{self.ratio:.2f} (quartiles {self.low:.2f} to {self.high:.2f}; "
            f"baseline {self.baseline:.1f} ms, drift {self.drift:.0%})"
        )


def side_by_side(
    baseline: Callable[[], object],
    variants: dict[str, Callable[[], object]],
    *,
    rounds: int = 30,
    warmup: int = 5,
    attempts: int = 5,
    prepared: bool = False,
    untimed: int = 0,
) -> dict[str, Ratio]:
    """Run the baseline and the variants in turn, `rounds` times.

    With `prepared` a call of each gives what is timed: what it does before is not counted. So many `untimed` calls come
    before each that is timed.

    Raises:
        RuntimeError: the baseline moved by more than 10 % in each of the attempts.
    """
    for attempt in range(attempts):
        calls = {"baseline": baseline, **variants}
        times = timing.side_by_side(calls, rounds=rounds, warmup=warmup, prepared=prepared, untimed=untimed)
        plain = times.pop("baseline")
        halves = [statistics.median(plain[: rounds // 2]), statistics.median(plain[rounds // 2 :])]
        drift = max(halves) / min(halves) - 1
        if drift <= UNSTEADY:
            return {name: _ratio(plain, values, drift) for name, values in times.items()}
        print(f"attempt {attempt + 1} thrown away: the baseline moved by {drift:.0%}")
    raise RuntimeError(
        f"the baseline moved by more than {UNSTEADY:.0%} in each of {attempts} runs; is the machine idle?"
    )


def _ratio(plain: list[float], values: list[float], drift: float) -> Ratio:
    neighbours = [value / base for value, base in zip(values, plain, strict=True)]
    low, _, high = statistics.quantiles(neighbours, n=4)
    ratio = statistics.median(values) / statistics.median(plain)
    return Ratio(ratio, low, high, 1e3 * statistics.median(plain), drift)
