"""Channels of convolution and linear layers: which of them a mask leaves anything of."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def outputs_left(module: nn.Module, kept: Tensor) -> Tensor:
    """Which output channels of a convolution or linear layer have any entry left: bools, on the CPU."""
    if isinstance(module, _ConvTransposeNd):
        blocks = kept.reshape(module.groups, -1, *kept.shape[1:])
        return blocks.transpose(1, 2).flatten(2).any(2).flatten().cpu()
    return kept.flatten(1).any(1).cpu()


def inputs_left(module: nn.Module, kept: Tensor) -> Tensor:
    """Which input channels of a convolution or linear layer have any entry left: bools, on the CPU."""
    if isinstance(module, _ConvTransposeNd):
        return kept.flatten(1).any(1).cpu()
    groups = module.groups if isinstance(module, _ConvNd) else 1
    blocks = kept.reshape(groups, -1, *kept.shape[1:])
    return blocks.transpose(1, 2).flatten(2).any(2).flatten().cpu()
