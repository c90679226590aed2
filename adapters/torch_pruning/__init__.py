"""Torch-Pruning in either space: `pruner` makes its pruners work on coefficients, see `wrapping`."""

from ..shared.plain_view import plain_layers
from .masked_channels import cut_masked_channels
from .scores import ScoredImportance
from .variety import VariedImportance
from .wrapping import count_ops_and_params, pruner

__all__ = [
    "ScoredImportance",
    "VariedImportance",
    "count_ops_and_params",
    "cut_masked_channels",
    "plain_layers",
    "pruner",
]
