"""Activations that loops apply to what they compute."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .kernels.activations import GELU, GELU_TANH, HARD_SIGMOID, HARD_SWISH, LEAKY_RELU, SIGMOID, SILU
from .nodes import called_plainly, is_of_torch, module_of


class Activation(NamedTuple):
    """An activation: a kind of `kernels.activations`, and its parameters; a clamp to `low` and `high` if it is 0."""

    kind: int = 0
    low: float = -math.inf
    high: float = math.inf

    @property
    def arguments(self) -> tuple[int, np.float32, np.float32]:
        """What loops take."""
        return self.kind, np.float32(self.low), np.float32(self.high)

    def __call__(self, values: Tensor) -> Tensor:
        """The activation by torch; values may be changed in place."""
        if self.kind:
            activated: Tensor = _FUNCTIONS[self.kind](values, self.low)
            return activated
        return values if self == NONE else values.clamp_(self.low, self.high)


NONE, RELU = Activation(), Activation(low=0.0)

_FUNCTIONS: dict[int, Any] = {
    SIGMOID: lambda values, _: values.sigmoid_(),
    SILU: lambda values, _: F.silu(values, inplace=True),
    HARD_SIGMOID: lambda values, _: F.hardsigmoid(values),
    HARD_SWISH: lambda values, _: F.hardswish(values),
    GELU: lambda values, _: F.gelu(values),
    GELU_TANH: lambda values, _: F.gelu(values, approximate="tanh"),
    LEAKY_RELU: F.leaky_relu,
}
_MODULES: dict[type[nn.Module | None], Any] = {
    nn.ReLU: lambda _: RELU,
    nn.Hardtanh: lambda module: Activation(0, module.min_val, module.max_val),
    nn.ReLU6: lambda module: Activation(0, module.min_val, module.max_val),
    nn.Sigmoid: lambda _: Activation(SIGMOID),
    nn.SiLU: lambda _: Activation(SILU),
    nn.Hardsigmoid: lambda _: Activation(HARD_SIGMOID),
    nn.Hardswish: lambda _: Activation(HARD_SWISH),
    nn.GELU: lambda module: Activation(GELU if module.approximate == "none" else GELU_TANH),
    nn.LeakyReLU: lambda module: Activation(LEAKY_RELU, module.negative_slope),
}
_CALLS: dict[Any, Activation] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), RELU),
    F.relu6: Activation(0, 0.0, 6.0),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_"), Activation(SIGMOID)),
    F.silu: Activation(SILU),
    F.hardsigmoid: Activation(HARD_SIGMOID),
    F.hardswish: Activation(HARD_SWISH),
    F.gelu: Activation(GELU),
}


def activation_of(node: fx.Node) -> Activation | None:
    """The activation that a node calls; None if it calls something else."""
    if node.op == "call_module":
        module = module_of(node)
        kind = _MODULES.get(type(module))
        return kind(module) if kind is not None and is_of_torch(module) and called_plainly(node) else None
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target is F.gelu and len(node.args) == 1 and node.kwargs == {"approximate": "tanh"}:
        return Activation(GELU_TANH)
    if node.target is F.leaky_relu and len(node.args) <= 2 and not set(node.kwargs) - {"negative_slope", "inplace"}:
        slope = node.args[1] if len(node.args) == 2 else node.kwargs.get("negative_slope", 0.01)
        return Activation(LEAKY_RELU, slope) if isinstance(slope, float) else None
    return None if len(node.args) != 1 or set(node.kwargs) - {"inplace"} else _CALLS.get(node.target)
