"""A linear layer of a traced graph, with the activation that follows it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from .activation import Activation
from .coefficients import Coefficients
from .layout import Floats

#: From this density on a linear layer is left to torch.
DENSE = 0.3


class Linear(nn.Module):
    """A linear layer and an activation; `forward` is the dense way to run it.

    Args:
        name, inputs: of the layer in the model; `inputs` is its number of input features.
        coefficients, bias, activation: one basis filter with one tap.
    """

    def __init__(
        self, name: str, inputs: int, coefficients: Coefficients, bias: Floats, activation: Activation
    ) -> None:
        super().__init__()
        self.name, self.inputs, self.coefficients, self.bias = name, inputs, coefficients, bias
        self.activation = activation

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the dense weight."""
        return self.coefficients.channels, self.inputs

    @property
    def density(self) -> float:
        """Share of the coefficients that are not zero."""
        return len(self.coefficients.values) / max(1, math.prod(self.shape))

    @functools.cached_property
    def _dense(self) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.coefficients.kernels(self.inputs, 1, 1)[..., 0]), torch.from_numpy(self.bias)

    def forward(self, values: Tensor) -> Tensor:
        """The result by torch; the dense weight stays in memory from the first call on."""
        return self.activation(F.linear(values, *self._dense))

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the output for an input of this shape."""
        return (*shape[:-1], self.coefficients.channels)


def is_sparse_linear(module: nn.Module | None) -> bool:
    """Whether a module is an ordinary linear layer whose coefficients the loops have room for."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and module.weight.dtype == torch.float32
        and not module._forward_hooks
        and all(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values())
        and 0 < max(module.in_features, module.out_features) < 1 << 16
    )
