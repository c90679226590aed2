"""Records of cells as tests compare them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ip_plugin.compare import Cell, Record, Result, Study
from ip_plugin.compare.cell import execute


def timeless(record: Record) -> Record:
    """A record without times."""
    curve = tuple(replace(epoch, seconds=0.0) for epoch in record.curve)
    result = record.result and replace(record.result, seconds=0.0)
    return replace(record, result=result, curve=curve)


def result_of(cell: Cell, study: Study, *arguments: Any) -> Result:
    """What `execute` measures in a cell, without times."""
    result = timeless(execute(cell, study, *arguments)).result
    assert result is not None
    return result
