"""The pruning methods of `torch.nn.utils.prune` as criteria of ``ip-plugin compare``."""

from __future__ import annotations

from torch import nn

from ip_plugin.adapters import Criterion
from ip_plugin.core.convert import prunable

from .pruning import L1Unstructured, RandomUnstructured, global_unstructured


def _by_magnitude(model: nn.Module, count: int) -> None:
    global_unstructured(prunable(model), L1Unstructured, amount=count)


def _at_random(model: nn.Module, count: int) -> None:
    global_unstructured(prunable(model), RandomUnstructured, amount=count)


CRITERIA = {
    "l1": Criterion.simple("global magnitude, after training", "after training", _by_magnitude),
    "l1_init": Criterion.simple("global magnitude, at initialisation", "at initialisation", _by_magnitude),
    "random": Criterion.simple("random, at initialisation", "at initialisation", _at_random),
}
