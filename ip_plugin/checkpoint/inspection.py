"""Inspection of a compact file, without the model that it was saved from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .container import CompactFile, dtype_of, opened
from .contents import nonzero_entries

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Line:
    """One tensor of a compact file.

    Attributes:
        name: in the state_dict of the plain model.
        shape: of the tensor.
        dtype: of the loaded tensor, and the stored dtype if it differs.
        entries: number of entries.
        nonzeros: number of entries that are neither masked nor zero.
        nbytes: of its values, positions and mask in the file, without its basis.
        positions: coding of the positions of its values: all (every value is stored), bits, gaps4, gaps8.
        masked: whether it has a mask.
        basis: number of its basis, None without one.
        tied: name of the tied tensor that has its values, empty if it has values itself.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    entries: int
    nonzeros: int
    nbytes: int
    positions: str
    masked: bool
    basis: int | None
    tied: str


@dataclass(frozen=True)
class Inspection:
    """The content of a compact file. Prints as a table.

    Attributes:
        lines: one for each tensor, in model order.
        bases: bytes of each basis.
        nbytes: of the file.
        nbytes_dense: of all values stored densely, without bases and masks.
    """

    lines: tuple[Line, ...]
    bases: tuple[int, ...]
    nbytes: int
    nbytes_dense: int

    @property
    def header(self) -> int:
        """Bytes of the file besides the tensors: names, shapes, checksum."""
        return self.nbytes - sum(self.bases) - sum(line.nbytes for line in self.lines)

    def __rich__(self) -> RenderableType:
        from rich.table import Table

        table = Table(title="Compact file")
        table.add_column("tensor", overflow="fold")
        for header in ("shape", "dtype", "entries", "non-zeros", "sparsity", "bytes", "positions", "mask", "basis"):
            table.add_column(header, justify="right")
        shown = [line for line in self.lines if len(line.shape) > 1 or line.positions != "all" or line.masked]
        for line in shown:
            table.add_row(
                line.name, "x".join(map(str, line.shape)), line.dtype, *_counts(line.entries, line.nonzeros),
                f"{line.nbytes:,}", f"as {line.tied}" if line.tied else line.positions, "yes" if line.masked else "",
                "" if line.basis is None else str(line.basis),
            )  # fmt: skip
        others = set(self.lines).difference(shown)
        table.add_section()
        if others:
            _sum(table, f"{len(others)} vectors and scalars", others)
        if self.bases:
            table.add_row(f"{len(self.bases)} bases", *[""] * 5, f"{sum(self.bases):,}")
        table.add_row("names, shapes, checksum", *[""] * 5, f"{self.header:,}")
        _sum(table, "file", self.lines, f"{self.nbytes:,}")
        table.caption = f"{self.nbytes_dense:,} bytes if stored densely"
        return table


def _counts(entries: int, nonzeros: int) -> tuple[str, str, str]:
    return f"{entries:,}", f"{nonzeros:,}", f"{1 - nonzeros / entries if entries else 0:.2%}"


def _sum(table: Any, name: str, lines: Iterable[Line], nbytes: str = "") -> None:
    owners = [line for line in lines if not line.tied]
    counts = _counts(sum(line.entries for line in owners), sum(line.nonzeros for line in owners))
    table.add_row(name, "", "", *counts, nbytes or f"{sum(line.nbytes for line in owners):,}")


def inspect(path: Path) -> Inspection:
    """Read and check a whole file that `ip_plugin.save` has written.

    Raises:
        CheckpointError: the file is corrupt, inconsistent, or no compact file.

    >>> import tempfile, torch, ip_plugin
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ip_plugin.save(torch.nn.Linear(4, 2), Path(folder, "linear.safetensors"))
    ...     inspection = inspect(Path(folder, "linear.safetensors"))
    >>> [(line.name, line.entries, line.nbytes) for line in inspection.lines]
    [('weight', 8, 32), ('bias', 2, 8)]
    """
    with opened(path) as file:
        records = file.description.tensors
        lines = tuple(_line(file, name) for name in records)
        bases = tuple(file.basis(number).nbytes for number in range(len(file.description.bases)))
        dense = sum(record.numel * dtype_of(record.dtype).itemsize for record in records.values() if not record.tied)
        return Inspection(lines, bases, file.size, dense)


def _line(file: CompactFile, name: str) -> Line:
    record = file.description.tensors[name]
    kept = None if record.mask == "positions" else file.kept(name)
    nonzeros = 0
    if not record.tied:
        nonzero, index = nonzero_entries(file.stored_values(name).reshape(-1)), file.positions(name)
        if kept is not None:
            nonzero = nonzero[kept] if index is None else nonzero[torch.isin(index, kept)]
        nonzeros = int(nonzero.sum())
    return Line(
        name=name,
        shape=record.shape,
        dtype=f"{record.dtype} as {record.stored}" if record.stored else record.dtype,
        entries=record.numel,
        nonzeros=nonzeros,
        nbytes=file.nbytes(name),
        positions=record.positions or "all",
        masked=bool(record.mask),
        basis=record.basis,
        tied=record.tied,
    )
