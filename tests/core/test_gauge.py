"""The filter scale: `unit_gauge` reads without a change, `normalize` rescales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kinds import Case, backward, every_case
from torch import nn

from ip_plugin import interspace, normalize
from ip_plugin.core.gauge import unit_gauge
from ip_plugin.core.tensor_ref import prunable_tensors

pytestmark = pytest.mark.contract


def stretched(case: Case) -> tuple[nn.Sequential, torch.Tensor]:
    """A model with filter norms other than one."""
    model, x = case.interspace(torch.float64, constraint="none")
    for name, parameter in model.named_parameters():
        if name.endswith("basis"):
            parameter.data.mul_(torch.linspace(0.5, 3, len(parameter), dtype=torch.float64)[:, None])
    return model, x


@every_case
def test_normalize_changes_the_gauge_and_nothing_else(case: Case) -> None:
    model, x = stretched(case)
    expected = backward(model, x)
    read = [unit_gauge(layer.parameter.detach(), layer.parametrization) for layer in prunable_tensors(model)]
    assert normalize(model) is model
    torch.testing.assert_close(model(x), expected)
    for layer, unit in zip(prunable_tensors(model), read, strict=True):
        torch.testing.assert_close(layer.parameter.detach(), unit)
        if layer.interspace is not None:
            norms = layer.interspace.basis.norm(dim=1)
            torch.testing.assert_close(norms, torch.ones_like(norms))
    # The present gradients are those of the scaled parameters.
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    backward(model, x)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name])


def test_reading_in_unit_gauge_changes_no_parameter() -> None:
    model = interspace(nn.Conv2d(3, 4, 3), basis=3 * torch.eye(9), constraint="none")
    layer = prunable_tensors(model)[0]
    version, value = layer.parameter._version, layer.parameter.detach().clone()
    torch.testing.assert_close(unit_gauge(layer.parameter, layer.parametrization), 3 * value)
    assert layer.parameter._version == version and torch.equal(layer.parameter, value)


@pytest.mark.parametrize("constraint", ["unit", "none", "orthonormal"])
def test_a_normal_basis_stays_bit_for_bit(constraint: Any) -> None:
    model = interspace(nn.Conv2d(3, 4, 3), constraint=constraint)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    normalize(model)
    after = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_extra_state")}
    assert after and all(torch.equal(tensor, state[name]) for name, tensor in after.items())
    assert model.parametrizations.weight[0].constraint == ("unit" if constraint == "none" else constraint)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9}, "Adam": {}, "AdamW": {"amsgrad": True}, "Adamax": {}, "NAdam": {}, "RAdam": {},
    "RMSprop": {"centered": True, "momentum": 0.9, "eps": 1e-30}, "Adagrad": {},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_is_that_of_gradients_in_the_new_gauge(name: str) -> None:
    # Parameters that do not move (lr=0): state gathered before and scaled must equal state gathered after.
    found = []
    for normalize_first in (True, False):
        model, x = stretched(Case("conv2d", "orthonormal", "model"))
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.0, **OPTIMIZERS[name])
        if normalize_first:
            normalize(model, optimizer)
        for _ in range(3):
            backward(model, x)
            optimizer.step()
        if not normalize_first:
            normalize(model, optimizer)
        found.append([optimizer.state[parameter] for parameter in model.parameters()])
    for expected, state, parameter in zip(*found, model.parameters(), strict=True):
        assert set(state) == set(expected)
        if parameter.shape == (
            9,
            9,
        ):  # under the new constraint, gradients of a basis have no component along its filters
            continue
        for key, value in state.items():
            torch.testing.assert_close(value, expected[key])


def test_unknown_optimizer_state_is_reset_with_a_warning() -> None:
    model, x = stretched(Case("conv2d", "orthonormal", "model"))
    optimizer = torch.optim.Rprop(model.parameters())
    backward(model, x)
    optimizer.step()
    with pytest.warns(UserWarning, match="optimizer state was reset: .*step_size"):
        normalize(model, optimizer)
    kept = [bool(optimizer.state.get(parameter)) for parameter in model.parameters()]
    assert kept.count(False) == 3  # two tensors of coefficients and their basis
