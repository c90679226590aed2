"""Results on disk: a folder that belongs to one study, and loses no finished run.

``study.json`` says with which settings and versions the runs were made, ``results.csv`` holds one line for each run.
Both are always whole; a study that was stopped is opened again and goes on with what is missing.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch

import ip_plugin
from ip_plugin.errors import ForeignFolderError
from ip_plugin.utils.atomic import write_whole

from .cell import Result
from .config import SPACES, Run, Settings
from .deployment import Deployment

COLUMNS = (
    "criterion", "sparsity", "space", "seed", "accuracy", "accuracy_before_pruning", "parameters", "parameters_left",
    "basis_parameters", "spatial_layers", "seconds", "macs", "macs_left",
    "file_bytes", "latency_ms", "dense_latency_ms",
)  # fmt: skip


class Results:
    """The runs that a folder holds, by cell of the grid."""

    def __init__(self, folder: Path, rows: dict[Run, Result]) -> None:
        self.folder = folder
        self.rows = rows

    @classmethod
    @contextmanager
    def open(cls, folder: Path, settings: Settings) -> Iterator[Results]:
        """Open a folder for one study and one process; it is made if it is not there.

        Raises:
            ForeignFolderError: it holds something else, results of other settings or versions, or is in use.
        """
        from filelock import FileLock, Timeout

        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ForeignFolderError(folder, "a file")
        description = {"settings": asdict(settings), "versions": versions()}
        _check(folder, description)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".lock", timeout=0):
                if not (folder / "study.json").exists():
                    write_whole(folder / "study.json", json.dumps(description, indent=2) + "\n")
                yield cls(folder, read(folder / "results.csv"))
        except Timeout:
            raise ForeignFolderError(folder, "another process that is writing to it now") from None

    def add(self, result: Result) -> None:
        """Keep a result; when this returns it is on the disk."""
        self.rows[result.run] = result
        write_whole(self.folder / "results.csv", _to_csv(self.rows))


def versions() -> dict[str, str]:
    """What the results depend on besides the settings."""
    return {"ip-plugin": ip_plugin.__version__, "torch": torch.__version__}


def _check(folder: Path, description: dict[str, Any]) -> None:
    """Refuse a folder that is not new, not empty and not this study's."""
    found = sorted(path.name for path in folder.iterdir() if path.name != ".lock") if folder.is_dir() else []
    if not found:
        return
    if "study.json" not in found:
        raise ForeignFolderError(folder, f"no study.json, but {', '.join(found[:5])}")
    try:
        there = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        differences = [
            f"{name} is {there[part].get(name)!r} there and {value!r} here"
            for part, values in description.items()
            for name, value in values.items()
            if there[part].get(name) != value
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ForeignFolderError(folder, f"a study.json that cannot be read ({error})") from error
    if differences:
        raise ForeignFolderError(folder, f"a study of other settings: {'; '.join(differences)}")


def _to_csv(rows: dict[Run, Result]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run, result in rows.items():
        before = "" if result.accuracy_before_pruning is None else result.accuracy_before_pruning
        counts = (result.parameters, result.parameters_left, result.basis_parameters)
        layers = " ".join(result.spatial_layers)
        macs = ["" if count is None else count for count in (result.macs, result.macs_left)]
        costs = ("", "", "") if result.deployment is None else astuple(result.deployment)
        writer.writerow([*run, result.accuracy, before, *counts, layers, round(result.seconds, 3), *macs, *costs])
    return out.getvalue()


def read(path: Path) -> dict[Run, Result]:
    """The rows of a ``results.csv``, by cell; none if it is not there.

    Raises:
        ForeignFolderError: a line cannot be read.
    """
    if not path.exists():
        return {}
    rows: dict[Run, Result] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for number, line in enumerate(csv.DictReader(file), start=2):
            try:
                result = _parse(line)
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise ForeignFolderError(
                    path.parent, f"results.csv, whose line {number} cannot be read ({error})"
                ) from error
            rows[result.run] = result
    return rows


def _parse(line: dict[str, str]) -> Result:
    spaces = {space: space for space in SPACES}
    if line["space"] not in spaces:
        raise ValueError(f"space {line['space']!r}")
    before = line["accuracy_before_pruning"]
    macs = [int(line[name]) if line[name] else None for name in ("macs", "macs_left")]
    return Result(
        run=Run(line["criterion"], float(line["sparsity"]), spaces[line["space"]], int(line["seed"])),
        accuracy=float(line["accuracy"]),
        accuracy_before_pruning=float(before) if before else None,
        parameters=int(line["parameters"]),
        parameters_left=int(line["parameters_left"]),
        basis_parameters=int(line["basis_parameters"]),
        spatial_layers=tuple(line["spatial_layers"].split()),
        seconds=float(line["seconds"]),
        macs=macs[0],
        macs_left=macs[1],
        deployment=_deployment(line),
    )


def _deployment(line: dict[str, str]) -> Deployment | None:
    """Files of before it could be measured do not have the columns."""
    found = [line.get(name) for name in ("file_bytes", "latency_ms", "dense_latency_ms")]
    if not any(found):
        return None
    file_bytes, latency, dense_latency = (value or "" for value in found)
    return Deployment(int(file_bytes), float(latency), float(dense_latency))
