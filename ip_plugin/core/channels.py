"""Channels of convolutions and linear layers, whichever dimension of the weight holds them."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def by_group(module: nn.Module, weight: Tensor) -> Tensor:
    """A view of a weight (or of coefficients, or of a mask) as ``(groups, out / groups, in / groups, prod(kernel))``.

    >>> import torch
    >>> by_group(nn.ConvTranspose2d(4, 6, 3, groups=2), torch.zeros(4, 3, 3, 3)).shape
    torch.Size([2, 3, 2, 9])
    """
    groups = module.groups if isinstance(module, _ConvNd) else 1
    parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[2:]))
    # The weight of a transposed convolution is (in, out / groups, *kernel).
    return parts.transpose(1, 2) if isinstance(module, _ConvTransposeNd) else parts


def output_filters(module: nn.Module, weight: Tensor) -> Tensor:
    """The part of a weight that computes each output channel, one row each: ``(out, in / groups * prod(kernel))``."""
    return by_group(module, weight).flatten(0, 1).flatten(1)


def input_filters(module: nn.Module, weight: Tensor) -> Tensor:
    """The part of a weight that reads each input channel, one row each: ``(in, out / groups * prod(kernel))``."""
    return by_group(module, weight).transpose(1, 2).flatten(0, 1).flatten(1)
