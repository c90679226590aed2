"""Adapters to pruning libraries that people already use (hosts), one package each, and the protocol of criteria.

Importing this package imports no pruning library. An adapter's criteria are found by the entry-point group
``ip_plugin.adapters``; `Criterion` says how another package adds its own.

>>> "torch" in hosts()
True
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

GROUP = "ip_plugin.adapters"
#: Ends the name of a criterion that is another one with filter variety.
VARIED = "+variety"

Stage: TypeAlias = Literal["at initialisation", "while training", "after training"]
#: Called when a training begins, with its optimizer. It returns a function that is called after every optimizer step;
#: that function gets one that computes the loss of the step's batch again.
Begin: TypeAlias = Callable[[Optimizer], Callable[[Callable[[], Tensor]], object]]


class TrainingContext(Protocol):
    """The training data, the loss and the training of the network that a criterion prunes."""

    @property
    def seed(self) -> int:
        """Seed of the network's training."""

    @property
    def steps(self) -> int:
        """Optimizer steps of one `train`."""

    @property
    def finetuning_steps(self) -> int:
        """Optimizer steps of one `finetune`; 0 if nothing is fine-tuned."""

    def batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """At most `count` batches (images, labels) of the training data, to compute scores on."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss that is trained with."""

    def train(self, begin: Begin | None = None) -> None:
        """Train the model from its present state, with a new optimizer and a whole learning-rate schedule."""

    def finetune(self, begin: Begin | None = None) -> None:
        """Train it as a pruned network is fine-tuned: for fewer epochs, at a smaller learning rate."""


@dataclass(frozen=True)
class Criterion:
    """A way to prune, as ``ip-plugin compare`` runs it in the spatial domain and in the interspace.

    A package has criteria in a dict ``CRITERIA`` of one of its modules, and names that in its ``pyproject.toml``::

        [project.entry-points."ip_plugin.adapters"]
        mine = "my_package.criteria"

    The command then knows ``CRITERIA["saliency"]`` as ``mine:saliency``. A key that ends in ``+variety`` is the
    criterion of the key before it with filter variety; studies pair the two.

    Attributes:
        title: one line for tables and plots.
        stage: when the network is pruned. ``"at initialisation"``: `prune` is called before the training.
            ``"after training"``: it is called between training and fine-tuning. ``"while training"``: it trains the
            network itself, with ``training.train`` and ``training.finetune``.
        prune: called with (model, amount, training); prunes the model in place. `amount` is how many entries of
            ``prunable(model)`` must be pruned, exactly; with `removes_channels` it is the share of the channels to
            remove from every layer but the last. `training` is a `TrainingContext`.
        removes_channels: whether channels are removed; otherwise single entries are masked.
        trainings, finetunings: how often `prune` calls ``training.train`` and ``finetune`` (``"while training"``).

    >>> from ip_plugin.methods import apply_masks, select, snip
    >>> def prune(model, count, training):
    ...     scores = snip(model, training.batches(10), training.loss)
    ...     apply_masks(model, select(scores, count=count))
    >>> CRITERIA = {"saliency": Criterion("connection saliency", "at initialisation", prune)}
    """

    title: str
    stage: Stage
    prune: Callable[[nn.Module, Any, TrainingContext], object]
    removes_channels: bool = False
    trainings: int = 1
    finetunings: int = 0

    @classmethod
    def simple(cls, title: str, stage: Stage, prune: Callable[[nn.Module, int], object]) -> Criterion:
        """A criterion that needs neither data nor training: `prune` is called with (model, count).

        >>> from ip_plugin import prunable
        >>> from ip_plugin.adapters import torch_prune
        >>> def by_magnitude(model, count):
        ...     torch_prune.global_unstructured(prunable(model), torch_prune.L1Unstructured, amount=count)
        >>> CRITERIA = {"l1": Criterion.simple("global magnitude", "after training", by_magnitude)}
        """

        def without_training(model: nn.Module, count: int, training: TrainingContext | None = None) -> object:  # noqa: ARG001
            return prune(model, count)

        return cls(title, stage, without_training)


def with_and_without_variety(
    name: str,
    title: str,
    stage: Stage,
    prune: Callable[[bool, nn.Module, float, TrainingContext], object],
    **repeats: int,
) -> dict[str, Criterion]:
    """A criterion that removes channels, and the same one with filter variety, by name; arguments as for `Criterion`.

    `title` has ``{}`` where that of the second says so; `prune` is called with (has variety, model, share, training).
    """
    return {
        name + suffix: Criterion(title.format(also), stage, partial(prune, varied), removes_channels=True, **repeats)
        for varied, suffix, also in ((False, "", ""), (True, VARIED, " with variety"))
    }


def hosts() -> dict[str, EntryPoint]:
    """The installed adapters by name; ``hosts()[name].load()`` imports the module of its criteria.

    The adapter of a pruning library that is not installed is listed too; loading it raises ImportError.
    """
    return {entry.name: entry for entry in entry_points(group=GROUP)}
