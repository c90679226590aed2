"""Optimizers built before and after the conversion."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from kinds import Case, backward, every_case
from torch import nn

from ip_plugin import bake, interspace, join_optimizer, param_groups
from ip_plugin.errors import OptimizerError

pytestmark = pytest.mark.contract


def basis_of(layer: nn.Module) -> nn.Parameter:
    found: nn.Parameter = layer.parametrizations.weight[0].basis
    return found


@every_case
def test_an_optimizer_built_before_trains_everything_after_joining(case: Case) -> None:
    model, x = case.plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    join_optimizer(case.convert(model), optimizer)
    in_groups = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(in_groups) == len(set(in_groups))
    assert set(in_groups) == {id(p) for p in model.parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(model, x)
    optimizer.step()
    assert all((p != before[name]).any() for name, p in model.named_parameters())
    join_optimizer(model, optimizer)  # again: nothing happens
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == in_groups


@pytest.mark.parametrize("basis", ["standard", "orthonormal", "dct", 2 * torch.eye(9) + 0.1])
def test_momentum_goes_on_exactly_as_that_of_gradients_by_coefficients(basis: object) -> None:
    """Transformed momentum of weights equals momentum gathered for coefficients."""
    found = []
    for convert_first in (True, False):
        model, x = Case("conv2d", "standard", "layer").plain(torch.float64)
        if convert_first:
            interspace(model, basis=basis)  # type: ignore[arg-type]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        for _ in range(3):
            backward(model, x)
            optimizer.step()
        if not convert_first:
            join_optimizer(interspace(model, basis=basis), optimizer)  # type: ignore[arg-type]
        coefficients = model[0].parametrizations.weight.original
        found.append(optimizer.state[coefficients]["momentum_buffer"])
    torch.testing.assert_close(found[1], found[0])


def test_a_training_step_with_a_frozen_orthonormal_basis_is_that_of_the_plain_model() -> None:
    plain, x = Case("conv2d", "standard", "layer").plain(torch.float64)
    model = copy.deepcopy(plain)
    for each in (plain, model):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        for step in range(4):
            if step == 2 and each is model:
                join_optimizer(interspace(model, basis="orthonormal", train_basis=False), optimizer)
            backward(each, x)
            optimizer.step()
    torch.testing.assert_close(model[0].weight, plain[0].weight)
    torch.testing.assert_close(model(x), plain(x))


def test_other_optimizer_state_is_reset_with_a_warning() -> None:
    model, x = Case("conv2d", "standard", "layer").plain()
    optimizer = torch.optim.Adam(model.parameters())
    backward(model, x)
    optimizer.step()
    interspace(model, basis="dct")
    with pytest.warns(UserWarning, match="state of Adam cannot be carried .* was reset: layers '0', '2'"):
        join_optimizer(model, optimizer)
    assert not optimizer.state.get(model[0].parametrizations.weight.original)
    assert optimizer.state[model[4].weight]
    backward(model, x)
    optimizer.step()


def test_with_the_standard_basis_every_optimizer_keeps_its_state() -> None:
    model, x = Case("conv2d", "standard", "layer").plain()
    optimizer = torch.optim.Adam(model.parameters())
    backward(model, x)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        join_optimizer(interspace(model), optimizer)
    assert int(optimizer.state[model[0].parametrizations.weight.original]["step"]) == 1


def test_state_gathered_after_the_conversion_is_not_converted_again() -> None:
    model, x = Case("conv2d", "standard", "layer").plain()
    interspace(model, basis="dct")
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "basis" not in n], lr=0.1, momentum=0.9)
    backward(model, x)
    optimizer.step()
    momentum = optimizer.state[model[0].parametrizations.weight.original]["momentum_buffer"].clone()
    with pytest.warns(UserWarning, match="trained between interspace and join_optimizer.*: layers '0', '2'"):
        join_optimizer(model, optimizer)
    assert torch.equal(optimizer.state[model[0].parametrizations.weight.original]["momentum_buffer"], momentum)


def test_a_basis_joins_the_group_of_its_coefficients_with_its_settings() -> None:
    model, _ = Case("conv2d", "standard", "layer").plain()
    groups = [
        {"params": [model[0].weight], "lr": 0.1, "weight_decay": 0.5},
        {"params": [p for n, p in model.named_parameters() if n != "0.weight"]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.01)
    join_optimizer(interspace(model), optimizer)
    assert optimizer.param_groups[0]["params"][-1] is basis_of(model[0])
    assert optimizer.param_groups[1]["params"][-1] is basis_of(model[2])
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_sharers_in_different_groups_join_the_first_with_a_warning() -> None:
    model, _ = Case("conv2d", "standard", "layer").plain()
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.01)
    interspace(model, sharing="model")
    with pytest.warns(UserWarning, match="layers '0' and '2' share a basis and are in different parameter groups"):
        join_optimizer(model, optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1, 1, 1, 1, 1]


def test_an_optimizer_of_a_part_of_the_model_takes_that_parts_bases() -> None:
    model, _ = Case("conv2d", "standard", "layer").plain()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.01)
    join_optimizer(interspace(model), optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]][2:] == [id(basis_of(model[2]))]


def test_frozen_bases_do_not_join() -> None:
    model, _ = Case("conv2d", "standard", "layer").plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = len(optimizer.param_groups[0]["params"])
    join_optimizer(interspace(model, train_basis=False), optimizer)
    assert len(optimizer.param_groups[0]["params"]) == before


@pytest.mark.skipif(torch.__version__ < "2.6", reason="optimizers know names since torch 2.6")
def test_a_basis_joins_with_its_name() -> None:
    model, _ = Case("conv2d", "standard", "layer").plain()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.01)
    join_optimizer(interspace(model), optimizer)
    group = optimizer.param_groups[0]
    assert group["param_names"][-2:] == ["0.parametrizations.weight.0.basis", "2.parametrizations.weight.0.basis"]
    assert len(group["param_names"]) == len(group["params"])
    torch.optim.SGD(model.named_parameters(), lr=0.01).load_state_dict(optimizer.state_dict())


def test_schedulers_built_before_go_on() -> None:
    model, x = Case("conv2d", "standard", "layer").plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    join_optimizer(interspace(model), optimizer)
    backward(model, x)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


@every_case
def test_param_groups_hold_every_parameter_once(case: Case) -> None:
    model, _ = case.interspace()
    groups = param_groups(model, weight_decay=0.1, basis_lr=0.5)
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.ndim == 2 and len(p) == p.shape[1] for p in groups[1]["params"])
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


def test_param_groups_of_a_plain_model_and_without_a_rate_for_bases() -> None:
    plain, _ = Case("conv2d", "standard", "layer").plain()
    (group,) = param_groups(plain, weight_decay=0.1)
    assert len(group["params"]) == 6
    groups = param_groups(interspace(plain), weight_decay=0.1, basis_weight_decay=0.2)
    assert "lr" not in groups[1] and groups[1]["weight_decay"] == 0.2


def step(model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    backward(model, x)
    optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_bases_that_no_optimizer_trains_are_warned_of_once(kind: type[torch.optim.Optimizer]) -> None:
    model, x = Case("conv2d", "standard", "model").plain()
    optimizer = kind(model.parameters(), lr=0.01)  # type: ignore[call-arg]
    interspace(model)
    with pytest.warns(UserWarning, match=rf"{kind.__name__} trains the coefficients of .*join_optimizer") as caught:
        step(model, x, optimizer)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, x, optimizer)
        step(model, x, kind(model.parameters(), lr=0.01))  # type: ignore[call-arg]


@pytest.mark.parametrize("how", ["joined", "at once", "built after", "held", "frozen", "by another", "compiled"])
def test_bases_that_are_trained_or_held_on_purpose_are_not_warned_of(how: str) -> None:
    model, x = Case("conv2d", "standard", "layer").plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    interspace(model, train_basis=how != "held", optimizer=optimizer if how == "at once" else None)
    others = []
    if how in ("joined", "compiled"):
        join_optimizer(model, optimizer)
    elif how == "built after":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    elif how == "frozen":
        for layer in model:
            basis_of(layer).requires_grad_(False) if hasattr(layer, "kernel_size") else None
    elif how == "by another":
        others = [torch.optim.Adam([basis_of(layer) for layer in model if hasattr(layer, "kernel_size")])]
    stepped = torch.compile(optimizer.step, backend="eager") if how == "compiled" else optimizer.step
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        backward(model, x)
        stepped()
    assert all(optimizers.state == {} for optimizers in others)


def test_converting_with_the_optimizer_is_joining_at_once() -> None:
    model, _ = Case("conv2d", "standard", "layer").plain()
    converted = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01, weight_decay=0.1) for each in (model, converted)]
    interspace(model, basis="dct", optimizer=optimizers[0])
    join_optimizer(interspace(converted, basis="dct"), optimizers[1])
    shapes = [[p.shape for group in each.param_groups for p in group["params"]] for each in optimizers]
    assert shapes[0] == shapes[1]
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizers[0].param_groups[0]["params"]}


def test_converting_with_the_optimizer_of_another_model_changes_nothing() -> None:
    model, x = Case("conv2d", "standard", "layer").plain()
    before, out = list(model.state_dict()), model(x)
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.01)
    with pytest.raises(OptimizerError):
        interspace(model, optimizer=optimizer)
    assert list(model.state_dict()) == before and torch.equal(model(x), out)
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_a_conversion_is_forgotten_with_the_next_one_and_with_its_parameter() -> None:
    model, x = Case("conv2d", "standard", "layer").plain()
    optimizer = torch.optim.Adam(model.parameters())
    backward(model, x)
    optimizer.step()
    interspace(bake(interspace(model, basis="dct")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        join_optimizer(model, optimizer)
    coefficients = weakref.ref(interspace(nn.Conv2d(3, 4, 3), basis="dct").parametrizations.weight.original)
    gc.collect()
    assert coefficients() is None
