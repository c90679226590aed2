"""A convolution of a traced graph, fused with what follows it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from ..errors import SparseExecutionError
from .activation import NONE, Activation
from .addressing import Window
from .coefficients import Coefficients
from .layout import Floats


class Convolution(nn.Module):
    """A 2D convolution, the addition of a residual, and an activation; `forward` is the dense way to run it.

    Args:
        name, window, groups, inputs: of the layer in the model; `inputs` is its number of input channels.
        coefficients, bias: with the BatchNorm that follows folded in.
        activation: of the result.
    """

    def __init__(
        self, name: str, window: Window, groups: int, inputs: int, coefficients: Coefficients, bias: Floats,
        activation: Activation = NONE,
    ) -> None:  # fmt: skip
        super().__init__()
        self.name, self.window, self.groups, self.inputs = name, window, groups, inputs
        self.coefficients, self.bias, self.activation = coefficients, bias, activation

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the dense weight."""
        return self.coefficients.channels, self.inputs // self.groups, *self.window.kernel

    @property
    def density(self) -> float:
        """Share of the coefficients that are not zero."""
        return len(self.coefficients.values) / max(1, math.prod(self.shape))

    @property
    def depthwise(self) -> bool:
        """Whether each output channel reads one input channel."""
        return self.groups == self.inputs

    def entries(self, order: str) -> Coefficients:
        """The coefficients that a loop takes: for ``"direct"`` and ``"columns"`` those of the standard basis."""
        if order in ("direct", "columns"):
            return self.coefficients.composed(self.inputs, self.groups, math.prod(self.window.kernel))
        return self.coefficients

    def weight(self) -> Tensor:
        """The dense weight, composed now."""
        kernels = self.coefficients.kernels(self.inputs, self.groups, math.prod(self.window.kernel))
        return torch.from_numpy(kernels.reshape(self.shape))

    @functools.cached_property
    def _dense(self) -> tuple[Tensor, Tensor]:
        return self.weight(), torch.from_numpy(self.bias)

    def forward(self, images: Tensor, residual: Tensor | None = None) -> Tensor:
        """The result by torch; the dense weight stays in memory from the first call on."""
        result = self.convolved(images)
        if residual is not None:
            result += residual
        return self.activation(result)

    def convolved(self, images: Tensor) -> Tensor:
        """The convolution alone, by torch."""
        return F.conv2d(images, *self._dense, *self.window[1:], self.groups)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """Shape of the output for an input of this shape; SparseExecutionError unless that is a batch of images."""
        if len(shape) != 4 or 0 in shape:
            remedy = "pass tensors of shape (images, channels, height, width)"
            raise SparseExecutionError(
                "A sparse network must be given batches of images.", f"shape {tuple(shape)}", remedy
            )
        return shape[0], self.coefficients.channels, *self.window.output_size(*shape[2:])


def can_run_sparse(module: nn.Module) -> bool:
    """Whether a module is an ordinary 2D convolution whose coefficients the loops have room for."""
    if not isinstance(module, nn.Conv2d) or any(
        getattr(type(module), name) is not getattr(nn.Conv2d, name) for name in ("forward", "_conv_forward")
    ):
        return False
    if module._forward_hooks or not all(isinstance(h, BasePruningMethod) for h in module._forward_pre_hooks.values()):
        return False
    spans = [(size - 1) * step for size, step in zip(module.kernel_size, module.dilation, strict=True)]
    same_on_both_sides = not isinstance(module.padding, str) or not any(span % 2 for span in spans)
    fits = math.prod(module.kernel_size) <= 256 and max(module.in_channels, module.out_channels) < 1 << 16
    return module.padding_mode == "zeros" and module.weight.dtype == torch.float32 and same_on_both_sides and fits
