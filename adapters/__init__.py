"""Adapters to the pruning tools that people already use, one module for each host.

Importing this package imports no host. A host's module is found by its name here, or, for hosts that others add, by
the entry-point group ``ip_plugin.adapters``: an entry ``name = "package.module"`` names a module which may offer
criteria to ``ip-plugin compare`` as a dict ``CRITERIA`` of `Criterion`, `ChannelCriterion`, `TrainingCriterion` and
`ChannelTrainingCriterion`. One whose name ends in ``+variety`` is that of the name before it, with filter variety.

>>> "torch" in hosts()
True
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Literal, Protocol, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

GROUP = "ip_plugin.adapters"
#: Ends the name of a criterion that is another one with filter variety.
VARIED = "+variety"


@dataclass(frozen=True)
class Criterion:
    """A way to choose what is pruned, as a comparison uses it.

    Attributes:
        title: for tables and plots.
        when: ``"at initialisation"`` (prune, then train) or ``"after training"`` (train, prune, fine-tune).
        prune: called with (model, count); must prune exactly `count` entries of ``prunable(model)``, in either space.
    """

    title: str
    when: Literal["at initialisation", "after training"]
    prune: Callable[[nn.Module, int], None]


@dataclass(frozen=True)
class ChannelCriterion:
    """A way to choose which channels are cut out of a network.

    Attributes:
        title, when: as in `Criterion`.
        cut: called with (model, ratio, images, labels); must cut about `ratio` of the channels of every layer but the
            last, in either space. Images and labels are a batch of the training data, for criteria that need gradients.
    """

    title: str
    when: Literal["at initialisation", "after training"]
    cut: Callable[[nn.Module, float, Tensor, Tensor], None]


#: Called when a training begins, with its optimizer; returns what is called after each step, with a function that
#: computes the loss of the step's batch anew.
Begin: TypeAlias = Callable[[Optimizer], Callable[[Callable[[], Tensor]], object]]


class Training(Protocol):
    """What a comparison offers to a criterion that takes part in the training."""

    @property
    def seed(self) -> int:
        """Of the run."""

    @property
    def steps(self) -> int:
        """Of a training."""

    @property
    def finetuning_steps(self) -> int:
        """Of the fine-tuning; 0 if there is none."""

    def batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Batches of training images and labels to compute scores on; fewer where there are not as many."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss that is trained with."""

    def train(self, begin: Begin | None = None) -> None:
        """Train the model from where it is, with a new optimizer and a whole schedule of the learning rate."""

    def finetune(self, begin: Begin | None = None) -> None:
        """Train it for the shorter time, and at the smaller learning rate, that a pruned network gets."""


@dataclass(frozen=True)
class TrainingCriterion:
    """A way to prune that takes part in the training: with scores that need data, while training, or more than once.

    Attributes:
        title: for tables and plots.
        train: called with (model, count, training); must train the model, and prune exactly `count` entries of
            ``prunable(model)`` by the end, in either space.
        trainings: how often it calls ``training.train``.
        finetunings: how often it calls ``training.finetune``.
    """

    title: str
    train: Callable[[nn.Module, int, Training], None]
    trainings: int = 1
    finetunings: int = 0


@dataclass(frozen=True)
class ChannelTrainingCriterion:
    """A way to cut channels that takes part in the training.

    Attributes:
        title, trainings, finetunings: as in `TrainingCriterion`.
        train: called with (model, ratio, training); must train the model, and cut about `ratio` of the channels of
            every layer but the last by the end, in either space.
    """

    title: str
    train: Callable[[nn.Module, float, Training], None]
    trainings: int = 1
    finetunings: int = 0


AnyCriterion: TypeAlias = Criterion | ChannelCriterion | TrainingCriterion | ChannelTrainingCriterion


def cuts_channels(criterion: AnyCriterion) -> bool:
    """Whether a criterion cuts channels, and its sparsities are shares of them."""
    return isinstance(criterion, (ChannelCriterion, ChannelTrainingCriterion))


def hosts() -> dict[str, EntryPoint]:
    """The installed hosts by name; ``hosts()[name].load()`` imports the adapter's module.

    The adapter of a host that is not installed is listed too; loading it raises ImportError.
    """
    return {entry.name: entry for entry in entry_points(group=GROUP)}
