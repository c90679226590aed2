"""Adapters to the pruning tools that people already use, one module for each host.

Importing this package imports no host. A host's module is found by its name here, or, for hosts that others add, by
the entry-point group ``ip_plugin.adapters``: an entry ``name = "package.module"`` names a module which may offer
criteria to ``ip-plugin compare`` as a dict ``CRITERIA`` of `Criterion` and `ChannelCriterion`.

>>> "torch" in hosts()
True
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Literal

from torch import Tensor, nn

GROUP = "ip_plugin.adapters"


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


def hosts() -> dict[str, EntryPoint]:
    """The installed hosts by name; ``hosts()[name].load()`` imports the adapter's module.

    The adapter of a host that is not installed is listed too; loading it raises ImportError.
    """
    return {entry.name: entry for entry in entry_points(group=GROUP)}
