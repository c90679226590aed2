"""Sensitivity: what a model loses when one of its layers alone is pruned, and sparsities of layers made of that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..core.tensor_ref import by_basis, prunable_tensors
from ..errors import AmountError, ArgumentError, BatchError
from ..utils.example_input import run
from ..utils.preserved_state import preserved_state
from ..utils.validation import check_fraction
from .derivatives import Batches, Loss, pairs, unwrapped
from .schedules import Score
from .scores import magnitude
from .selection import rounded, select

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

Measure = Literal["accuracy", "loss"]


class Point(NamedTuple):
    """A measurement: the number of entries that the layer keeps, and the accuracy or the loss of the model."""

    kept: int
    value: float


class Curve(NamedTuple):
    """The measurements of one layer: first with all entries that are not pruned yet, then with ever fewer."""

    parameters: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` has measured.

    Attributes:
        measure: ``"accuracy"`` or ``"loss"``.
        curves: {layer name: measurements}, in model order. All curves begin with the same value, that of the model as
            it is.
        basis_parameters: number of the entries of all bases.
    """

    measure: Measure
    curves: Mapping[str, Curve]
    basis_parameters: int

    def frame(self) -> DataFrame:
        """One row for each measurement; needs pandas.

        Columns: layer, parameters (of the layer), sparsity (of the layer), kept (its entries), accuracy or loss.
        """
        import pandas as pd

        rows = [
            (name, curve.parameters, 1 - point.kept / curve.parameters, *point)
            for name, curve in self.curves.items()
            for point in curve.points
        ]
        return pd.DataFrame(rows, columns=["layer", "parameters", "sparsity", "kept", self.measure])

    def plot(self, axes: Axes | None = None) -> Figure:
        """One line for each layer, coloured by depth; needs matplotlib.

        Args:
            axes: drawn into; None makes a new figure.
        """
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure

        if axes is None:
            axes = Figure(figsize=(7, 4), layout="constrained").add_subplot()
        figure, names = axes.get_figure(), list(self.curves)
        assert isinstance(figure, Figure)
        shades = colormaps["viridis"].resampled(len(names))
        for number, (name, curve) in enumerate(self.curves.items()):
            densities, values = zip(
                *((point.kept / curve.parameters, point.value) for point in curve.points), strict=True
            )
            axes.plot(densities, values, ".-", color=shades(number), label=name)
        axes.set(xlabel="sparsity of the layer", ylabel=self.measure, xscale="log")
        axes.xaxis.set_inverted(True)
        limits, ticks = axes.get_xlim(), (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
        axes.set_xticks([1 - tick for tick in ticks], [f"{tick:g}" for tick in ticks])
        axes.set_xlim(limits)  # ticks have widened them
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        shown = range(0, len(names), math.ceil(len(names) / 20))
        bar = figure.colorbar(ScalarMappable(Normalize(-0.5, len(names) - 0.5), shades), ax=axes)
        bar.set_ticks(list(shown), labels=[names[number] for number in shown])
        bar.ax.yaxis.set_inverted(True)
        return figure

    def suggest(self, total: float) -> dict[str, float]:
        """Sparsities of layers that together prune a model to a total sparsity; `prune` takes them.

        They minimise the sum of the losses (of accuracy, or the rise of the loss) that the layers have alone. Between
        measurements losses are interpolated by the largest convex function below them. Where that ends, at the highest
        measured sparsity of every layer, all layers are pruned further in proportion. Every layer keeps an entry.

        The loss tells more than the accuracy, which hardly falls any more once a network has collapsed.

        Args:
            total: share of all prunable entries, as ``ip-plugin compare`` counts it: entries of bases are counted as
                kept, so in the interspace layers keep fewer by that number.

        Returns:
            {layer name: sparsity}. The layers keep exactly ``round((1 - total) * entries) - basis_parameters``.

        Raises:
            AmountError: no fraction, or one that would leave a layer empty, or that is below the present sparsity.
        """
        check_fraction(total, "total")
        entries = sum(curve.parameters for curve in self.curves.values())
        keep = round((1 - total) * entries) - self.basis_parameters
        kept = {name: curve.points[0].kept for name, curve in self.curves.items()}
        most = sum(kept.values())
        if not sum(count > 0 for count in kept.values()) <= keep <= most:
            raise AmountError(
                f"Every layer must keep an entry, and all together at most the {most} that are not pruned yet.",
                f"total={total!r}: {keep} entries to keep in {len(kept)} layers, besides {self.basis_parameters} in "
                "bases",
                'change the total sparsity, or share bases (sharing="model")',
            )
        parts: dict[float, list[tuple[str, int]]] = {}  # {loss for each entry: [(layer, entries)]}
        for name, curve in self.curves.items():
            hull = _convex([(kept[name] - count, self._lost(curve, value)) for count, value in curve.points])
            for start, end in pairwise(hull):
                parts.setdefault(_slope(start, end), []).append((name, end[0] - start[0]))
            parts.setdefault(math.inf, []).append((name, max(0, curve.points[-1].kept - 1)))
        for _, layers in sorted(parts.items()):
            share = min(Fraction(1), Fraction(sum(kept.values()) - keep, max(1, sum(size for _, size in layers))))
            for (name, _), taken in zip(layers, rounded([share * size for _, size in layers]), strict=True):
                kept[name] -= taken
        return {name: 1 - kept[name] / curve.parameters for name, curve in self.curves.items()}

    def _lost(self, curve: Curve, value: float) -> float:
        """What a value is worse than that of the model as it is."""
        worse = value - curve.points[0].value
        return max(0.0, -worse if self.measure == "accuracy" else worse)


def _convex(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The corners of the largest convex function that is nowhere above some points of ascending abscissae."""
    corners: list[tuple[int, float]] = []
    for x, y in points:
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-1], (x, y)):
            corners.pop()
        corners.append((x, y))
    return corners


def _slope(start: tuple[int, float], end: tuple[int, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float] | None = None,
    *,
    batches: Batches | None = None,
    loss: Loss | None = None,
    measure: Measure = "accuracy",
    sparsities: Sequence[float] = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99),
    score: Score = magnitude,
    progress: bool = False,
) -> Sensitivity:
    """Prune one layer alone, at several sparsities, and evaluate the model without training; then the next layer.

    After Li et al. 2017 (arXiv 1608.08710) and Han et al. 2015 (arXiv 1506.02626). In the interspace the coefficients
    of one layer are pruned; a basis that it shares stays as it is.

    Args:
        model: not changed: values, masks, buffers, modes, gradients, attributes and the random state are afterwards as
            they were, also if `evaluate` fails. All evaluations begin with the same random state.
        evaluate: called with the model, once for each measurement; returns its accuracy or loss. It must not train.
        batches, loss: instead of `evaluate`: pairs (inputs, targets), and what is called with (outputs, targets). The
            measure is the mean loss of the batches in evaluation mode. Batches are read again for each measurement.
        measure: what `evaluate` returns: ``"accuracy"`` (higher is better) or ``"loss"`` (lower is better).
        sparsities: of the layer; it keeps at least one entry. Those that it has already are left out.
        score: entries of a layer with the highest scores are kept; computed once.
        progress: show a progress bar.

    Returns:
        The measurements, with `Sensitivity.frame`, `Sensitivity.plot` and `Sensitivity.suggest`.

    Raises:
        SelectionError: the model has no prunable layer.
        ArgumentError: both or neither of `evaluate` and (`batches`, `loss`); of `measure`.
        AmountError: a sparsity that is no fraction.
        BatchError: `evaluate` or `loss` returns no finite number; see `ip_plugin.methods.snip` for batches.

    >>> from ip_plugin import masks
    >>> from ip_plugin.methods import prune
    >>> model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 2))
    >>> batches = [(torch.randn(100, 20), torch.arange(100) % 2)]
    >>> result = sensitivity(model, batches=batches, loss=nn.functional.cross_entropy)
    >>> list(result.frame())
    ['layer', 'parameters', 'sparsity', 'kept', 'loss']
    >>> model = prune(model, sparsity=result.suggest(0.9))
    >>> sum(int(mask.sum()) for mask in masks(model).values())
    22
    """
    from rich.progress import track  # here, as it takes time to import

    unwrapped(model)
    refs = prunable_tensors(model)
    if evaluate is None and batches is not None and loss is not None:
        measure, evaluate = "loss", partial(_mean_loss, batches=batches, loss=loss)
    elif evaluate is None or batches is not None or loss is not None:
        given = {"evaluate": evaluate, "batches": batches, "loss": loss}
        raise ArgumentError(
            "Either `evaluate` must be given, or `batches` and `loss`.",
            ", ".join(name for name, argument in given.items() if argument is not None) or "none of them",
            "pass a function of the model that returns its accuracy, or batches=[(inputs, targets)] and a loss",
        )
    if measure not in get_args(Measure):
        raise ArgumentError('`measure` must be "accuracy" or "loss".', f"{measure!r}", "say what `evaluate` returns")
    fractions = [check_fraction(sparsity, "sparsities") for sparsity in sparsities]

    def value() -> float:
        with preserved_state(model, buffers=True, attributes=True):
            return _finite(evaluate(model))

    scores, dense = score(model), value()
    curves: dict[str, Curve] = {}
    for ref in track(refs, "pruning each layer alone", disable=not progress):
        size, target = ref.parameter.numel(), ref.target
        points = [Point(size if ref.mask is None else int(ref.mask.sum()), dense)]
        for kept in sorted({max(1, size - round(fraction * size)) for fraction in fractions}, reverse=True):
            if kept < points[0].kept:
                (mask,) = select({target: scores[target]}, count=size - kept).values()
                with _zeroed(ref.parameter, ~mask):
                    points.append(Point(kept, value()))
        curves[ref.module_name] = Curve(size, tuple(points))
    return Sensitivity(measure, curves, sum(basis.numel() for basis in by_basis(refs)))


@contextmanager
def _zeroed(parameter: nn.Parameter, where: Tensor) -> Iterator[None]:
    """Entries of a Parameter set to zero: what a mask does, with nothing new in the model."""
    before = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.masked_fill_(where, 0)
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(before)


def _finite(value: Any) -> float:
    """What an evaluation has returned, as a number."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise BatchError(
            "An evaluation must return a finite number, the accuracy or the loss of the model.",
            f"{value!r}",
            "return for example the share of the images that are classified correctly",
        )
    return number


def _mean_loss(model: nn.Module, batches: Batches, loss: Loss) -> float:
    """The mean loss of batches in evaluation mode."""
    return fmean(_finite(loss(run(model, inputs), targets)) for inputs, targets in pairs(batches))
