"""Interspace pruning as a plugin: prune filter coefficients with the tools that prune weights.

`interspace` writes the kernels of a network's convolutions in trainable filter bases; whatever prunes and trains then
acts on the coefficients. `bake` makes the network ordinary again. An independent implementation after Wimmer, Mehnert
and Condurache, CVPR 2022 (arXiv 2203.07808).
"""

from . import errors
from .checkpoint.api import load, save
from .core.convert import bake, interspace, prunable
from .core.gauge import normalize
from .core.masking import adopt_masks, masks, set_masks
from .core.optimizer import join_optimizer, param_groups
from .launcher import switch_off, switch_on, switched_on
from .reporting import Report, report

__all__ = [
    "Report",
    "adopt_masks",
    "bake",
    "errors",
    "interspace",
    "join_optimizer",
    "load",
    "masks",
    "normalize",
    "param_groups",
    "prunable",
    "report",
    "save",
    "set_masks",
    "switch_off",
    "switch_on",
    "switched_on",
]
__version__ = "0.1.0"
