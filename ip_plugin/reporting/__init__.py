"""Parameters, non-zeros, bytes and multiply-adds of pruned networks: what is measured, and how it is shown."""

from .measure import report
from .table import Report, Row

__all__ = ["Report", "Row", "report"]
