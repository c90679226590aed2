"""NNI's pruners in either space, see `pruners`; and `finish`, `speedup` and NNI's helpers for them."""

from nni.compression import TorchEvaluator

from ..shared.plain_view import plain_layers
from .helpers import (
    ChannelDependency,
    GroupDependency,
    InputChannelDependency,
    ReshapeDependency,
    auto_set_denpendency_group_ids,
    compute_sparsity_compact2origin,
    compute_sparsity_mask2compact,
    count_flops_params,
)
from .pruners import (
    AGPPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LevelPruner,
    LightningEvaluator,
    LinearPruner,
    MovementPruner,
    SlimPruner,
    TaylorPruner,
    config_list,
)
from .wrappers import finish, speedup

__all__ = [
    "AGPPruner",
    "ChannelDependency",
    "FPGMPruner",
    "GroupDependency",
    "InputChannelDependency",
    "L1NormPruner",
    "L2NormPruner",
    "LevelPruner",
    "LightningEvaluator",
    "LinearPruner",
    "MovementPruner",
    "ReshapeDependency",
    "SlimPruner",
    "TaylorPruner",
    "TorchEvaluator",
    "auto_set_denpendency_group_ids",
    "compute_sparsity_compact2origin",
    "compute_sparsity_mask2compact",
    "config_list",
    "count_flops_params",
    "finish",
    "plain_layers",
    "speedup",
]
