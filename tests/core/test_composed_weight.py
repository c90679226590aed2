"""Writes into a composed weight have the same effect as on the weight of a plain layer."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kinds import Case, every_kind
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ip_plugin import bake, interspace, masks, set_masks
from ip_plugin.core.composed_weight import ComposedWeight

pytestmark = pytest.mark.contract

Write = Callable[[Tensor], object]


def soft(weight: Tensor) -> None:
    weight.data[[1, 2]] *= 0


def without_graph(write: Write) -> Write:
    def inner(weight: Tensor) -> None:
        with torch.no_grad():
            write(weight)

    return inner


WRITES: dict[str, Write] = {
    **{
        name: getattr(nn.init, name)
        for name in ("zeros_", "ones_", "normal_", "uniform_", "trunc_normal_", "xavier_normal_", "xavier_uniform_",
                     "kaiming_normal_", "kaiming_uniform_", "orthogonal_", "dirac_")
    },
    "constant_": lambda weight: nn.init.constant_(weight, 0.5),
    "data in place": lambda weight: weight.data.mul_(2),
    "data at indices": soft,
    "data of a view": lambda weight: weight.data.transpose(0, 1)[0].add_(1),
    "data set": lambda weight: setattr(weight, "data", torch.linspace(0, 1, weight.numel()).reshape(weight.shape)),
    "detached": lambda weight: weight.detach()[0].fill_(3),
    "copy_": without_graph(lambda weight: weight.copy_(torch.linspace(0, 1, weight.numel()).reshape(weight.shape))),
    "item": without_graph(lambda weight: weight.__setitem__(0, 1.0)),
    "subtraction": without_graph(lambda weight: weight.__isub__(0.1)),
    "foreach": lambda weight: torch._foreach_mul_([weight.data], 0.5),
    "out": lambda weight: torch.mul(weight.detach(), 2, out=weight.data),
    "relu": lambda weight: nn.functional.relu(weight.data, inplace=True),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("basis", ["standard", "dct"])
def test_a_write_does_what_it_does_to_a_plain_layer(name: str, basis: str) -> None:
    plain = nn.Conv2d(3, 8, 3)
    layer = interspace(copy.deepcopy(plain), basis=basis)  # type: ignore[arg-type]
    coefficients = layer.parametrizations.weight.original
    for each in (plain, layer):
        torch.manual_seed(1)
        WRITES[name](each.weight)
    torch.testing.assert_close(layer.weight, plain.weight)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-5, rtol=1e-5)
    assert layer.parametrizations.weight.original is coefficients and coefficients.requires_grad


@every_kind
def test_layers_are_reset_as_plain_ones_are(kind: str) -> None:
    case = Case(kind, "dct", "model")
    plain, x = case.plain()
    model = case.convert(copy.deepcopy(plain))
    for each in (plain, model):
        torch.manual_seed(1)
        for module in each.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    torch.testing.assert_close(model(x), plain(x), atol=1e-4, rtol=1e-4)


def test_kernels_that_are_not_written_keep_their_coefficients_bit_for_bit() -> None:
    layer = interspace(nn.Conv2d(3, 8, 3), basis="orthonormal")
    before = layer.parametrizations.weight.original.detach().clone()
    with torch.no_grad():
        layer.weight[2, 1, 0, 0] = 5.0
    moved = (layer.parametrizations.weight.original != before).flatten(2).any(2)
    assert moved.nonzero().tolist() == [[2, 1]]


def test_pruned_coefficients_stay_pruned_and_a_spatial_layer_is_written_too() -> None:
    for layer in (interspace(nn.Conv2d(3, 8, 3), basis="dct"), nn.Linear(4, 4)):
        kept = torch.rand(layer.weight.shape) < 0.5
        set_masks(layer, {"": kept})
        nn.init.ones_(layer.weight)
        assert torch.equal(masks(layer)[""], kept)
        if isinstance(layer, nn.Linear):
            assert torch.equal(layer.weight, kept.float())


def test_a_weight_that_was_fetched_before_a_step_does_not_bring_old_kernels_back() -> None:
    layer = interspace(nn.Conv2d(3, 8, 3))
    weight = layer.weight
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(1)
        expected = layer.weight.clone()
        weight[0] = 0.0
        expected[0] = 0.0
    torch.testing.assert_close(layer.weight, expected)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_parameter_can_be_assigned(wrapped: bool) -> None:
    layer = interspace(nn.Conv2d(3, 8, 3), basis="dct")
    coefficients = layer.parametrizations.weight.original
    value = torch.randn(8, 3, 3, 3)
    layer.weight = nn.Parameter(value) if wrapped else value
    layer.bias = nn.Parameter(torch.zeros(8))
    torch.testing.assert_close(layer.weight, value)
    assert layer.parametrizations.weight.original is coefficients
    assert not layer.bias.any() and isinstance(layer.bias, nn.Parameter)


MERGES: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "in place": lambda layer, delta: layer.weight.data.add_(delta),
    "data set": lambda layer, delta: setattr(layer.weight, "data", layer.weight.data + delta),
    "assigned": lambda layer, delta: setattr(layer, "weight", nn.Parameter(layer.weight + delta)),
}


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("basis", [None, "standard", "dct"])
def test_an_adapter_is_merged_and_a_pruned_layer_that_cannot_take_it_warns(merge: str, basis: Any) -> None:
    layer, delta = nn.Conv2d(3, 8, 3), torch.randn(8, 3, 3, 3)
    if basis is not None:
        interspace(layer, basis=basis)
    expected = layer.weight.detach() + delta
    MERGES[merge](layer, delta)
    torch.testing.assert_close(layer.weight.detach(), expected)
    set_masks(layer, {"": torch.rand(8, 3, 3, 3) < 0.5})
    MERGES[merge](layer, layer.weight.detach())  # what the coefficients that are left can give
    with pytest.warns(UserWarning, match="its pruned entries stay zero") as caught:
        MERGES[merge](layer, delta)
    assert len(caught) == 1 and caught[0].filename == __file__
    layer = bake(layer)
    expected = layer.weight.detach() + delta
    MERGES[merge](layer, delta)
    torch.testing.assert_close(layer.weight.detach(), expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("basis", [None, "standard", "dct"])
def test_batch_norm_is_fused(basis: Any, masked: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    if basis is not None:
        interspace(model, basis=basis)
    if masked:
        set_masks(model, {"0": torch.rand(8, 3, 3, 3) < 0.5})
    model(torch.randn(9, 3, 5, 5) * 3 + 1)
    nn.init.uniform_(model.eval()[1].weight)
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    fused = fuse_conv_bn_eval(model[0], model[1])
    torch.testing.assert_close(fused(x), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(x), expected) and masks(fused).keys() == ({""} if masked else set())


@pytest.mark.parametrize("read", [lambda w: w, lambda w: w.data, lambda w: w.detach()])
def test_what_another_layer_is_given_is_its_own(read: Callable[[Tensor], Tensor]) -> None:
    layer, others = interspace(nn.Conv2d(3, 8, 3), basis="dct"), [nn.Conv2d(3, 8, 3) for _ in range(3)]
    value, before = layer.weight.detach().clone(), layer.parametrizations.weight.original.detach().clone()
    others[0].weight = nn.Parameter(read(layer.weight))
    others[1].weight.data = read(layer.weight).detach()
    with torch.no_grad():
        others[2].weight.copy_(read(layer.weight))
    for other in others:
        assert type(other.weight) is nn.Parameter and torch.equal(other.weight, value)
        assert type(copy.deepcopy(other).weight) is nn.Parameter
        with torch.no_grad():
            other.weight.mul_(2)
    assert torch.equal(layer.parametrizations.weight.original, before)


def test_a_copy_is_written_alone() -> None:
    layer = interspace(nn.Conv2d(3, 8, 3), basis="dct")
    other = copy.deepcopy(layer)
    before = layer.weight.detach().clone()
    other.reset_parameters()
    nn.init.zeros_(other.weight)
    assert not other.weight.any() and torch.equal(layer.weight, before)


def test_what_is_computed_copied_or_saved_is_an_ordinary_tensor() -> None:
    layer = interspace(nn.Conv2d(3, 8, 3), basis="dct")
    saved = io.BytesIO()
    torch.save(layer.weight.detach(), saved)
    saved.seek(0)
    for found in (
        layer.weight * 2, layer.weight.clone(), layer.weight.sum(), copy.deepcopy(layer.weight.detach()),
        torch.load(saved),
    ):  # fmt: skip
        assert type(found) is Tensor
    assert "ComposedWeight" not in repr(layer.weight)
    assert type(layer.weight.shape) is torch.Size and layer.weight.detach().requires_grad_().is_leaf
    first, *_ = layer.weight.unbind()
    assert type(first) is ComposedWeight
    (gradient,) = torch.autograd.grad(layer.weight.square().sum(), layer.parametrizations.weight.original)
    torch.testing.assert_close(gradient, 2 * layer.parametrizations.weight.original, atol=1e-6, rtol=1e-5)


def test_a_forward_pass_computes_with_ordinary_tensors() -> None:
    """The class costs time and is visible to compilers, so a forward pass reads ordinary tensors."""
    seen: list[type] = []

    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(type(self.weight))
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    layer = interspace(Standardised(3, 8, 3))
    layer(torch.randn(1, 3, 5, 5))
    assert seen == [Tensor] and type(layer.weight) is ComposedWeight


def test_counting_zeros_of_a_pruned_kernel_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ip_plugin.core.composed_weight._warned_of_zeros", False)
    model = interspace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(2, 2)), basis="dct")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert int((model[0].weight == 0).sum()) == 0
        set_masks(model, {"0": torch.rand(4, 3, 3, 3) < 0.5, "1": torch.eye(2)})
        assert int((model[1].weight == 0).sum()) == 2  # its zeros are in the weight
        assert bool((model[0].weight == model[0].weight.clone()).all())
    with pytest.warns(UserWarning, match="zeros are counted") as caught:
        assert int((model[0].weight == 0).sum()) < 54
        torch.count_nonzero(model[0].weight)
    assert len(caught) == 1
    assert caught[0].filename == __file__
