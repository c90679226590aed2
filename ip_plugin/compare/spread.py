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
        return f"{self:.1f}"

    def __format__(self, spec: str) -> str:
        """Both numbers in one format.

        >>> f"{Spread(1.0, 0.25, 3):.2f}"
        '1.00 ± 0.25'
        """
        return f"{self.mean:{spec}} ± {self.deviation:{spec}}"

    def scaled(self, factor: float) -> Spread:
        """In another unit.

        >>> str(Spread(1500.0, 100.0, 3).scaled(1e-3))
        '1.5 ± 0.1'
        """
        return Spread(factor * self.mean, factor * self.deviation, self.count)

    @property
    def signed(self) -> str:
        """As a difference.

        >>> Spread.of([-1.0, -2.0]).signed
        '−1.5 ± 0.7'
        """
        return f"{self.mean:+.1f} ± {self.deviation:.1f}".replace("-", "−")
