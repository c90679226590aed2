"""Records of cells as tests compare them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ip_plugin.compare import Cell, Data, Epoch, Record, Result, Results, Study, Training
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


#: A study of twenty runs that takes seconds.
SMALL = Study(
    criteria=("torch:random", "torch:l1"),
    sparsities=(0.5, 0.9),
    seeds=(0, 1),
    data=Data(train_images=100),
    training=Training(epochs=1, finetune_epochs=1),
)


def made_up(cell: Cell, accuracy: float | None = None) -> Record:
    """A record of nothing that was run: IP is one point above SP."""
    accuracy = 80.0 + cell.seed + (cell.space != "spatial") if accuracy is None else accuracy
    curve = (Epoch(1, "train", 1.0, 0.1, None, 0.5), Epoch(2, "finetune", 0.5, 0.01, 70.0, 1.0))
    result = Result(accuracy, None, 1000, 100, 0, (), 1.5, macs=200, macs_left=31, lr=0.1)
    return Record(cell, result, curve=curve, density={"0": 0.25}, bases={"0": [[1.0, 0.0], [0.0, 1.0]]})


class MadeUp:
    """An engine that runs nothing.

    Args:
        fails: cells whose records say that they failed.
        stops_at: a cell at whose begin the study is interrupted.
    """

    def __init__(self, fails: Collection[Cell] = (), stops_at: Cell | None = None) -> None:
        self.fails, self.stops_at = fails, stops_at
        self.ran: list[Cell] = []

    def __call__(self, cells: Sequence[Cell], study: Study, watcher: Any) -> Iterator[Record]:
        for cell in cells:
            if cell == self.stops_at:
                raise KeyboardInterrupt
            watcher.on_begin(cell)
            self.ran.append(cell)
            record = (
                Record(cell, traceback="Traceback\nRuntimeError: out of [memory]")
                if cell in self.fails
                else made_up(cell)
            )
            for epoch in record.curve:
                watcher.on_epoch(cell, epoch)
            yield record


def rows(results: Results) -> Any:
    """The results as a frame, without times."""
    return results.frame().drop(columns="seconds")
