"""Studies: criteria side by side, ordinary (spatial) pruning against interspace pruning.

A study goes one way: `config` says what to run, `engines` run its cells (`cell`), `store` keeps their records,
`analysis` says what they mean, `report` shows it. `study` puts these together.

Importing this package imports none of them: the names below are loaded when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callbacks import Callback
    from .config import Cell, Data, Measure, Model, Study, Training, Tune
    from .engines.dask import Dask
    from .record import Epoch, Record, Result
    from .store import Results
    from .study import run

_HOMES = {
    **dict.fromkeys(("Cell", "Data", "Measure", "Model", "Study", "Training", "Tune"), "config"),
    **dict.fromkeys(("Epoch", "Record", "Result"), "record"),
    "Callback": "callbacks", "Dask": "engines.dask", "Results": "store", "run": "study",
}  # fmt: skip
__all__ = [
    "Callback", "Cell", "Dask", "Data", "Epoch", "Measure", "Model", "Record", "Result", "Results", "Study",
    "Training", "Tune", "run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
