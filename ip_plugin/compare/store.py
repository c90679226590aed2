"""Results on disk: a folder that belongs to one study and is valid whenever the study is interrupted.

``study.json`` has the settings and versions with which results were made, ``results.csv`` one line for each cell that
has finished. Both are replaced atomically; an interrupted study is opened again and goes on with the cells that are
missing.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch

import ip_plugin
from ip_plugin.errors import StudyError
from ip_plugin.utils.atomic import write_whole

from .cell import Result
from .config import SPACES, Cell, Settings
from .deployment import Deployment

#: How the value of each column is read: the fields of `Cell`, of `Result` and of `Deployment`, in their order.
_READ: dict[str, Callable[[Any], Any]] = {
    "criterion": str, "sparsity": float, "space": str, "seed": int, "accuracy": float, "accuracy_before_pruning": float,
    "parameters": int, "parameters_left": int, "basis_parameters": int,
    "spatial_layers": lambda names: tuple(names.split()), "seconds": float, "macs": int, "macs_left": int,
    "file_bytes": int, "latency_ms": float, "dense_latency_ms": float,
}  # fmt: skip
COLUMNS = tuple(_READ)
#: Columns that are empty, together, where nothing was measured.
_OPTIONAL = ({"accuracy_before_pruning"}, {"macs"}, {"macs_left"}, set(COLUMNS[-3:]))


def to_row(result: Result) -> dict[str, Any]:
    """A result as one flat row, by `COLUMNS`; None where nothing was measured."""
    cell, *measured, deployment = vars(result).values()
    values = (*cell, *measured, *((None, None, None) if deployment is None else astuple(deployment)))
    plain = {"spatial_layers": " ".join(result.spatial_layers), "seconds": round(result.seconds, 3)}
    return dict(zip(COLUMNS, values, strict=True)) | plain


def from_row(row: Mapping[str, Any]) -> Result:
    """The result of a row, which may be one of text; older files do not have the last columns.

    Raises:
        KeyError, ValueError, TypeError, AttributeError: the row is not that of a result.
    """
    if row["space"] not in SPACES:
        raise ValueError(f"space {row['space']!r}")
    empty = {name for name in COLUMNS if row.get(name) in (None, "")}
    not_measured = {name for names in _OPTIONAL if names <= empty for name in names}
    values: list[Any] = [None if name in not_measured else read(row[name]) for name, read in _READ.items()]
    values[-3:] = [None if COLUMNS[-1] in not_measured else Deployment(*values[-3:])]
    values[:4] = [Cell(*values[:4])]
    return Result(*values)


class Results:
    """The results that a folder holds, by cell of the grid."""

    def __init__(self, folder: Path, rows: dict[Cell, Result]) -> None:
        self.folder = folder
        self.rows = rows

    @classmethod
    @contextmanager
    def open(cls, folder: Path, settings: Settings) -> Iterator[Results]:
        """Open a folder for one study and one process; it is made if it does not exist.

        Raises:
            StudyError: it holds something else, results of other settings or versions, or is in use.
        """
        from filelock import FileLock, Timeout

        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise _foreign(folder, "a file")
        description = {"settings": asdict(settings), "versions": versions()}
        _check(folder, description)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".lock", timeout=0):
                if not (folder / "study.json").exists():
                    write_whole(folder / "study.json", json.dumps(description, indent=2) + "\n")
                yield cls(folder, read(folder / "results.csv"))
        except Timeout:
            found = "another process that is writing to it now"
            raise _foreign(folder, found, "wait for it to end, or choose another folder with --output") from None

    def add(self, result: Result) -> None:
        """Keep a result; when this returns it is on the disk."""
        self.rows[result.cell] = result
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(to_row, self.rows.values()))
        write_whole(self.folder / "results.csv", text.getvalue())


def read(path: Path) -> dict[Cell, Result]:
    """The results in a ``results.csv``, by cell; none if there is no such file.

    Raises:
        StudyError: a line cannot be read.
    """
    if not path.exists():
        return {}
    results: dict[Cell, Result] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                result = from_row(row)
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                found = f"results.csv, whose line {number} cannot be read ({error})"
                raise _foreign(path.parent, found) from error
            results[result.cell] = result
    return results


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    return {"ip-plugin": ip_plugin.__version__, "torch": torch.__version__}


def _check(folder: Path, description: dict[str, Any]) -> None:
    """Refuse a folder that is neither new, nor empty, nor this study's."""
    names = sorted(path.name for path in folder.iterdir() if path.name != ".lock") if folder.is_dir() else []
    if not names:
        return
    if "study.json" not in names:
        raise _foreign(folder, f"no study.json, but {', '.join(names[:5])}")
    try:
        there = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        differences = [
            f"{name} is {there[part].get(name)!r} there and {value!r} here"
            for part, values in description.items()
            for name, value in values.items()
            if there[part].get(name) != value
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _foreign(folder, f"a study.json that cannot be read ({error})") from error
    if differences:
        raise _foreign(folder, f"a study of other settings: {'; '.join(differences)}")


def _foreign(
    folder: Path, found: str, remedy: str = "choose another folder with --output, or remove this one"
) -> StudyError:
    return StudyError(
        f"The output folder {str(folder)!r} must be new, empty, or hold results of the same study.", found, remedy
    )
