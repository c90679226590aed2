"""A linear layer of a traced graph, with the activation that follows it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from .activation import Activation
from .addressing import Addressing, Window
from .coefficients import Coefficients
from .images import Images, Packing
from .kernels import nonzero
from .layout import Floats
from .loops import Choice, Loop, parts_of

#: From this density on a linear layer is left to torch, without a comparison.
DENSE = 0.3


class Linear(nn.Module):
    """A linear layer and an activation; `forward` is the dense way to run it.

    Args:
        name, inputs: of the layer in the model; `inputs` is its number of input features.
        coefficients, bias, activation: one basis filter with one tap.
    """

    #: As of a 1x1 convolution, whose pixels are the rows of inputs.
    window, groups = Window((1, 1)), 1

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

    def weight(self) -> Tensor:
        """The dense weight, made now."""
        return torch.from_numpy(self.coefficients.kernels(self.inputs, 1, 1)[..., 0])

    @functools.cached_property
    def _dense(self) -> tuple[Tensor, Tensor]:
        return self.weight(), torch.from_numpy(self.bias)

    def forward(self, values: Tensor) -> Tensor:
        """The result by torch; the dense weight stays in memory from the first call on."""
        return self.activation(F.linear(values, *self._dense))

    def bind(self, choice: Choice | None, rows: int) -> Callable[[Tensor], Tensor]:
        """A function that runs the layer on so many rows of inputs, by torch if that is the choice.

        What it returns may be overwritten by its next call.
        """
        if choice is None:
            return self.forward
        return self._one_by_one(rows) if choice.width == 1 else self._as_pixels(choice, rows)

    def _one_by_one(self, count: int) -> Callable[[Tensor], Tensor]:
        """A function that multiplies rows of inputs one by one."""
        entries = self.coefficients
        begin = parts_of(entries, 4 * numba.config.NUMBA_NUM_THREADS)
        row_begin = np.append(0, np.bincount(entries.outputs, minlength=entries.channels).cumsum()).astype(np.uint32)

        made = torch.empty(count, entries.channels)
        target = made.numpy().reshape(-1)

        def run(rows: Tensor) -> Tensor:
            nonzero.linear(
                len(begin) - 1, begin, row_begin, entries.inputs, entries.values, self.bias,
                rows.contiguous().numpy().reshape(-1), self.inputs, *self.activation.arguments,
                target, entries.channels,
            )  # fmt: skip
            return made

        return run

    def _as_pixels(self, choice: Choice, count: int) -> Callable[[Tensor], Tensor]:
        """A function that runs the layer like a 1x1 convolution of an image whose pixels are the rows of inputs."""
        addressing = Addressing.new(self.window, 1, 1, count)
        source, target = addressing.source.empty(self.inputs), addressing.target.empty(self.coefficients.channels)
        call = Loop(self.coefficients, self.bias, addressing, choice, self.activation).bind(source, target)
        view = addressing.target.view(target, self.coefficients.channels)[0, :, 0].t()
        packing = Packing.to_read(addressing)

        def run(rows: Tensor) -> Tensor:
            packing.pack(Images.of(rows.t()[None, :, None]), source)
            call()
            return view.contiguous()

        return run

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
