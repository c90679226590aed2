"""Sensitivity of the layers of a study's dense network, in each of its spaces; what ``ip-plugin sensitivity`` shows."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from rich.progress import Progress
from torch import Tensor, nn

from ip_plugin import load, methods
from ip_plugin.adapters import Criterion, TrainingContext
from ip_plugin.core.tensor_ref import by_basis, prunable_tensors
from ip_plugin.errors import AmountError, StudyError
from ip_plugin.methods.layer_sensitivity import Sensitivity
from ip_plugin.utils.atomic import write_whole
from ip_plugin.utils.validation import check_fraction

from .cell import execute
from .config import Cell, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


class _Measured(BaseException):
    """Ends a cell whose network has been measured, or could not be; not an error of a criterion."""

    def __init__(self, outcome: tuple[str, Sensitivity] | Exception) -> None:
        self.outcome = outcome


#: What is done with a network and its training.
_MEASURE: ContextVar[Callable[[nn.Module, TrainingContext], tuple[str, Sensitivity]]] = ContextVar("_MEASURE")


def _measure(model: nn.Module, amount: int, training: TrainingContext) -> None:  # noqa: ARG001
    outcome: tuple[str, Sensitivity] | Exception
    try:
        outcome = _MEASURE.get()(model, training)
    except Exception as error:
        outcome = error
    raise _Measured(outcome)


#: The way into a cell: a criterion is given the network and its training, whatever the study makes them of.
CRITERION = Criterion("sensitivity", "while training", _measure)


def sensitivities(
    study: Study,
    *,
    accuracy: bool = False,
    sparsities: Sequence[float] = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99),
    images: int = 1000,
    checkpoint: Path | None = None,
    progress: bool = False,
) -> dict[str, Sensitivity]:
    """Train the dense network of a study in each of its spaces, with its first seed, and measure its layers.

    Args:
        study: its data, model, training, spaces and first seed are used.
        accuracy: measure the accuracy in percent, and not the loss. Both on training images: test images are not
            looked at.
        sparsities: of the layer that is pruned.
        images: on how many training images, rounded up to whole batches.
        checkpoint: file of a trained network of the study, written by `ip_plugin.save`, instead of training.
        progress: show progress bars.

    Returns:
        {space: measurements}; for a checkpoint of the space of its network alone.

    Raises:
        StudyError, CheckpointError: the network cannot be trained, or the file belongs to another one.

    >>> study = Study(spaces=("interspace",), training={"epochs": 1})
    >>> result = sensitivities(study, sparsities=[0.9], images=100)["interspace"]
    >>> list(result.suggest(0.5))
    ['0', '3', '7', '12']
    """
    for sparsity in sparsities:
        check_fraction(sparsity, "sparsities")

    if checkpoint is not None:
        study = study.changed({"tune.learning_rates": ()})

    def measured(space: str) -> tuple[str, Sensitivity]:
        bar = Progress(disable=not progress or checkpoint is not None)
        epochs = bar.add_task(f"training, {space}", total=study.training.epochs)

        def measure(model: nn.Module, training: TrainingContext) -> tuple[str, Sensitivity]:
            if checkpoint is None:
                training.train()
            else:
                load(model, checkpoint)
            bar.stop()
            batches = training.batches(-(-images // study.training.batch_size))
            common: dict[str, Any] = {"sparsities": sparsities, "progress": progress}
            if accuracy:
                result = methods.sensitivity(model, partial(_accuracy, batches=batches), **common)
            else:
                result = methods.sensitivity(model, batches=batches, loss=training.loss, **common)
            converted = checkpoint is not None and by_basis(prunable_tensors(model))
            return "interspace" if converted else space, result

        token, threads = _MEASURE.set(measure), torch.get_num_threads()
        torch.set_num_threads(study.training.threads)
        try:
            with bar:
                cell = Cell(f"{__name__}:CRITERION", 0.0, space, study.seeds[0])
                execute(cell, study, lambda _: bar.advance(epochs))
        except _Measured as end:
            if isinstance(end.outcome, Exception):
                raise end.outcome from None
            return end.outcome
        finally:
            torch.set_num_threads(threads)
            _MEASURE.reset(token)
        raise AssertionError("a cell has ended without its criterion")

    return dict(map(measured, study.spaces if checkpoint is None else ["spatial"]))


@torch.no_grad()
def _accuracy(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    model.eval()
    hits = [model(images).argmax(1) == labels for images, labels in batches]
    return 100 * float(torch.cat(hits).double().mean())


def suggestions(results: Mapping[str, Sensitivity], totals: Sequence[float]) -> dict[str, dict[str, dict[str, float]]]:
    """{space: {total sparsity: {layer: sparsity}}}, without totals that leave too few entries beside the bases."""
    suggested: dict[str, dict[str, dict[str, float]]] = {space: {} for space in results}
    for (space, result), total in product(results.items(), totals):
        with suppress(AmountError):
            suggested[space][f"{total:g}"] = result.suggest(total)
    return suggested


def frame(results: Mapping[str, Sensitivity]) -> pd.DataFrame:
    """The measurements of all spaces: those of `Sensitivity.frame`, after a column ``space``."""
    frames = {space: result.frame() for space, result in results.items()}
    return pd.concat(frames, names=["space"]).reset_index("space")


def plot(results: Mapping[str, Sensitivity]) -> Figure:
    """The measurements of the spaces side by side, on one scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(results), 4), layout="constrained")
    (axes,) = figure.subplots(1, len(results), sharey=True, squeeze=False)
    for (space, result), place in zip(results.items(), axes, strict=True):
        result.plot(place)
        place.set_title(space)
    return figure


def table(results: Mapping[str, Sensitivity], totals: Sequence[float]) -> Table:
    """The suggested sparsities: a row for each layer, a column for each total and space."""
    from rich.table import Table

    suggested = suggestions(results, totals)
    columns = [(space, total) for total in map("{:g}".format, totals) for space in results if total in suggested[space]]
    shown = Table(
        "layer", *(f"{space}\n{total}" for space, total in columns), title="Sparsities of layers, by the total"
    )
    for name in next(iter(results.values())).curves:
        shown.add_row(name, *(f"{suggested[space][total][name]:.3f}" for space, total in columns))
    return shown


def write(results: Mapping[str, Sensitivity], totals: Sequence[float], folder: Path) -> None:
    """Write ``sensitivity.csv``, ``sensitivity.png``, ``sensitivity.svg`` and ``suggested.json`` into a folder.

    Raises:
        StudyError: the folder cannot be written.
    """
    figure = plot(results)
    contents: dict[str, str | bytes] = {
        "sensitivity.csv": frame(results).to_csv(index=False),
        "suggested.json": json.dumps(suggestions(results, totals), indent=2) + "\n",
    }
    for form in ("png", "svg"):
        figure.savefig(buffer := io.BytesIO(), format=form, dpi=150)
        contents[f"sensitivity.{form}"] = buffer.getvalue()
    with writable(folder):
        for name, content in contents.items():
            write_whole(folder / name, content)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Make a folder, and turn a failure to write to it into a StudyError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        rule, found = f"{str(folder)!r} must be a folder that can be written to.", error.strerror or str(error)
        raise StudyError(rule, found, "choose another one with --output") from error
