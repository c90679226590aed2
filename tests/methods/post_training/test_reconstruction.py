"""Reconstruction: the least squares that it claims, on layers whose answer is known; nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kinds import CASES, KINDS
from torch import Tensor, nn
from torch.nn.utils import prune as host

from ip_plugin import interspace, masks, set_masks
from ip_plugin.core.tensor_ref import prunable_tensors
from ip_plugin.errors import (
    InvalidBatchError,
    InvalidRidgeError,
    NoBatchesError,
    NothingToPruneError,
    TwinMismatchError,
)
from ip_plugin.methods import magnitude, prune, reconstruct, reestimate_batch_norm
from ip_plugin.methods.post_training import reconstruction
from ip_plugin.methods.post_training.reconstruction import least_squares

F64 = torch.float64


def linear(weights: list[list[float]], mask: list[list[int]]) -> tuple[nn.Linear, nn.Linear]:
    """A masked layer without a bias, and its dense twin."""
    dense = nn.Linear(len(weights[0]), len(weights), bias=False)
    dense.weight.data = torch.tensor(weights)
    return set_masks(copy.deepcopy(dense), {"": torch.tensor(mask)}), dense


def test_what_is_pruned_goes_into_an_input_that_is_proportional_to_it() -> None:
    model, dense = linear([[1.0, 1.0]], [[1, 0]])
    batches = [(torch.tensor([[1.0, 2.0], [-3.0, -6.0]]), None)]  # the second input is twice the first
    reconstruct(model, dense, batches, ridge=0)
    torch.testing.assert_close(model.weight, torch.tensor([[3.0, 0.0]]))
    model, dense = linear([[1.0, 1.0]], [[1, 0]])
    reconstruct(model, dense, batches)  # minimises (3 - c)^2 + 0.01 * (c - 1)^2
    torch.testing.assert_close(model.weight, torch.tensor([[3.01 / 1.01, 0.0]]))
    assert torch.equal(model.parametrizations.weight.original[:, 1], torch.ones(1))  # type: ignore[union-attr,index]


def test_independent_inputs_change_nothing_and_the_mean_goes_into_the_bias() -> None:
    dense = nn.Linear(2, 1)
    dense.weight.data, dense.bias.data = torch.tensor([[2.0, 3.0]]), torch.tensor([0.5])
    model = set_masks(copy.deepcopy(dense), {"": torch.tensor([[1, 0]])})
    x = torch.tensor([[0.0, 4.0], [0.0, 6.0], [2.0, 4.0], [2.0, 6.0]])
    reconstruct(model, dense, [(x, None)])
    torch.testing.assert_close(model.weight, torch.tensor([[2.0, 0.0]]))
    torch.testing.assert_close(model.bias, torch.tensor([0.5 + 3.0 * 5.0]))


def test_inputs_that_are_never_there_keep_their_entries() -> None:
    model, dense = linear([[1.0, 5.0, 1.0]], [[1, 1, 0]])
    reconstruct(model, dense, [(torch.tensor([[1.0, 0.0, 2.0]]), None)], ridge=0)
    torch.testing.assert_close(model.weight, torch.tensor([[3.0, 5.0, 0.0]]))


@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("groups", [1, 2])
def test_conjugate_gradients_find_what_a_direct_solver_finds(groups: int, ridge: float) -> None:
    torch.manual_seed(0)
    inputs, outputs, n = 4, 5, 3
    x = torch.randn(groups, 60, inputs * n, dtype=F64) @ torch.randn(groups, inputs * n, inputs * n, dtype=F64)
    second = x.mT @ x
    goal = torch.randn(groups, outputs, inputs, n, dtype=F64)
    basis = torch.eye(n, dtype=F64) + 0.3 * torch.randn(n, n, dtype=F64)
    start, mask = torch.randn_like(goal), torch.rand_like(goal) < 0.5
    found = least_squares(second, goal, start, mask, basis, ridge)
    whole = torch.kron(torch.eye(inputs, dtype=F64), basis)  # all coefficients of an output -> its kernels
    for g in range(groups):
        form = whole @ second[g] @ whole.mT
        for o in range(outputs):
            kept = mask[g, o].flatten()
            part = form[kept][:, kept]
            penalty = ridge * part.diagonal().diag()
            right = (whole @ second[g] @ goal[g, o].flatten())[kept] + penalty @ start[g, o].flatten()[kept]
            expected = torch.linalg.solve(part + penalty, right)
            torch.testing.assert_close(found[g, o].flatten()[kept], expected, rtol=2e-3, atol=2e-3)
            assert not found[g, o].flatten()[~kept].any()


def test_the_gauge_does_not_matter() -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(3, 4, 3, dtype=F64)
    x = torch.randn(5, 3, 6, 6, dtype=F64)
    mask = torch.rand(4, 3, 3, 3) < 0.4
    found = []
    for scale in (1.0, 100.0):
        basis = torch.linalg.qr(torch.arange(81.0, dtype=F64).reshape(9, 9).sin()).Q
        basis[::2] *= scale
        model = set_masks(interspace(copy.deepcopy(dense), basis=basis), {"": mask})
        found.append(reconstruct(model, dense, [(x, None)]).weight.detach())
    torch.testing.assert_close(found[0], found[1])


def errors_of_layers(model: nn.Module, dense: nn.Module, x: Tensor) -> dict[str, float]:
    """Each layer's error for the dense network's inputs."""
    found: dict[str, float] = {}
    mine = {each.module_name: each.module for each in prunable_tensors(model)}

    def hook(name: str) -> Any:
        return lambda module, args, y: found.update({name: float((mine[name](*args) - y).detach().square().sum())})

    handles = [each.module.register_forward_hook(hook(each.module_name)) for each in prunable_tensors(dense)]
    dense(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("case", [case for case in CASES if case.sharing != "callable"], ids=str)
def test_no_layer_gets_worse_in_the_interspace(case: Any) -> None:
    dense, x = case.plain(F64)
    check_every_layer(case.convert(copy.deepcopy(dense)), dense, x, changed=case.kind != "subclass")


@pytest.mark.parametrize("kind", KINDS)
def test_no_layer_gets_worse_in_the_spatial_network(kind: str) -> None:
    dense, x = KINDS[kind].ready(F64)
    check_every_layer(copy.deepcopy(dense), dense, x, changed=kind != "subclass")


def check_every_layer(model: nn.Module, dense: nn.Module, x: Tensor, changed: bool) -> None:
    prune(model, magnitude, sparsity=0.5, scope="layer")
    held = {each.module_name: each.parameter.detach().clone() for each in prunable_tensors(model)}
    kept = masks(model)
    before = errors_of_layers(model, dense, x)
    assert reconstruct(model, dense, [(x, None)]) is model
    after = errors_of_layers(model, dense, x)
    for each in prunable_tensors(model):
        assert after[each.module_name] <= before[each.module_name] * (1 + 1e-9)
        assert torch.equal(each.parameter[~kept[each.module_name]], held[each.module_name][~kept[each.module_name]])
        if changed:
            assert after[each.module_name] < 0.999 * before[each.module_name]
        else:
            assert torch.equal(each.parameter, held[each.module_name]) or each.module_name == "4"


def test_a_support_that_can_give_the_dense_outputs_gives_them() -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(2, 4, 3, padding=1)
    model = interspace(copy.deepcopy(dense), basis="dct")
    mask = torch.rand(4, 2, 3, 3) < 0.6
    set_masks(model, {"": mask})
    dense.weight.data = model.weight.detach().clone()  # what the support gives
    with torch.no_grad():
        model.parametrizations.weight.original.mul_(torch.rand(4, 2, 3, 3) + 0.5)  # type: ignore[union-attr,operator]
    x = torch.randn(8, 2, 9, 9)
    assert (model(x) - dense(x)).abs().max() > 0.1
    torch.testing.assert_close(reconstruct(model, dense, [(x, None)], ridge=0)(x), dense(x), atol=2e-3, rtol=1e-3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.ReLU(),
        nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 3),
    )  # fmt: skip


X = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [(part, None) for part in X.split(16)]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in now)


def test_the_mean_goes_into_the_batch_norm_behind_a_layer_without_a_bias() -> None:
    dense = network()
    model = prune(copy.deepcopy(dense), magnitude, sparsity=0.6, scope="layer")
    model[1].running_mean.fill_(7.0)  # the dense network's counts
    reconstruct(model, dense, BATCHES)
    dense.eval(), model.eval()
    torch.testing.assert_close(model[:2](X).mean((0, 2, 3)), dense[:2](X).mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert torch.equal(model[1].running_var, torch.ones(8))
    torch.testing.assert_close(model[9].running_mean, torch.zeros(5))  # its layer has a bias


def test_nothing_else_changes() -> None:
    dense = network()
    model = prune(copy.deepcopy(dense), magnitude, sparsity=0.6, scope="layer")
    model[5].eval()
    model[0].parametrizations.weight.original.grad = torch.ones(8, 3, 3, 3)
    modes = [module.training for module in model.modules()]
    parameters = {name: id(p) for name, p in model.named_parameters()}
    kept, twin, state = masks(model), snapshot(dense), torch.get_rng_state()
    reconstruct(model, dense, BATCHES)
    assert [module.training for module in model.modules()] == modes
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert torch.equal(model[0].parametrizations.weight.original.grad, torch.ones(8, 3, 3, 3))
    assert all(torch.equal(mask, kept[name]) for name, mask in masks(model).items())
    assert same(dense, twin) and torch.equal(torch.get_rng_state(), state)
    assert not any(p.grad is not None for p in dense.parameters())


@pytest.mark.parametrize(("room", "expected"), [(1, [1, 1, 1, 1]), (27**2 + 72**2, [2, 2]), (5300, [1, 3])])
def test_layers_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch, room: int, expected: list[int]) -> None:
    dense = network()
    model = prune(copy.deepcopy(dense), magnitude, sparsity=0.6, scope="layer")
    twin = copy.deepcopy(model)
    reconstruct(model, dense, BATCHES)
    monkeypatch.setattr(reconstruction, "_AT_ONCE", room)
    parts: list[int] = []
    observe = reconstruction.observe
    monkeypatch.setattr(reconstruction, "observe", lambda m, w, i: (parts.append(len(w)), observe(m, w, i))[1])
    reconstruct(twin, dense, BATCHES)
    assert parts == expected
    assert same(twin, snapshot(model))


def test_masks_of_the_host_and_half_precision() -> None:
    dense = network().bfloat16()
    model = copy.deepcopy(dense)
    host.l1_unstructured(model[3], "weight", amount=0.6)
    before = errors_of_layers(model, dense.eval(), X.bfloat16())["3"]
    reconstruct(model, dense, [(X.bfloat16(), None)])
    model(X.bfloat16())
    assert errors_of_layers(model, dense, X.bfloat16())["3"] < 0.9 * before
    assert model[3].weight_orig.dtype == torch.bfloat16
    assert torch.equal(model[0].weight, dense[0].weight)


def test_layers_without_a_mask_and_without_inputs_stay() -> None:
    dense = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    dense.forward = lambda x: dense["b"](dense["a"](x))  # type: ignore[method-assign]
    model = copy.deepcopy(dense)
    model.forward = lambda x: model["b"](model["a"](x))  # type: ignore[method-assign]
    set_masks(model, {"b": torch.eye(3), "c": torch.eye(3)})
    before = snapshot(model)
    reconstruct(model, dense, [(torch.randn(20, 3), None)])
    changed = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])]
    assert changed == ["b.bias", "b.parametrizations.weight.original"]


def bad(name: str) -> tuple[Any, Any, dict[str, Any]]:
    dense = network()
    wider = nn.Sequential(*network()[:-1], nn.Linear(5, 4))
    return {
        "no batches": (dense, iter([]), {}),
        "no pair": (dense, [X], {}),
        "a later batch": (dense, [*BATCHES, (torch.zeros(2, 5, 8, 8), None)], {}),
        "shape": (wider, BATCHES, {}),
        "layer": (dense[:-1], BATCHES, {}),
        "ridge": (dense, BATCHES, {"ridge": -0.1}),
        "ridge NaN": (dense, BATCHES, {"ridge": float("nan")}),
        "nothing": (nn.ReLU(), BATCHES, {}),
    }[name]


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("no batches", NoBatchesError, "empty"),
        ("no pair", InvalidBatchError, "Tensor"),
        ("a later batch", RuntimeError, "channels"),
        ("shape", TwinMismatchError, r"layer '10' of shape \(3, 5\), and one of shape \(4, 5\)"),
        ("layer", TwinMismatchError, "layer '10' .* no such layer"),
        ("ridge", InvalidRidgeError, "-0.1"),
        ("ridge NaN", InvalidRidgeError, "nan"),
        ("nothing", NothingToPruneError, "pair"),
    ],
)
def test_a_call_that_fails_changes_nothing(name: str, kind: type[Exception], text: str) -> None:
    dense, batches, options = bad(name)
    model = prune(network(), magnitude, sparsity=0.5)
    before = snapshot(model)
    with pytest.raises(kind, match=text):
        reconstruct(model, dense, batches, **options)
    assert same(model, before)


def test_statistics_are_those_of_the_batches() -> None:
    model, twin = network(), network()
    model[5].eval(), twin[5].eval()
    model[1].running_mean.fill_(7.0), model[1].num_batches_tracked.fill_(7)
    twin[5].p = 0.0
    x = X * 3 + 1
    torch.optim.swa_utils.update_bn([x[:16], x[16:]], twin)
    parameters = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    assert reestimate_batch_norm(model, [(x[:16], None), ((x[16:],), None)]) is model
    assert same(model, snapshot(twin)) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), parameters, strict=True))
    assert [m.training for m in model] == [True] * 5 + [False] + [True] * 5
    assert model[1].momentum == 0.1 and int(model[1].num_batches_tracked) == 2


@pytest.mark.parametrize("batches", [[], [X], [*BATCHES, (X[:, :2], None)], [*BATCHES, (X[:1], None)]])
def test_statistics_stay_where_estimating_fails(batches: list[Any]) -> None:
    model = network()
    before = snapshot(model)
    with pytest.raises((NoBatchesError, InvalidBatchError, RuntimeError, ValueError)):
        reestimate_batch_norm(model, batches)
    assert same(model, before) and model[1].momentum == 0.1


def test_a_batch_norm_without_statistics_stays_without() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    before = snapshot(model)
    assert same(reestimate_batch_norm(model, [(torch.randn(4, 3), None)]), before)
    dense = copy.deepcopy(model)
    reconstruct(set_masks(model, {"0": torch.eye(3)}), dense, [(torch.randn(9, 3), None)])
