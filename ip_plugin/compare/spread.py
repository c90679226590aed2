"""A mean and what lies around it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A mean and the sample standard deviation around it (0 where there is one value)."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None where there is nothing to average.

        >>> Spread.of([1.0, 2.0, 3.0])
        Spread(mean=2.0, deviation=1.0, count=3)
        """
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), deviation, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.deviation:.1f}"

    @property
    def signed(self) -> str:
        """As a difference.

        >>> Spread.of([-1.0, -2.0]).signed
        '−1.5 ± 0.7'
        """
        return f"{self.mean:+.1f} ± {self.deviation:.1f}".replace("-", "−")
