"""How long the steps of a sparse network take, as a table."""

from __future__ import annotations

import io
from typing import NamedTuple

from .graph import ROOT
from .program import Program


class StepTime(NamedTuple):
    """A step of a sparse network.

    Attributes:
        step: its kind: a class of `steps`, `pooling` or `elementwise`, or what torch calls.
        layer: name of the layer or module that it runs; empty if it is another function.
        how: how a layer is run, see `Run`; empty for other steps.
        milliseconds: the median of several calls.
    """

    step: str
    layer: str
    how: str
    milliseconds: float


class Profile(tuple[StepTime, ...]):
    """The steps of a sparse network in order; printed, a table."""

    __slots__ = ()

    @property
    def milliseconds(self) -> float:
        """Of all steps."""
        return sum(step.milliseconds for step in self)

    def by_kind(self) -> dict[str, float]:
        """Milliseconds of all steps of each kind, the largest first."""
        kinds: dict[str, float] = {}
        for step in self:
            kinds[step.step] = kinds.get(step.step, 0.0) + step.milliseconds
        return dict(sorted(kinds.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table("step", "layer", "how", title=f"{self.milliseconds:.2f} ms in {len(self)} steps")
        table.add_column("ms", justify="right")
        table.add_column("share", justify="right")
        for step in self:
            share = step.milliseconds / max(self.milliseconds, 1e-9)
            table.add_row(step.step, step.layer, step.how, f"{step.milliseconds:.3f}", f"{share:.1%}")
        table.add_section()
        for kind, milliseconds in self.by_kind().items():
            share = milliseconds / max(self.milliseconds, 1e-9)
            table.add_row(kind, "all", "", f"{milliseconds:.3f}", f"{share:.1%}")
        out = io.StringIO()
        Console(file=out, width=120).print(table)
        return out.getvalue().rstrip("\n")


def profile_of(program: Program, seconds: list[float]) -> Profile:
    """The profile of a program whose steps take so long."""
    steps = []
    for step, took in zip(program.steps, seconds, strict=True):
        node, run = step.node, None if step.layer is None else step.layer.run
        kind, layer = type(step).__name__, "" if run is None else run.layer
        if kind == "Torch" and run is None:
            kind = f"torch: {getattr(node.target, '__name__', node.target)}"
            if node.op == "call_module":
                kind, layer = "torch", str(node.target).removeprefix(f"{ROOT}.")
        steps.append(StepTime(kind, layer, "" if run is None else run.how, 1e3 * took))
    return Profile(steps)
