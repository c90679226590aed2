"""Torch-Pruning in both spaces, against the host on the plain twin."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from ip_plugin import bake, interspace, join_optimizer, masks, normalize, report, set_masks
from ip_plugin.core.tensor_ref import TensorRef, prunable_tensors
from ip_plugin.errors import (
    AlreadyParametrizedError,
    CompiledModelError,
    ExampleInputError,
    ForeignModuleError,
    InvalidPrunerError,
    InvalidRatioError,
    OptimizerMismatchError,
    UnfollowedCutError,
)

tp = pytest.importorskip("torch_pruning")
torchvision = pytest.importorskip("torchvision")

from torch_pruning_twins import IMPORTANCES, Marked, Net, Residual, X, magnitude, same, scored, twins  # noqa: E402

from ip_plugin.adapters.torch_pruning import count_ops_and_params, plain_layers, pruner  # noqa: E402

pytestmark = [
    pytest.mark.contract,
    pytest.mark.filterwarnings("ignore:Unwrapped parameters detected", "ignore:.*is deprecated"),
]


# Pruners and options ----------------------------------------------------------------------------------------------

OPTIONS: dict[str, Callable[[Net], dict[str, Any]]] = {
    "global": lambda net: {"global_pruning": True, "max_pruning_ratio": 0.7},
    "isomorphic": lambda net: {"global_pruning": True, "isomorphic": True},
    "ratio_dict": lambda net: {"pruning_ratio_dict": {net.branch: 0.7, (net.left, net.grouped): 0.25}},
    "round_to": lambda net: {"round_to": 4},
    "ignored_layers": lambda net: {"ignored_layers": [net.head, net.stem]},
    "channel_groups": lambda net: {"out_channel_groups": {net.narrow: 2}, "in_channel_groups": {net.head: 2}},
    "deprecated_groups": lambda net: {"channel_groups": {net.narrow: 2}},
    "deprecated_ratio": lambda net: {"ch_sparsity": 0.25, "ch_sparsity_dict": {net.branch: 0.5}},
    "iterative": lambda net: {"iterative_steps": 3, "global_pruning": True},
    "schedule": lambda net: {
        "iterative_steps": 2,
        "iterative_pruning_ratio_scheduler": lambda ratio, steps: [0] + [ratio * (i + 1) / steps for i in range(steps)],
    },
    "roots": lambda net: {"root_module_types": [nn.modules.conv._ConvNd]},
    "max_ratio": lambda net: {"iterative_steps": 2, "max_pruning_ratio": 0.3},
    "forward_fn": lambda net: {"forward_fn": lambda model, x: model(x * 2), "output_transform": lambda out: out.sum()},
}
PRUNERS = {
    "base": (tp.pruner.BasePruner, {}),
    "group_norm": (tp.pruner.GroupNormPruner, {"reg": 0.1}),
    "bn_scale": (tp.pruner.BNScalePruner, {"reg": 0.1}),
    "bn_scale_lasso": (tp.pruner.BNScalePruner, {"reg": 0.1, "group_lasso": True}),
    "growing": (tp.pruner.GrowingRegPruner, {"reg": 0.1, "delta_reg": 0.1}),
    "meta": (tp.pruner.MetaPruner, {}),
    "magnitude": (tp.pruner.MagnitudePruner, {}),
}


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("option", OPTIONS)
def test_options_mean_in_the_interspace_what_they_mean_to_the_host(name: str, option: str) -> None:
    cls, given = PRUNERS[name]
    model, plain, x = twins("orthonormal")
    cutters = []
    for each, make in ((plain, lambda cls, *a, **k: cls(*a, **k)), (model, pruner)):
        arguments = {"importance": magnitude(), "pruning_ratio": 0.4, "ignored_layers": [each.head], **given}
        # Fresh dicts for the plain one: the host's defaults are shared between pruners.
        fresh = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}, "channel_groups": {}}
        arguments |= (fresh if each is plain else {}) | OPTIONS[option](each)
        cutter = make(cls, each, x, **arguments)
        assert isinstance(cutter, cls)
        for _ in range(arguments.get("iterative_steps", 1)):
            cutter.step()
        cutters.append(cutter)
    assert cutters[0].pruning_history() == cutters[1].pruning_history()
    assert cutters[0].pruning_history()
    same(model, plain, x)


@pytest.mark.parametrize("name", PRUNERS)
def test_regularizers_add_the_same_gradients(name: str) -> None:
    cls, given = PRUNERS[name]
    model, plain, x = twins(cls=Residual)
    for each, make in ((plain, lambda cls, *a, **k: cls(*a, **k)), (model, pruner)):
        cutter = make(cls, each, x, importance=magnitude(normalizer=None), ignored_layers=[each.head], **given)
        each.train().zero_grad()  # the host has left the plain one in evaluation mode
        F.cross_entropy(each(x), torch.tensor([0, 1])).backward()
        before = [p.grad.clone() for p in each.parameters()]
        cutter.regularize(each, **({"loss": None} if cls is tp.pruner.BasePruner else {}))
        changed = [not torch.equal(a, p.grad) for a, p in zip(before, each.parameters(), strict=True)]
        assert any(changed) == (name not in ("base", "meta", "magnitude"))
        cutter.update_regularizer()
    for layer, other in zip(prunable_tensors(model), prunable_tensors(plain), strict=True):
        torch.testing.assert_close(layer.parameter.grad, other.parameter.grad)
    for first, second in ((model.norm, plain.norm), (model.stem[1], plain.stem[1])):
        torch.testing.assert_close(first.weight.grad, second.weight.grad)


def test_customized_pruners_see_plain_layers() -> None:
    seen = []

    class Watching(type(tp.pruner.function.PrunerBox[tp.ops.OPTYPE.CONV])):  # type: ignore[misc]
        def prune_out_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
            seen.append((type(layer), tuple(idxs)))
            return super().prune_out_channels(layer, idxs)

    model, plain, x = twins(cls=Residual)
    for each, make in ((plain, lambda cls, *a, **k: cls(*a, **k)), (model, pruner)):
        cutter = make(
            tp.pruner.BasePruner, each, x, importance=magnitude(), ignored_layers=[each.head],
            customized_pruners={Marked: Watching()}, out_channel_groups={},
        )  # fmt: skip
        cutter.step()
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert seen[0][0] is Marked
    same(model, plain, x)


@pytest.mark.parametrize("basis", ["standard", "orthonormal"])
def test_transposed_and_one_dimensional_convolutions(basis: str) -> None:
    for shape, layers_of in (
        ((1, 3, 6, 6), lambda: [nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 3, stride=2), nn.Conv2d(6, 2, (1, 3))]),
        ((1, 3, 9), lambda: [nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ConvTranspose1d(8, 6, 2), nn.Conv1d(6, 2, 3)]),
        ((1, 3, 7, 7, 7), lambda: [nn.Conv3d(3, 8, 3), nn.ConvTranspose3d(8, 6, 2), nn.Conv3d(6, 2, (3, 1, 1))]),
    ):
        torch.manual_seed(0)
        plain = nn.Sequential(*layers_of()).double()
        model = interspace(copy.deepcopy(plain), basis=basis)
        x = torch.randn(shape, dtype=torch.float64)
        histories = []
        for each in (plain, model):
            cutter = pruner(tp.pruner.BasePruner, each, x, importance=magnitude(), ignored_layers=[each[-1]],
                            root_module_types=[nn.modules.conv._ConvNd])  # fmt: skip
            cutter.step()
            histories.append(cutter.pruning_history())
        assert histories[0] == histories[1]
        assert model[0].out_channels == 4
        same(model, plain, x)


class Scaled(nn.Module):
    """A bare Parameter that belongs to no layer of the host's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)
        self.head = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x) * self.scale)


@pytest.mark.parametrize("kind", ["list", "dict", "detected"])
def test_bare_parameters_are_cut_and_stay_in_the_optimizer(kind: str) -> None:
    plain = Scaled()
    model = interspace(copy.deepcopy(plain))
    x = torch.randn(1, 3, 9, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for ours, theirs in zip(bake(copy.deepcopy(model)).parameters(), plain.parameters(), strict=True):
            theirs.copy_(ours)
    for each, options in ((model, {"optimizer": optimizer}), (plain, {})):
        given = {"list": [(each.scale, 1)], "dict": {each.scale: 1}, "detected": None}[kind]
        pruner(
            tp.pruner.BasePruner, each, x, importance=magnitude(), pruning_ratio=0.25, ignored_layers=[each.head],
            unwrapped_parameters=given, **options,
        ).step()  # fmt: skip
    assert model.scale.shape == (1, 6, 1, 1)
    assert any(model.scale is p for p in optimizer.param_groups[0]["params"])
    assert optimizer.state[model.scale]["momentum_buffer"].shape == (1, 6, 1, 1)
    same(model, plain, x)


def test_the_hosts_defaults_are_not_shared_between_pruners() -> None:
    model, _, x = twins()
    first = pruner(tp.pruner.GroupNormPruner, model, x, importance=magnitude())
    second = pruner(tp.pruner.GroupNormPruner, twins()[0], x, importance=magnitude())
    for name in ("in_channel_groups", "out_channel_groups", "num_heads"):
        assert getattr(first, name) is not getattr(second, name)
    assert set(first.out_channel_groups) == {model.grouped}


def test_types_can_be_ignored() -> None:
    model, _, x = twins()
    pruner(tp.pruner.BasePruner, model, x, importance=magnitude(), ignored_layers=[nn.Linear, nn.BatchNorm2d]).step()
    found = [m.out_channels for m in (model.stem[0], model.branch, model.grouped, model.wide, model.narrow)]
    assert (*found, model.head.out_features) == (8, 6, 6, 5, 4, 4)


# Groups, by hand --------------------------------------------------------------------------------------------------


def test_interactive_steps_and_groups_by_hand() -> None:
    model, plain, x = twins("orthonormal")
    ours = pruner(tp.pruner.BasePruner, model, x, importance=magnitude(), ignored_layers=[model.head])
    theirs = tp.pruner.BasePruner(plain, x, importance=magnitude(), ignored_layers=[plain.head], out_channel_groups={})
    for cutter in (ours, theirs):
        for number, group in enumerate(cutter.step(interactive=True)):
            assert isinstance(group, tp.dependency.Group)
            if number != 1:
                group.prune()
    assert len(ours.pruning_history()) > 2
    assert ours.pruning_history() == theirs.pruning_history()
    same(model, plain, x)
    for each, cutter in ((model, ours), (plain, theirs)):
        cutter.DG.get_pruning_group(each.wide, tp.prune_conv_out_channels, idxs=[0]).prune()
        cutter.manual_prune_width(each.narrow, tp.prune_conv_out_channels, [1])
        cutter.manual_prune_width(each.narrow, tp.prune_conv_out_channels, 0.7)
    assert ours.pruning_history() == theirs.pruning_history()
    same(model, plain, x)


def test_a_partial_of_a_pruner_is_that_pruner_with_these_arguments() -> None:
    model, plain, x = twins()
    entry = partial(tp.pruner.BasePruner, pruning_ratio=0.1, importance=magnitude())
    pruner(entry, model, x, pruning_ratio=0.5, ignored_layers=[model.head]).step()
    entry(plain, x, pruning_ratio=0.5, ignored_layers=[plain.head], out_channel_groups={}).step()
    same(model, plain, x)


def test_interactive_steps_rank_by_coefficients() -> None:
    model, _, x = twins("dct")
    histories = []
    for interactive in (True, False):
        each = copy.deepcopy(model)
        importance = tp.importance.GroupMagnitudeImportance(p=1)  # which is another one for weights
        cutter = pruner(tp.pruner.BasePruner, each, x, importance=importance, ignored_layers=[each.head])
        for group in cutter.step(interactive=True) if interactive else [cutter]:
            group.prune() if interactive else group.step()
        histories.append(cutter.pruning_history())
    assert histories[0] == histories[1]
    weights = bake(model)
    cutter = pruner(tp.pruner.BasePruner, weights, x, importance=importance, ignored_layers=[weights.head])
    cutter.step()
    assert cutter.pruning_history() != histories[0]


def prune_softly(cutter: Any) -> None:
    """As the host's README has it: channels are zeroed, and may come back."""
    for group in cutter.step(interactive=True):
        for dep, idxs in group:
            layer = dep.target.module
            if dep.handler in (tp.prune_conv_in_channels, tp.prune_linear_in_channels):
                layer.weight.data[:, idxs] *= 0
            elif dep.handler in (tp.prune_conv_out_channels, tp.prune_linear_out_channels):
                layer.weight.data[idxs] *= 0
                if layer.bias is not None:
                    layer.bias.data[idxs] *= 0
            elif dep.handler == tp.prune_batchnorm_out_channels:
                layer.weight.data[idxs] *= 0
                layer.bias.data[idxs] *= 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("basis", ["standard", "dct"])
def test_soft_pruning_reaches_coefficients(basis: str, masked: bool) -> None:
    model, plain, x = twins(basis, Residual)
    if masked:
        set_masks(
            model, {layer.module_name: torch.rand(layer.parameter.shape) < 0.9 for layer in prunable_tensors(model)}
        )
        plain.load_state_dict(bake(copy.deepcopy(model)).state_dict())
    before = {layer.module_name: layer.parameter.detach().clone() for layer in prunable_tensors(model)}
    for each in (model, plain):
        cls = tp.pruner.BasePruner
        options = {"importance": magnitude(), "ignored_layers": [each.head]}
        prune_softly(pruner(cls, each, x, **options) if each is model else cls(each, x, **options))
    same(model, plain, x)
    for layer, twin in zip(prunable_tensors(model), prunable_tensors(plain), strict=True):
        gone = (twin.parameter == 0).flatten(2).all(2) if twin.parameter.dim() == 4 else twin.parameter == 0
        assert bool(gone.any()) and not bool(gone.all())
        kept = torch.ones_like(layer.parameter) if layer.mask is None else layer.mask
        assert not bool((layer.parameter * kept)[gone].any())
        assert torch.equal(layer.parameter[~gone], before[layer.module_name][~gone])  # bit for bit
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_between_groups_the_model_is_whole() -> None:
    model, plain, x = twins("dct", Residual)
    cutter = pruner(tp.pruner.BasePruner, model, x, importance=magnitude(), ignored_layers=[model.head])
    theirs = tp.pruner.BasePruner(plain, x, importance=magnitude(), ignored_layers=[plain.head])
    for group, twin in zip(cutter.step(interactive=True), theirs.step(interactive=True), strict=True):
        same(model, plain, x)
        kernels = model.wide.weight.detach().clone()
        kernels[2, 3, :, 0] = torch.tensor([1.0, -2.0, 3.0])
        for each in (model, plain):  # any write counts, for what is computed next, and for the group
            each.wide.weight.data.copy_(kernels)
        torch.testing.assert_close(model.wide.weight, plain.wide.weight)
        for each in (model, plain):
            each.train()(x).sum().backward()
        torch.testing.assert_close(model.wide.weight, plain.wide.weight)
        group.prune()
        twin.prune()
    same(model, plain, x)


def test_a_group_that_fails_is_undone_alone() -> None:
    model, plain, x = twins("dct", Residual)
    cutter = pruner(tp.pruner.BasePruner, model, x, importance=magnitude(), ignored_layers=[model.head])
    first, second = cutter.step(interactive=True)
    first.prune()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    history, attributes = list(cutter.pruning_history()), [vars(module).copy() for module in model.modules()]

    def broken(idxs: object) -> None:
        raise OSError("full")

    broken.target = second[-1].dep.target  # type: ignore[attr-defined]
    second.add_dep(broken, second[-1].idxs)
    with pytest.raises(OSError, match="full"):
        second.prune()
    assert cutter.pruning_history() == history and len(history) == 1
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    for module, kept in zip(model.modules(), attributes, strict=True):
        assert {name: value for name, value in vars(module).items() if isinstance(value, int)} == {
            name: value for name, value in kept.items() if isinstance(value, int)
        }
    second.items.pop()
    second.prune()
    theirs = tp.pruner.BasePruner(plain, x, importance=magnitude(), ignored_layers=[plain.head])
    theirs.step()
    same(model, plain, x)


def test_an_importance_asked_by_hand_reads_coefficients() -> None:
    model, plain, x = twins("dct")
    with torch.no_grad():
        for space in {layer.interspace for layer in prunable_tensors(model) if layer.interspace}:
            space.constraint = "none"
            space.basis.mul_(3)
        plain.load_state_dict(bake(copy.deepcopy(model)).state_dict())
    ours = pruner(tp.pruner.BasePruner, model, x, importance=magnitude(), ignored_layers=[model.head])
    theirs = tp.pruner.BasePruner(plain, x, importance=magnitude(), ignored_layers=[plain.head], out_channel_groups={})
    count = 0
    for group, other in zip(ours.DG.get_all_groups(), theirs.DG.get_all_groups(), strict=True):
        expected = magnitude()(other)
        torch.testing.assert_close(ours.estimate_importance(group), expected)
        with plain_layers(model):
            torch.testing.assert_close(magnitude()(group), expected)
        count += 1
    assert count > 4


def test_the_history_cuts_another_copy() -> None:
    model, _, x = twins("orthonormal")
    fresh = copy.deepcopy(model)
    options = {"importance": magnitude(), "iterative_steps": 2}
    cutter = pruner(tp.pruner.BasePruner, model, x, ignored_layers=[model.head], **options)
    cutter.step()
    cutter.step()
    other = pruner(tp.pruner.BasePruner, fresh, x, ignored_layers=[fresh.head], **options)
    other.load_pruning_history(cutter.pruning_history())
    for (name, a), (_, b) in zip(model.state_dict().items(), fresh.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_the_hosts_state_dict_holds_the_baked_model(tmp_path: Any) -> None:
    model, plain, x = twins("dct")
    pruner(tp.pruner.BasePruner, model, x, importance=magnitude(), ignored_layers=[model.head]).step()
    torch.save(tp.state_dict(bake(copy.deepcopy(model))), tmp_path / "pruned.pt")
    fresh = tp.load_state_dict(plain, torch.load(tmp_path / "pruned.pt", weights_only=False))
    torch.testing.assert_close(fresh.eval()(x), model.eval()(x))


RELOAD = """
import sys, torch, torch_pruning as tp
from torch import nn
from ip_plugin import interspace
from ip_plugin.adapters.torch_pruning import pruner

def build():
    torch.manual_seed(0)
    return interspace(nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)), basis="dct", sharing="model")

def cut(model, optimizer=None):
    return pruner(tp.pruner.BasePruner, model, torch.zeros(2, 3, 8, 8), ignored_layers=[model[7]],
                  importance=tp.importance.GroupMagnitudeImportance(), optimizer=optimizer)
"""


def test_a_moved_basis_prunes_trains_and_reloads_in_a_fresh_process(tmp_path: Any) -> None:
    namespace: dict[str, Any] = {}
    exec(RELOAD, namespace)
    model = namespace["build"]()
    x, target = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def fit(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()

    fit(5)
    basis = model[0].parametrizations.weight[0].basis
    assert basis is model[3].parametrizations.weight[0].basis
    assert (basis @ basis.mT - torch.eye(9)).abs().max() > 1e-3
    cutter = namespace["cut"](model, optimizer)
    cutter.step()
    assert model[3].parametrizations.weight.original.shape == (6, 8, 3, 3)
    fit(3)
    assert basis is model[0].parametrizations.weight[0].basis
    torch.save([cutter.pruning_history(), model.state_dict(), x, model.eval()(x)], tmp_path / "saved.pt")
    script = f"""{RELOAD}
history, state, x, output = torch.load({str(tmp_path / "saved.pt")!r}, weights_only=True)
torch.set_num_threads({torch.get_num_threads()})
model = build()
cut(model).load_pruning_history(history)
model.load_state_dict(state)
assert torch.equal(model.eval()(x), output)
print("bit for bit", sum(p.numel() for p in model.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["bit", "for", "bit", str(sum(p.numel() for p in model.parameters()))], done.stderr


# Gauge, masks, optimizer ------------------------------------------------------------------------------------------


def rescale(model: nn.Module) -> None:
    """Another gauge of the same network: every filter has another norm."""
    with torch.no_grad():
        factors: dict[nn.Parameter, Tensor] = {}
        for layer in prunable_tensors(model):
            if layer.interspace is not None:
                layer.interspace.constraint = "none"
                basis = layer.interspace.basis
                factor = factors.setdefault(basis, torch.linspace(0.2, 3, len(basis), dtype=basis.dtype))
                layer.parameter.div_(factor.reshape(1, 1, *layer.parameter.shape[2:]))
        for basis, factor in factors.items():
            basis.mul_(factor[:, None])


@pytest.mark.parametrize("importance", ["l2", "taylor", "hessian"])
def test_magnitudes_are_read_in_unit_gauge_and_nothing_is_scaled_for_good(importance: str) -> None:
    model, _, x = twins("dct")
    rescale(model)
    unit = normalize(copy.deepcopy(model))
    histories, kept = [], {}
    for each in (model, unit):
        before = {layer.module_name: layer.parameter.detach().clone() for layer in prunable_tensors(each)}
        basis = {name: p.detach().clone() for name, p in each.named_parameters() if name.endswith("basis")}
        scorer = IMPORTANCES[importance]()
        scored(each.eval(), scorer, x)
        grads = {layer.module_name: layer.parameter.grad.clone() for layer in prunable_tensors(each)}
        cutter = pruner(tp.pruner.BasePruner, each, x, importance=scorer, ignored_layers=[each.head])
        cutter.step()
        histories.append(cutter.pruning_history())
        for name, p in each.named_parameters():
            if name.endswith("basis"):
                assert torch.equal(p, basis[name])
        if each is model:
            kept = {name: (value, grads[name]) for name, value in before.items()}
    assert histories[0] == histories[1]
    assert len(histories[0]) > 3
    for layer in prunable_tensors(model):  # every value and gradient that is left is one that was there, to the bit
        value, grad = kept[layer.module_name]
        assert torch.isin(layer.parameter, value).all()
        assert layer.parameter.numel() < value.numel() or layer.module_name == "head"
        if importance != "hessian":  # the host keeps second moments there
            assert torch.isin(layer.parameter.grad, grad).all()


class CutAndLook(tp.pruner.BasePruner):
    """A user's own pruner, which reads magnitudes in its constructor and after a cut."""

    def __init__(self, model: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(model, *args, **options)
        self.seen = [model.left.weight.detach().clone()]

    def cut(self) -> None:
        self.DG.get_pruning_group(self.model.left, tp.prune_conv_out_channels, idxs=[0, 5]).prune()
        self.seen.append(self.model.left.weight.detach().clone())


def test_a_pruner_of_ones_own_reads_unit_gauge_everywhere() -> None:
    model, _, x = twins("dct", Residual)
    rescale(model)
    cutter = pruner(CutAndLook, model, x, importance=magnitude())
    cutter.cut()
    left = model.left.parametrizations.weight
    expected = left.original * left[0].basis.norm(dim=1).reshape(1, 1, 3, 3)
    assert cutter.seen[0].shape == (8, 8, 3, 3)
    kept = [1, 2, 3, 4, 6, 7]
    torch.testing.assert_close(cutter.seen[0][kept][:, kept], expected.detach())
    torch.testing.assert_close(cutter.seen[1], expected.detach())


def test_regularizers_act_in_unit_gauge() -> None:
    model, _, x = twins("dct", Residual)
    rescale(model)
    unit = normalize(copy.deepcopy(model))
    for each in (model, unit):
        F.cross_entropy(each(x), torch.tensor([0, 1])).backward()
        pruner(
            tp.pruner.GroupNormPruner, each, x, importance=magnitude(normalizer=None), reg=0.1,
            ignored_layers=[each.head],
        ).regularize(each)  # fmt: skip
    for layer, other in zip(prunable_tensors(model), prunable_tensors(unit), strict=True):
        scale = 1.0
        if layer.interspace is not None:
            scale = layer.interspace.basis.norm(dim=1).reshape(1, 1, *layer.parameter.shape[2:])
        torch.testing.assert_close(layer.parameter.grad, other.parameter.grad * scale)


def small(bias: bool = False) -> nn.Sequential:
    """Two layers: of the first, filters 0 and 2 are the weaker ones."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=bias), nn.Conv2d(4, 2, 3, bias=bias))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.1, 2.0, 0.2, 1.0]).reshape(4, 1, 1, 1).expand(4, 1, 3, 3))
        model[1].weight.copy_(torch.arange(72.0).reshape(2, 4, 3, 3))
    return model


@pytest.mark.parametrize("whose", ["ours", "the host's"])
@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_masks_are_cut_along(space: str, whose: str) -> None:
    model = small()
    if space == "interspace":
        interspace(model)
    first = torch.ones(4, 1, 3, 3, dtype=torch.bool)
    first[1, 0, 0, :] = False
    second = torch.ones(2, 4, 3, 3, dtype=torch.bool)
    second[0, 1], second[1, 3, 2, 2], second[1, 0] = False, False, False
    if whose == "ours":
        set_masks(model, {"0": first, "1": second})
    else:
        for layer, mask in zip(prunable_tensors(model), (first, second), strict=True):
            prune.custom_from_mask(*layer.target, mask=mask)
    weights = [p.detach().clone() for name, p in model.named_parameters() if not name.endswith("basis")]
    importance = tp.importance.GroupMagnitudeImportance(group_reduction="first")
    cutter = pruner(tp.pruner.BasePruner, model, torch.zeros(1, 1, 7, 7), importance=importance,
                    ignored_layers=[model[1]])  # fmt: skip
    cutter.step()
    assert cutter.pruning_history() == [["0", True, [0, 2]]]
    left = masks(model)
    assert torch.equal(left["0"], first[[1, 3]])
    assert torch.equal(left["1"], second[:, [1, 3]])
    found = prunable_tensors(model)
    assert torch.equal(found[0].parameter, weights[0][[1, 3]])
    assert torch.equal(found[1].parameter, weights[1][:, [1, 3]])
    assert int((bake(model)[1].weight == 0).sum()) == 9 + 1


def test_masked_entries_do_not_count() -> None:
    model = interspace(small())
    mask = torch.ones(4, 1, 3, 3, dtype=torch.bool)
    mask[1] = False  # the strongest filter
    set_masks(model, {"0": mask})
    importance = tp.importance.GroupMagnitudeImportance(group_reduction="first")
    cutter = pruner(tp.pruner.BasePruner, model, torch.zeros(1, 1, 7, 7), importance=importance,
                    ignored_layers=[model[1]])  # fmt: skip
    cutter.step()
    assert cutter.pruning_history() == [["0", True, [0, 1]]]


def test_masks_of_the_host_on_biases_and_norms_are_cut_along() -> None:
    model, _, x = twins()
    prune.l1_unstructured(model.branch, "bias", amount=2)
    prune.l1_unstructured(model.norm, "weight", amount=3)
    expected = {"branch": model.branch.bias_mask.bool(), "norm": model.norm.weight_mask.bool()}
    cutter = pruner(tp.pruner.BasePruner, model, x, importance=magnitude(), ignored_layers=[model.head])
    gone: dict[str, list[int]] = {}
    for group in cutter.step(interactive=True):
        for dep, idxs in group.items:
            for name, module in (("branch", model.branch), ("norm", model.norm)):
                if dep.target.module is module and (name == "norm" or "out" in dep.handler.__name__):
                    gone[name] = list(idxs)
        group.prune()
    for name, module, tensor in (("branch", model.branch, "bias"), ("norm", model.norm, "weight")):
        kept = [i for i in range(len(expected[name])) if i not in gone[name]]
        assert torch.equal(module.parametrizations[tensor][0].mask, expected[name][kept])


def test_masks_of_the_host_join_those_that_are_there() -> None:
    model, _, _ = twins()
    TensorRef(model.branch, "bias").set_mask(torch.tensor([1, 0, 1, 1, 1, 1]))
    prune.custom_from_mask(model.branch.parametrizations["bias"], "original", torch.tensor([1, 1, 0, 1, 1, 1.0]))
    with plain_layers(model):
        assert (model.branch.bias != 0).tolist() == [True, False, False, True, True, True]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("basis", [None, "standard", "dct"])
def test_the_optimizer_goes_on(name: str, basis: str | None) -> None:
    model, plain, x = twins(basis or "standard")
    if basis is None:
        model = plain
    set_masks(model, {"branch": torch.rand(6, 8, 5, 5) > 0.3})
    groups = [{"params": list(model.parameters())[:4], "lr": 0.02}, {"params": list(model.parameters())[4:]}]
    optimizer = OPTIMIZERS[name](groups)
    target = torch.tensor([0, 1])

    def fit() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), target).backward()
        optimizer.step()

    fit()
    rescaled = {}
    with torch.no_grad():  # state and gradients whose values tell where they are from
        for parameter, state in optimizer.state.items():
            parameter.grad.copy_(parameter)
            for key, value in state.items():
                if value.shape == parameter.shape:
                    value.copy_(parameter)
                    rescaled[key] = True
    assert rescaled
    frozen = model.narrow.bias
    frozen.requires_grad_(False)
    cutter = pruner(
        tp.pruner.BasePruner, model, x, importance=magnitude(), ignored_layers=[model.head], optimizer=optimizer
    )
    before = {id(p) for p in model.parameters()}
    cutter.step()
    live = list(model.parameters())
    assert {id(p) for p in live} != before
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in live}
    assert len(held) == len(live)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, len(live) - 4]
    assert {id(p) for p in optimizer.state} <= {id(p) for p in live}
    for parameter in live:
        assert torch.equal(parameter.grad, parameter)
        for value in optimizer.state[parameter].values():
            if value.dim():
                assert torch.equal(value, parameter)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["narrow.bias"]
    model.narrow.bias.requires_grad_(True)
    values = [p.detach().clone() for p in live]
    for _ in range(2):
        fit()
    still = [name for (name, p), v in zip(model.named_parameters(), values, strict=True) if torch.equal(p, v)]
    assert not still


def test_without_an_optimizer_old_parameters_keep_their_size_and_values() -> None:
    model, _, x = twins("dct")
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    old = {name: (p, p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters()}
    pruner(tp.pruner.BasePruner, model, x, importance=magnitude(), ignored_layers=[model.head]).step()
    assert any(p is not old[name][0] for name, p in model.named_parameters())
    for parameter, value, grad in old.values():
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.grad, grad)


def test_state_of_an_unknown_shape_is_reset_with_a_warning() -> None:
    model = interspace(small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = model[0].parametrizations.weight.original
    optimizer.state[weight] = {"rows": torch.ones(4)}
    with pytest.warns(UserWarning, match="optimizer state rows has not the shape"):
        pruner(tp.pruner.BasePruner, model, torch.zeros(1, 1, 7, 7), importance=magnitude(), optimizer=optimizer,
               ignored_layers=[model[1]]).step()  # fmt: skip
    assert not optimizer.state


def test_a_tied_weight_has_two_heirs_in_the_optimizer() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False), nn.Linear(6, 2))
    model[2].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    pruner(tp.pruner.BasePruner, model, torch.randn(4, 6), importance=magnitude(), pruning_ratio=0.5,
           optimizer=optimizer, ignored_layers=[model[3]]).step()  # fmt: skip
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert {id(p) for p in model.parameters()} <= held
    first, second = (optimizer.state[model[i].weight] for i in (0, 2))
    assert model[0].weight.shape == first["exp_avg"].shape == (3, 6)
    assert model[2].weight.shape == second["exp_avg"].shape == (3, 3)
    assert first["step"] is not second["step"]


def test_names_in_the_optimizer_stay_beside_their_parameters() -> None:
    model, _, x = twins()
    try:
        optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    except TypeError:
        pytest.skip("optimizers of this torch take no names")
    pruner(tp.pruner.BasePruner, model, x, importance=magnitude(), ignored_layers=[model.head],
           optimizer=optimizer).step()  # fmt: skip
    group = optimizer.param_groups[0]
    names = dict(model.named_parameters())
    assert len(group["param_names"]) == len(names)
    assert all(names[name] is parameter for name, parameter in zip(group["param_names"], group["params"], strict=True))


def test_large_parameters_can_be_counted() -> None:
    from ip_plugin.adapters.torch_pruning.removal import _positions

    assert int(_positions(torch.empty(2**24 + 2))[-1]) == 2**24 + 1


def test_the_memory_format_stays() -> None:
    model, _, x = twins("dct")
    model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    set_masks(model, {"left": torch.rand(8, 8, 3, 3) > 0.3})
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    pruner(tp.pruner.BasePruner, model, x, importance=magnitude(), ignored_layers=[model.head]).step()
    left = next(layer for layer in prunable_tensors(model) if layer.module_name == "left")
    assert left.parameter.shape == (4, 4, 3, 3)
    for tensor in (left.parameter, left.parameter.grad, left.mask):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


def test_bases_may_join_the_optimizer_after_the_cut() -> None:
    momenta = []
    for early in (True, False):
        torch.manual_seed(0)
        model, x = Residual().double(), torch.randn(X, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
        optimizer.step()
        interspace(model, basis="dct")
        if early:
            join_optimizer(model, optimizer)
        pruner(tp.pruner.BasePruner, model, x, importance=magnitude(), ignored_layers=[model.head],
               optimizer=optimizer).step()  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            join_optimizer(model, optimizer)
        momenta.append([optimizer.state[layer.parameter]["momentum_buffer"] for layer in prunable_tensors(model)])
        assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    for first, second in zip(*momenta, strict=True):
        torch.testing.assert_close(first, second)


# What the host gets wrong -----------------------------------------------------------------------------------------


def test_multiply_adds_and_parameters_are_counted_truly() -> None:
    torch.manual_seed(0)
    model = interspace(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]), sharing="model")
    x = torch.randn(1, 3, 32, 32)
    pruner(tp.pruner.BasePruner, model, x, importance=magnitude(), ignored_layers=[model.fc]).step()
    found = count_ops_and_params(model, x, layer_wise=True)
    ours = report(model, x)
    baked = bake(copy.deepcopy(model))
    theirs = tp.utils.count_ops_and_params(baked, x, layer_wise=True)
    assert found[:2] == theirs[:2]
    assert report(baked).everything.parameters == found[1]
    assert ours.everything.parameters - ours.everything.basis_parameters == found[1]
    modules = dict(model.named_modules())
    for row in ours.rows:
        # The host adds the additions of biases.
        bias = modules[row.layer].bias
        assert found[2][modules[row.layer]] == row.macs_dense + (0 if bias is None else bias.numel()), row.layer
    for counts, of_baked in zip(found[2:], theirs[2:], strict=True):
        assert set(counts) == set(model.modules())
        named = {name: counts[module] for name, module in model.named_modules()}
        expected = {name: of_baked[module] for name, module in baked.named_modules()}
        assert {name: named.pop(name) for name in expected} == expected
        assert named and not any(named.values())


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_what_they_were(training: bool) -> None:
    model, _, x = twins()
    model.train(training)
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    cutter = pruner(tp.pruner.BasePruner, model, x, importance=magnitude(), ignored_layers=[model.head])
    assert [module.training for module in model.modules()] == modes
    cutter.step()
    assert [module.training for module in model.modules()] == modes


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """Everything about a model that a failed call must not change."""
    return (
        {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()},
        {name: b.clone() for name, b in model.named_buffers()},
        {name: (type(m), m.training, len(m._forward_hooks), list(m._modules)) for name, m in model.named_modules()},
        {name: getattr(m, "out_channels", None) for name, m in model.named_modules()},
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    )


def assert_unchanged(model: nn.Module, before: tuple[Any, ...]) -> None:
    after = state_of(model)
    assert before[2:4] == after[2:4]
    for old, new in zip(before[0].items(), after[0].items(), strict=True):
        assert (old[0], old[1][0]) == (new[0], new[1][0])
        assert torch.equal(old[1][1], new[1][1])
    assert all(torch.equal(a, b) for a, b in zip(before[1].values(), after[1].values(), strict=True))
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(before[4], after[4], strict=True))


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ["importance", "pruner", "arithmetic"])
def test_a_step_that_fails_half_way_changes_nothing(where: str) -> None:
    model, _, x = twins("dct", Residual)
    rescale(model)
    set_masks(model, {"left": torch.rand(8, 8, 3, 3) > 0.3})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    optimizer.step()

    class Failing(type(tp.pruner.function.PrunerBox[tp.ops.OPTYPE.CONV])):  # type: ignore[misc]
        def prune_out_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
            super().prune_out_channels(layer, idxs)
            if where == "arithmetic":
                layer.weight.data.mul_(0.3)
            elif where == "pruner":
                raise Broken
            return layer

    calls = []

    def importance(group: Any) -> Tensor:
        calls.append(group)
        if where == "importance" and len(calls) == 2:
            raise Broken
        return magnitude()(group)

    cutter = pruner(
        tp.pruner.BasePruner, model, x, importance=importance, ignored_layers=[model.head], optimizer=optimizer,
        customized_pruners={Marked: Failing()},
    )  # fmt: skip
    before, state = state_of(model), copy.deepcopy(optimizer.state_dict())
    error = UnfollowedCutError if where == "arithmetic" else Broken
    with pytest.raises(error):
        cutter.step()
    assert_unchanged(model, before)
    assert cutter.current_step == 0
    assert cutter.pruning_history() == []
    for (_, a), (_, b) in zip(state["state"].items(), optimizer.state_dict()["state"].items(), strict=True):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    where = "nowhere"  # and it can be done again
    cutter.step()
    assert (model.wide.out_channels, model.left.out_channels) == (5, 4)
    model(x)


def test_plain_layers_are_to_be_read() -> None:
    model, _, _ = twins("dct")
    before = state_of(model)
    with pytest.raises(UnfollowedCutError, match="'left'"), plain_layers(model):
        model.left.weight = nn.Parameter(torch.zeros(1, 8, 3, 3))
    assert_unchanged(model, before)
    with plain_layers(model):
        assert type(model.left) is nn.Conv2d
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in Net().named_parameters()]
        with plain_layers(model):
            pass
        assert type(model.left) is nn.Conv2d
    assert_unchanged(model, before)


def test_what_a_host_writes_is_scaled_back() -> None:
    model, _, _ = twins("dct")
    rescale(model)
    layer = next(layer for layer in prunable_tensors(model) if layer.module_name == "left")
    scale = layer.interspace.basis.norm(dim=1).reshape(3, 3).detach()
    before = layer.parameter.detach().clone()
    with plain_layers(model):
        torch.testing.assert_close(model.left.weight.detach(), before * scale)
        model.left.weight.data[1, 2] = 6.0
        model.left.weight.grad = torch.ones_like(model.left.weight)
    expected = before.clone()
    expected[1, 2] = 6.0 / scale
    torch.testing.assert_close(layer.parameter, expected)
    assert int((layer.parameter != before).sum()) == 9
    torch.testing.assert_close(layer.parameter.grad[0, 0], scale)


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["spatial", "interspace"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": torch.zeros(1, 5, 8, 8)}, ExampleInputError, r"on \(1, 5, 8, 8\)"),
        ({"x": "image"}, ExampleInputError, "on str"),
        ({"pruning_ratio": 1.5}, InvalidRatioError, "`pruning_ratio`.*\n.*1.5"),
        ({"pruning_ratio": -0.1}, InvalidRatioError, "-0.1"),
        ({"pruning_ratio": float("nan")}, InvalidRatioError, "nan"),
        ({"pruning_ratio": "half"}, InvalidRatioError, "'half'"),
        ({"max_pruning_ratio": 2}, InvalidRatioError, "`max_pruning_ratio`"),
        ({"ch_sparsity": 3.0}, InvalidRatioError, "`ch_sparsity`"),
        ({"pruning_ratio_dict": lambda net: {net.left: 1.1}}, InvalidRatioError, "`pruning_ratio_dict`"),
        ({"pruning_ratio_dict": {nn.Conv2d(3, 8, 3): 0.5}}, ForeignModuleError, "`pruning_ratio_dict`"),
        ({"pruning_ratio_dict": {"left": 0.5}}, ForeignModuleError, "'left'"),
        ({"pruning_ratio_dict": lambda net: {(net.left, nn.Conv2d(3, 8, 3)): 0.5}}, ForeignModuleError, "Conv2d"),
        ({"ignored_layers": [nn.Linear(8, 4)]}, ForeignModuleError, "`ignored_layers`"),
        ({"out_channel_groups": {nn.Linear(8, 4): 2}}, ForeignModuleError, "`out_channel_groups`"),
        ({"num_heads": {nn.Linear(8, 4): 2}}, ForeignModuleError, "`num_heads`"),
        ({"cls": nn.Linear}, InvalidPrunerError, "nn.modules.linear.Linear"),
        ({"cls": tp.importance.GroupMagnitudeImportance}, InvalidPrunerError, "GroupMagnitude"),
        ({"cls": partial(nn.Linear, bias=False)}, InvalidPrunerError, "nn.modules.linear.Linear"),
        ({"cls": partial(tp.pruner.BasePruner, nn.Linear(2, 2))}, InvalidPrunerError, "functools.partial"),
        ({"no_such_argument": 1}, TypeError, "no_such_argument"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(
    space: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, plain, x = twins()
    if space == "spatial":
        model = plain
    arguments = {
        name: value(model) if callable(value) and not isinstance(value, (type, partial)) else value
        for name, value in options.items()
    }
    before = state_of(model)
    with pytest.raises(error, match=message):
        pruner(arguments.pop("cls", tp.pruner.BasePruner), model, arguments.pop("x", x), importance=magnitude(),
               **arguments)  # fmt: skip
    assert_unchanged(model, before)


def test_models_that_cannot_be_cut_are_refused() -> None:
    model, _, x = twins()
    plain = nn.Sequential(nn.Conv2d(3, 4, 3))
    options = {"importance": magnitude()}
    with pytest.raises(CompiledModelError, match="OptimizedModule"):
        pruner(tp.pruner.BasePruner, torch.compile(model), x, **options)
    with pytest.raises(CompiledModelError, match="module '1'"):
        pruner(tp.pruner.BasePruner, nn.Sequential(nn.Identity(), torch.compile(plain)), x, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(plain)
    with pytest.raises(CompiledModelError):
        pruner(tp.pruner.BasePruner, scripted, x, **options)
    in_place, _, _ = twins()
    in_place.compile()
    with pytest.raises(CompiledModelError):
        pruner(tp.pruner.BasePruner, in_place, x, **options)
    with pytest.raises(AlreadyParametrizedError, match="layer '0'"):
        pruner(tp.pruner.BasePruner, nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3))), x, **options)
    beside, _, _ = twins()
    parametrizations.spectral_norm(beside.branch, "bias")
    with pytest.raises(AlreadyParametrizedError, match="'branch': bias parametrized by _SpectralNorm"):
        pruner(tp.pruner.BasePruner, beside, x, **options)
    parametrizations.orthogonal(model.left, "weight")
    with pytest.raises(AlreadyParametrizedError, match="'left'"):
        pruner(tp.pruner.BasePruner, model, x, **options)
    model, _, x = twins()
    with pytest.raises(OptimizerMismatchError):
        pruner(tp.pruner.BasePruner, model, x, optimizer=torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1), **options)
