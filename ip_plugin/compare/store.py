"""Results on disk: a folder that belongs to one study and is valid whenever the study is interrupted.

``study.json`` has the description of the study and the versions with which results were made, ``cells/`` one JSON
record for each cell that has ended, and ``results.csv``, made from these, one line for each result. All are replaced
atomically; an interrupted study is opened again and goes on with the cells that are missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ip_plugin.errors import StudyError
from ip_plugin.utils.atomic import write_whole

from .config import AXES, Cell, Study
from .record import Epoch, Record, Result, machine, versions

if TYPE_CHECKING:
    from .analysis import Analysis

COLUMNS = (*Cell._fields, *(item.name for item in dataclasses.fields(Result)))
#: Tasks of studies before there were cells/, as data and network.
_OLD_TASKS = {"cifar10-resnet": "resnet"}


class Results:
    """The results of a study.

    Args:
        study: what was run; cells outside of its grid are left out of tables.
        records: of the cells that have ended.
        folder: where they are.
        versions: of the packages with which they were made, and the machine.

    Attributes:
        study, records, folder, versions: as above.
    """

    def __init__(
        self, study: Study, records: Mapping[Cell, Record], folder: Path, versions: Mapping[str, str] | None = None
    ) -> None:
        self.study, self.records, self.folder = study, dict(records), Path(folder)
        self.versions = dict(versions or {})

    def _describe(self, grown: Study, there: str | None) -> None:
        """Write the description of the study, with every machine that it was run on."""
        self.versions = versions() | {"machine": _both(there, machine())}
        description = {"study": grown.model_dump(mode="json"), "versions": self.versions}
        with _written(self.folder):
            write_whole(self.folder / "study.json", json.dumps(description, indent=2) + "\n")

    @classmethod
    @contextmanager
    def open(cls, folder: Path, study: Study) -> Iterator[Results]:
        """Open a folder for one study and one process; it is made if it does not exist.

        Raises:
            StudyError: it holds something else, results of other settings or versions, is in use, or cannot be written.
        """
        from filelock import FileLock, Timeout

        folder = Path(folder)
        with _written(folder):
            names = sorted(path.name for path in folder.iterdir() if path.name != ".lock") if folder.exists() else []
            if names and "study.json" not in names:
                raise _foreign(folder, f"no study.json, but {', '.join(names[:5])}")
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                found = "another process that is writing to it now"
                raise _foreign(folder, found, "wait for it to end, or choose another folder with --output") from None
        try:
            there = _read(folder) if "study.json" in names else None
            if there is not None:
                differences = _differences(
                    there.study.common() | {"versions": there.versions}, study.common() | {"versions": versions()}
                )
                if differences:
                    raise _foreign(folder, f"a study of other settings: {differences}")
                grown = there.study.changed({axis: _union(there.study, study, axis) for axis in AXES[1:]})
            results = cls(study, there.records if there else {}, folder)
            results._describe(*((grown, there.versions.get("machine")) if there else (study, None)))
            yield results
        finally:
            lock.release()

    @classmethod
    def read(cls, *folders: str | os.PathLike[str]) -> Results:
        """The results of one or several folders; of several, those of one study with different axes.

        Folders of before there were ``cells/`` are read too, from ``results.csv``.

        Raises:
            StudyError: a folder has no results, cannot be read, or holds those of another study than the first.
        """
        parts = [_read(Path(folder)) for folder in folders]
        first = parts[0]
        for part in parts[1:]:
            differences = _differences(first.study.common(), part.study.common())
            if differences:
                rule = "Folders that are shown together must hold results of one study, with any axes."
                found = f"between {str(first.folder)!r} (there) and {str(part.folder)!r} (here): {differences}"
                raise StudyError(rule, found, "show them one by one")
            axes = {axis: _union(first.study, part.study, axis) for axis in AXES[1:]}
            done = {cell: record for cell, record in first.records.items() if record.result is not None}
            versions = dict(first.versions)
            for name, version in part.versions.items():
                versions[name] = _both(versions.get(name), version)
            first = cls(first.study.changed(axes), first.records | part.records | done, first.folder, versions)
        return first

    def add(self, record: Record) -> None:
        """Keep a record; when this returns it is on the disk.

        Raises:
            StudyError: it cannot be written; what was kept before is valid.
        """
        key = _key(record.cell)
        with _written(self.folder):
            for name, content in record.files.items():
                (self.folder / "files" / key).mkdir(parents=True, exist_ok=True)
                write_whole(self.folder / "files" / key / name, content)
            (self.folder / "cells").mkdir(exist_ok=True)
            record = dataclasses.replace(record, files={})
            write_whole(self.folder / "cells" / f"{key}.json", json.dumps(record.to_json()) + "\n")
            self.records[record.cell] = record
            write_whole(self.folder / "results.csv", _frame(self.records.values()).to_csv(index=False))

    def _of_the_study(self) -> list[Record]:
        return [self.records[cell] for cell in self.study.cells() if cell in self.records]

    @property
    def failures(self) -> dict[Cell, str]:
        """Tracebacks of the cells of the study that failed."""
        return {record.cell: record.traceback or "" for record in self._of_the_study() if record.result is None}

    @property
    def missing(self) -> list[Cell]:
        """Cells of the study that have not been run."""
        return [cell for cell in self.study.cells() if cell not in self.records]

    def frame(self) -> pd.DataFrame:
        """One row for each cell that has a result, in the order of the study; columns as in ``results.csv``."""
        return _frame(self._of_the_study())

    def curves(self) -> pd.DataFrame:
        """Training curves: one row for each cell and epoch."""
        columns = [*Cell._fields, *(item.name for item in dataclasses.fields(Epoch))]
        rows = [(*r.cell, *dataclasses.astuple(epoch)) for r in self._of_the_study() for epoch in r.curve]
        return pd.DataFrame(rows, columns=columns).astype({"accuracy": float, "train_accuracy": float})

    def density(self) -> pd.DataFrame:
        """Share of the entries that are kept: one row for each cell and layer."""
        rows = [(*r.cell, *item) for r in self._of_the_study() for item in r.density.items()]
        return pd.DataFrame(rows, columns=[*Cell._fields, "layer", "density"])

    def bases(self) -> dict[tuple[str, float, str, int], dict[str, list[list[float]]]]:
        """Learned bases of each cell, by the name of the first layer that has it."""
        return {record.cell: record.bases for record in self._of_the_study() if record.bases}

    def analysis(self) -> Analysis:
        """What the results say."""
        from .analysis import Analysis

        return Analysis(
            self.study, self.frame(), self.curves(), self.density(), self.bases(), made=self.versions,
            failures=self.failures,
        )  # fmt: skip

    def report(self, folder: str | os.PathLike[str] | None = None, command: str = "") -> Path:
        """Write ``report.html`` and plots; returns the page's path.

        Args:
            folder: where to; by default that of the results.
            command: how the study was started, for the page.

        Raises:
            StudyError: the folder cannot be written.
        """
        from . import report

        target = self.folder if folder is None else Path(folder)
        with _written(target):
            target.mkdir(parents=True, exist_ok=True)
            report.write(self.analysis(), target, command)
        return target / "report.html"


def _frame(records: Iterable[Record]) -> pd.DataFrame:
    rows = [{**r.cell._asdict(), **vars(r.result)} for r in records if r.result is not None]
    for row in rows:
        row |= {"spatial_layers": " ".join(row["spatial_layers"]), "seconds": round(row["seconds"], 3)}
    frame = pd.DataFrame(rows, columns=COLUMNS)
    texts = ("criterion", "space", "spatial_layers")
    counts = {"seed", "parameters", "parameters_left", "basis_parameters"}
    optional = {"macs", "macs_left", "file_bytes"}
    return frame.astype(
        {
            name: "Int64" if name in optional else int if name in counts else str if name in texts else float
            for name in COLUMNS
        }
    )


def _key(cell: Cell) -> str:
    """The name of a cell's files."""
    text = f"{cell.criterion} {cell.sparsity:g} {cell.space} {cell.seed}"
    return f"{re.sub(r'[^a-zA-Z0-9.]+', '-', text)}-{hashlib.sha256(repr(tuple(cell)).encode()).hexdigest()[:8]}"


def _both(first: str | None, second: str) -> str:
    return second if first is None else first if second in first.split(" and ") else f"{first} and {second}"


def _union(first: Study, second: Study, axis: str) -> list[Any]:
    return list(dict.fromkeys([*getattr(first, axis), *getattr(second, axis)]))


def _read(folder: Path) -> Results:
    """The results of a folder."""
    path = folder / "study.json"
    if not path.exists():
        rule = "A folder of results must have a study.json."
        raise StudyError(rule, f"none in {str(folder)!r}", "name the folder that --output named")
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        if "settings" in there:
            return _read_old(folder, there)
        study = Study(**there["study"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _foreign(folder, f"a study.json that cannot be read ({error})") from error
    records = {}
    for file in sorted((folder / "cells").glob("*.json")):
        try:
            record = Record.from_json(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise _foreign(folder, f"{file.name}, which cannot be read ({error})") from error
        records[record.cell] = record
    ordered = {cell: records.pop(cell) for cell in study.cells() if cell in records}
    return Results(study, ordered | records, folder, there["versions"])


def _read_old(folder: Path, there: dict[str, Any]) -> Results:
    """The results of a folder of before there were records: settings of one basis, and results.csv."""
    old = there["settings"]
    options = {name: old[name] for name in ("basis", "sharing", "constraint") if name in old}
    inter = f"interspace({','.join(f'{name}={value}' for name, value in options.items())})"
    names = ("epochs", "finetune_epochs", "batch_size", "lr", "weight_decay", "basis_lr", "device")
    values: dict[str, Any] = {
        "data": {"source": old["data"] or "digits", "train_images": old["train_images"]},
        "model": {"name": _OLD_TASKS.get(old["task"], "auto")},
        "training": {name: old[name] for name in names if name in old},
        "measure": {"deploy_threads": old.get("deploy_threads")},
        "spaces": ("spatial", inter),
    }
    study = Study(**values)
    try:
        frame = pd.read_csv(folder / "results.csv", keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as error:
        raise _foreign(folder, f"a results.csv that cannot be read ({error})") from error
    frame = frame.astype(object).where(frame.notna(), None)
    records = {}
    for row in frame.to_dict("records"):
        space = study.spaces[1] if row["space"] == "interspace" else row["space"]
        cell = Cell(row["criterion"], row["sparsity"], space, row["seed"])
        values = {name: row.get(name) for name in COLUMNS[4:]}
        values["spatial_layers"] = (values["spatial_layers"] or "").split()
        records[cell] = Record.from_json({"cell": cell, "result": values})
    axes = dict(zip(AXES[1:], map(set, zip(*records, strict=True)), strict=True))
    spaces = [space for space in study.spaces if space in axes["spaces"]]
    grown = study.changed(
        {"criteria": list(dict.fromkeys(cell.criterion for cell in records)), "spaces": spaces},
        sparsities=sorted(axes["sparsities"]), seeds=sorted(axes["seeds"]),
    )  # fmt: skip
    return Results(grown, records, folder, there["versions"])


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What differs between two descriptions, in words; empty if nothing does."""
    return "; ".join(
        f"{part}.{key} is {there.get(part, {}).get(key)!r} there and {value!r} here"
        for part, table in here.items()
        for key, value in table.items()
        if there.get(part, {}).get(key) != value
    )


def _foreign(folder: Path, found: str, remedy: str = "choose another folder with --output") -> StudyError:
    return StudyError(
        f"The output folder {str(folder)!r} must be new, empty, or hold results of the same study.", found, remedy
    )


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Turn the failure to write to a folder into a StudyError."""
    try:
        yield
    except OSError as error:
        rule = f"The output folder {str(folder)!r} must be one that can be written to."
        remedy = "make room or choose another folder with --output; what was written before is kept"
        raise StudyError(rule, error.strerror or str(error), remedy) from error
