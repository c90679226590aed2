"""Converted and masked models are pickled like any other."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from kinds import CASES, backward, train
from torch import Tensor, nn

from ip_plugin import bake, interspace, masks
from ip_plugin.adapters import torch_prune
from ip_plugin.methods import magnitude, prune

pytestmark = pytest.mark.contract

SOME = pytest.mark.parametrize("case", CASES[::9], ids=lambda case: f"{case.kind}-{case.basis}-{case.sharing}")


def again(value: Any) -> Any:
    """A value from a file of torch.save."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def check_same(loaded: nn.Module, model: nn.Module, x: Tensor) -> None:
    assert torch.equal(backward(loaded, x), backward(model, x))
    parameters, loaded_parameters = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert list(loaded_parameters) == list(parameters)
    for name, parameter in parameters.items():
        other = loaded_parameters[name]
        assert type(other) is nn.Parameter and other.requires_grad == parameter.requires_grad
        assert other.grad is None if parameter.grad is None else torch.equal(other.grad, parameter.grad)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert [module.training for module in loaded.modules()] == [module.training for module in model.modules()]


@SOME
@pytest.mark.parametrize("converted", [False, True])
def test_a_pruned_model_goes_on_as_before(case: Any, converted: bool) -> None:
    model, x = case.interspace() if converted else case.plain()
    prune(model, magnitude, sparsity=0.5)
    model[2].eval()
    model[0].bias.requires_grad_(False) if model[0].bias is not None else None
    for loaded in (again(model), pickle.loads(pickle.dumps(model, 0))):
        check_same(loaded, model, x)
        if converted and case.sharing != "layer":
            assert loaded[0].parametrizations.weight[0].basis is loaded[2].parametrizations.weight[0].basis
        trained = copy.deepcopy(model)
        train(loaded, x), train(trained, x)
        assert torch.equal(loaded(x), trained(x))
        assert all(torch.equal(mask, masks(model)[name]) for name, mask in masks(loaded).items())
        loaded.load_state_dict(bake(copy.deepcopy(trained)).state_dict(), strict=True)  # its load hooks still work
        loaded[0].weight = nn.Parameter(torch.zeros(loaded[0].weight.shape))
        assert not loaded[0].weight.any() and model[0].weight.any()
        assert [type(layer) for layer in bake(loaded)] == [type(layer) for layer in case.plain()[0]]
        assert not any(module._load_state_dict_pre_hooks for module in loaded.modules())


class WithState(nn.Conv2d):
    """A user's layer that decides what of it is pickled."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "calls": 0}


def doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


@pytest.mark.parametrize("converted", [False, True])
def test_parts_of_a_model_and_what_users_have_added_to_them(converted: bool) -> None:
    layer, x = WithState(3, 4, 3), torch.randn(2, 3, 5, 5)
    layer.calls = 7
    if converted:
        interspace(layer, basis="dct")
    torch_prune.l1_unstructured(layer, "weight", amount=0.5)
    torch_prune.l1_unstructured(layer, "bias", amount=0.5)
    layer.register_forward_hook(doubled)
    loaded = again(layer)
    assert loaded.calls == 0 and layer.calls == 7 and type(loaded).__bases__ == (WithState,)
    assert torch.equal(loaded(x), layer(x)) and (loaded.bias == 0).sum() == 2
    assert torch.equal(copy.copy(layer)(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    torch_prune.remove(loaded, "bias")
    assert "bias" in layer.parametrizations and torch.equal(loaded(x), layer(x))
    chain = again(layer.parametrizations.weight)
    assert torch.equal(chain(), layer.weight) and torch.equal(again(chain[0])(chain.original), layer.weight)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers(kind: type[nn.RNNBase]) -> None:
    layer, x = kind(3, 4), torch.randn(5, 2, 3)
    torch_prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)
    loaded = again(layer)
    with torch.no_grad():
        for parameter in (*layer.parameters(), *loaded.parameters()):
            parameter.mul_(2)
    assert torch.equal(loaded(x)[0], layer(x)[0])
    assert bake(loaded).weight_hh_l0.eq(0).sum() == bake(layer).weight_hh_l0.eq(0).sum() > 0


def test_another_parametrization_of_the_same_layer() -> None:
    layer = nn.Conv2d(3, 4, 3)
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Tanh())
    loaded = again(interspace(layer))
    assert torch.equal(loaded.bias, layer.bias) and torch.equal(loaded.weight, layer.weight)
    nn.utils.parametrize.remove_parametrizations(loaded, "bias")
    assert torch.equal(loaded.bias, layer.bias) and type(bake(loaded)) is nn.Conv2d
