"""A report, one row for each layer, and its forms: table, dict and CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Row:
    """One prunable layer (its weight or coefficients, without its bias), or a sum of rows.

    Attributes:
        layer: module name.
        space: ``"interspace"`` or ``"spatial"``.
        shape: of the coefficients or the weight.
        parameters: number of coefficients or weights.
        nonzeros: number of those that are neither masked nor zero.
        sparsity: ``1 - nonzeros / parameters``.
        basis: name of the first layer that uses the same basis; empty for a spatial layer.
        basis_parameters: number of entries of the basis, counted at the first layer that uses it, 0 at the others.
        bytes_dense: size of all values.
        bytes_sparse: size in the file that `ip_plugin.save` writes: stored values, their positions, and the basis where
            it is counted; dense if that is smaller.
        macs_dense: multiply-adds of the layer for the whole example input (all its samples).
        macs_nonzero: multiply-adds with a non-zero coefficient or weight.
        macs_basis: multiply-adds that the basis adds if the layer runs in the interspace, without composing kernels:
            N * N for each position and each input or output channel, whichever are fewer.
        mean_similarity, largest_similarity, effective_rank: how different the layer's filters are, see
            `ip_plugin.methods.filter_variety.Variety`; None in sums, for fewer than two filters, and if not requested.
        runs: how a sparse network runs the layer: ``"direct"``, ``"columns"``, ``"fused"``, ``"winograd"`` (dense, with
            fewer multiplications) or ``"dense"`` (by torch); several, comma-separated, if calls differ. None in other
            models and in sums. In a sparse network `bytes_sparse` is the memory that the layer takes.
        milliseconds: that the layer took in a sparse network, in one call with the example input
            (`SparseNetwork.profile` repeats calls); None if it is not one of the network's steps, and without an
            example input.
    """

    layer: str
    space: str
    shape: tuple[int, ...]
    parameters: int
    nonzeros: int
    sparsity: float
    basis: str
    basis_parameters: int
    bytes_dense: int
    bytes_sparse: int
    macs_dense: int | None
    macs_nonzero: int | None
    macs_basis: int | None
    mean_similarity: float | None = None
    largest_similarity: float | None = None
    effective_rank: float | None = None
    runs: str | None = None
    milliseconds: float | None = None


@dataclass(frozen=True)
class Report:
    """The result of `report`. Prints as a table.

    Attributes:
        rows: one for each prunable layer, in model order.
        prunable: their sum.
        everything: the sum including biases, norms, other parameters and bases: ``parameters`` is the number of entries
            in ``model.parameters()``, ``bytes_dense`` the size of the state_dict without masks, and ``bytes_sparse``
            that of a compact file without its header; multiply-adds are those of all Parameters.
        outside: what `prunable` and bases do not contain: ``{"LayerNorm.weight": 1536, ...}``, the number of entries by
            class of module and name, largest first.
    """

    rows: tuple[Row, ...]
    prunable: Row
    everything: Row
    outside: dict[str, int]

    @property
    def coverage(self) -> float:
        """Share of the model's parameters, without bases, that `prunable` contains."""
        parameters = self.everything.parameters - self.everything.basis_parameters
        return self.prunable.parameters / parameters if parameters else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers, ready for JSON."""
        return {
            "layers": [_plain(row) for row in self.rows],
            "prunable": _plain(self.prunable),
            "everything": _plain(self.everything),
            "outside": self.outside,
        }

    def to_csv(self) -> str:
        """Comma-separated values: a header, the layers, then the two sums."""
        out = io.StringIO()
        writer = csv.DictWriter(out, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in (*self.rows, self.prunable, self.everything):
            writer.writerow({**asdict(row), "shape": "x".join(map(str, row.shape))})
        return out.getvalue()

    def __rich__(self) -> RenderableType:
        from rich.table import Table

        table = Table(title="Parameters and non-zeros", caption=self._outside(), caption_justify="left")
        table.add_column("layer", overflow="fold")
        table.add_column("space")
        prepared = any(row.runs is not None for row in self.rows)
        if prepared:
            table.add_column("runs")
        for header in (
            "shape",
            "parameters",
            "non-zeros",
            "sparsity",
            "basis",
            "bytes",
            "as run" if prepared else "in a compact file",
        ):
            table.add_column(header, justify="right")
        with_macs = self.prunable.macs_dense is not None
        if with_macs:
            for header in ("MACs", "by non-zeros", "of the basis"):
                table.add_column(header, justify="right")
        with_variety = any(row.effective_rank is not None for row in self.rows)
        if with_variety:
            for header in ("mean sim.", "largest sim.", "eff. rank"):
                table.add_column(header, justify="right")
        with_times = any(row.milliseconds is not None for row in self.rows)
        if with_times:
            table.add_column("ms", justify="right")
        for row in (*self.rows, self.prunable, self.everything):
            if row is self.prunable:
                table.add_section()
            cells = [row.layer, row.space, *([row.runs or ""] if prepared else [])]
            cells += ["x".join(map(str, row.shape)), f"{row.parameters:,}", f"{row.nonzeros:,}"]
            basis = f"{row.basis_parameters:,}" if row.basis_parameters else "shared" if row.basis else ""
            cells += [f"{row.sparsity:.2%}", basis]
            cells += [f"{row.bytes_dense:,}", f"{row.bytes_sparse:,}"]
            if with_macs:
                cells += [
                    f"{macs:,}" for macs in (row.macs_dense, row.macs_nonzero, row.macs_basis) if macs is not None
                ]
            if with_variety and row.effective_rank is not None:
                cells += [f"{row.mean_similarity:.3f}", f"{row.largest_similarity:.3f}", f"{row.effective_rank:.1f}"]
            if with_times and row.milliseconds is not None:
                cells += [""] * (len(table.columns) - 1 - len(cells)) + [f"{row.milliseconds:.3f}"]
            table.add_row(*cells)
        return table

    def _outside(self) -> str:
        """What `prunable` does not contain, in a sentence."""
        largest = [f"{kind} {count:,}" for kind, count in list(self.outside.items())[:4]]
        rest = sum(self.outside.values()) - sum(list(self.outside.values())[:4])
        others = ", ".join([*largest, *([f"others {rest:,}"] if rest else [])])
        return f"`prunable` holds {self.coverage:.1%} of the parameters" + (f"; outside: {others}" if others else "")

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=180).print(self)
        return out.getvalue().rstrip("\n")


def _plain(row: Row) -> dict[str, Any]:
    return {**asdict(row), "shape": list(row.shape)}
