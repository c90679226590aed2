"""`preserved_state` undoes what a block does to a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ip_plugin.utils.preserved_state import preserved_state


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()


def test_modes_gradients_and_random_state_are_restored_also_after_a_failure() -> None:
    model = network()
    model[1].eval()
    gradient = model[0].weight.grad = torch.ones(4, 4)
    random_state = torch.get_rng_state()
    with pytest.raises(KeyError), preserved_state(model):
        model.train()[0].weight.grad = None
        model(torch.randn(3, 4)).sum().backward()
        assert model[0].weight.grad is not gradient
        raise KeyError
    assert [module.training for module in model] == [True, False, True]
    assert model[0].weight.grad is gradient and torch.equal(gradient, torch.ones(4, 4))
    assert model[0].bias.grad is None
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("buffers", [False, True])
def test_buffers_keep_their_values_if_asked_for(buffers: bool) -> None:
    model = network()
    mean = model[1].running_mean
    with preserved_state(model, buffers=buffers):
        model(torch.randn(3, 4))
    assert model[1].running_mean is mean and bool(mean.any()) != buffers


@pytest.mark.parametrize("attributes", [False, True])
def test_attributes_are_put_back_if_asked_for(attributes: bool) -> None:
    model = network()
    weight, mean = model[0].weight, model[1].running_mean
    with preserved_state(model, attributes=attributes):
        model[0].weight, model[1].running_mean = nn.Parameter(torch.ones(4, 4)), torch.ones(4)
        model[1].momentum, model[2].note = None, "new"
    restored = (model[0].weight is weight, model[1].running_mean is mean, model[1].momentum == 0.1)
    assert restored == (attributes,) * 3 and hasattr(model[2], "note") != attributes
