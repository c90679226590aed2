"""Channels of weights, in ordinary, grouped and transposed convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ip_plugin.core.channels import input_filters, output_filters


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 9, 3), nn.Conv2d(6, 9, 3, groups=3), nn.ConvTranspose2d(6, 9, 3),
        nn.ConvTranspose2d(6, 9, 3, groups=3), nn.Linear(6, 9), nn.Conv1d(6, 9, 2, groups=3),
    ],
)  # fmt: skip
def test_channels_of_a_mask_against_the_layers_own_outputs(layer: nn.Module) -> None:
    """A mask keeps a channel if the channel changes with an input, or an output with the channel."""
    shape = {nn.Linear: (1, 6), nn.Conv1d: (1, 6, 5)}.get(type(layer), (1, 6, 5, 5))
    dim = 1
    torch.manual_seed(0)
    kept = torch.rand(layer.weight.shape) > 0.5
    for row in range(0, kept.shape[0], 2):
        kept[row] = False
    kept[:, 1] = False
    with torch.no_grad():
        layer.weight.mul_(kept)
        base = layer(torch.zeros(shape))
        moved_outputs = torch.zeros(9, dtype=torch.bool)
        moving_inputs = torch.zeros(6, dtype=torch.bool)
        for channel in range(6):
            x = torch.zeros(shape)
            x.select(dim, channel).copy_(torch.randn_like(x.select(dim, channel)))
            changed = (layer(x) != base).movedim(dim, 0).flatten(1).any(1)
            moved_outputs |= changed
            moving_inputs[channel] = changed.any()
    assert torch.equal(output_filters(layer, kept).any(1), moved_outputs)
    assert torch.equal(input_filters(layer, kept).any(1), moving_inputs)
