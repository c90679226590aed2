"""What acts on each pixel by itself and could not be drawn into a convolution."""

from __future__ import annotations

from torch import Tensor, nn

from .activation import NONE, Activation


class Pointwise(nn.Module):
    """A scale and a shift of each channel, the addition of another value, and an activation.

    Args:
        scale, shift: of channels; None for one and zero.
        activation: of the result.
    """

    def __init__(self, scale: Tensor | None = None, shift: Tensor | None = None, activation: Activation = NONE) -> None:
        super().__init__()
        self.scale, self.shift, self.activation = scale, shift, activation

    def forward(self, values: Tensor, addend: Tensor | None = None) -> Tensor:
        """The result by torch."""
        if self.scale is not None and self.shift is not None:
            values = values * self.scale[:, None, None] + self.shift[:, None, None]
            return self.activation(values if addend is None else values.add_(addend))
        return self.activation(values.clone() if addend is None else values + addend)
