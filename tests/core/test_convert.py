"""interspace, bake and prunable beyond the shared behaviours."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from kinds import backward
from torch import nn
from torch.nn.utils import parametrizations

from ip_plugin import bake, interspace, prunable, report, set_masks
from ip_plugin.adapters import torch_prune
from ip_plugin.core.tensor_ref import TensorRef
from ip_plugin.errors import ConversionError, SelectionError
from ip_plugin.methods import magnitude, prune

pytestmark = pytest.mark.contract


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 7, padding=3)
        self.block = nn.ModuleDict({"a": nn.Conv2d(4, 4, 3, padding=1), "b": nn.Conv2d(4, 4, 3, padding=1)})
        self.skip = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.block["b"](self.block["a"](x).relu()) + self.skip(x)
        out: torch.Tensor = self.head(x.mean((2, 3)))
        return out


def spaces(model: nn.Module) -> list[str]:
    return [row.layer for row in report(model).rows if row.space == "interspace"]


def test_all_convolutions_larger_than_1x1_are_converted() -> None:
    assert spaces(interspace(Residual())) == ["stem", "block.a", "block.b"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["block.b", "stem"], ["stem", "block.b"]),
        ((name for name in ("block.a",)), ["block.a"]),
        ({"stem"}, ["stem"]),
        (lambda name, module: name.startswith("block"), ["block.a", "block.b"]),
        (lambda name, module: module.kernel_size == (7, 7), ["stem"]),
    ],
)
def test_layers_selects(layers: object, expected: list[str]) -> None:
    assert spaces(interspace(Residual(), layers=layers)) == expected  # type: ignore[arg-type]


NORMS = {
    "weight_norm": nn.utils.weight_norm,
    "weight_norm, parametrized": parametrizations.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "spectral_norm, parametrized": parametrizations.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", NORMS)
def test_layers_whose_weight_someone_else_computes_are_left_out_by_default_and_refused_by_name(norm: str) -> None:
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(4)))
    NORMS[norm](model[1]), NORMS[norm](model[2])
    for layers in (["0", "1"], lambda name, module: True):
        with pytest.raises(ConversionError, match="layer '1': weight parametrized by"):
            interspace(model, layers=layers)
    with pytest.warns(UserWarning, match="layers '1', '2' stay spatial") as caught:
        interspace(model)
    assert len(caught) == 1 and [i for i in range(4) if TensorRef(model[i]).interspace] == [0, 3]
    assert len(prunable(prune(model, magnitude, sparsity=0.5))) == 2


def test_large_kernels_whose_basis_would_not_pay_are_converted_only_by_name() -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Conv1d(1, 4, 64), nn.Conv1d(4, 4, 3), nn.Conv1d(4, 17, 64))

    with pytest.warns(UserWarning, match="layers '0' stay spatial: .* large") as caught:
        assert spaces(interspace(model())) == ["1", "2"]
    assert len(caught) == 1
    assert spaces(interspace(model(), sharing="model")) == ["0", "1", "2"]  # together they pay for one basis
    assert spaces(interspace(model(), layers=["0"])) == ["0"]
    assert spaces(interspace(model(), layers=lambda name, module: True)) == ["0", "1", "2"]
    with pytest.raises(SelectionError, match="name the layers"):
        interspace(model()[0])
    for small in (nn.Conv2d(3, 64, 7), nn.Conv2d(3, 4, 7), nn.Conv2d(1, 6, 5)):
        assert spaces(interspace(small)) == [""]


def test_a_model_that_is_one_convolution() -> None:
    conv = nn.Conv2d(3, 4, 3)
    assert interspace(conv, layers=[""]) is conv
    assert prunable(conv) == [(conv.parametrizations.weight, "original")]
    assert type(bake(conv)) is nn.Conv2d


def test_parts_can_be_converted_one_after_the_other() -> None:
    model = interspace(Residual(), layers=["stem"], basis="dct")
    interspace(model, layers=lambda name, module: name != "stem", sharing="model")
    assert spaces(model) == ["stem", "block.a", "block.b"]
    assert spaces(bake(model)) == []


def test_sharing_by_model_gives_every_kernel_shape_one_basis() -> None:
    model = interspace(Residual(), sharing="model")
    stem, a, b = (model.get_submodule(f"{name}.parametrizations.weight.0").basis for name in spaces(model))
    assert a is b and stem is not a
    assert stem.shape == (49, 49) and a.shape == (9, 9)


def test_one_seed_gives_one_model_and_every_layer_its_own_random_basis() -> None:
    first, again, other = (interspace(Residual(), basis="orthonormal", seed=seed) for seed in (0, 0, 1))
    bases = [[p for n, p in model.named_parameters() if n.endswith("basis")] for model in (first, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(bases[0], bases[1], strict=True))
    assert not any(torch.allclose(a, b) for a, b in zip(bases[0], bases[2], strict=True))
    assert not torch.allclose(bases[0][1], bases[0][2])


def test_the_global_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    model = Residual()
    torch.set_rng_state(state)
    interspace(model, basis="orthonormal")
    assert torch.equal(torch.get_rng_state(), state)


def test_bases_are_frozen_where_asked_and_where_the_convolution_is_frozen() -> None:
    model = Residual()
    model.stem.requires_grad_(False)
    model.block["a"].requires_grad_(False)
    interspace(model, sharing="model")
    trains = {name: p.requires_grad for name, p in model.named_parameters() if name.endswith("basis")}
    assert list(trains.values()) == [False, True]  # the stem's; the one that a and b share
    frozen = interspace(Residual(), train_basis=False)
    assert not any(p.requires_grad for name, p in frozen.named_parameters() if name.endswith("basis"))
    assert "frozen" in repr(frozen) and "frozen" not in repr(interspace(Residual()))


def test_gradients_that_are_there_are_carried_over() -> None:
    model, x = Residual().double(), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    backward(model, x)
    carried = interspace(model, basis="orthonormal")
    found = {name: p.grad.clone() for name, p in carried.named_parameters() if p.grad is not None}
    backward(carried, x)
    for name, parameter in carried.named_parameters():
        if not name.endswith("basis"):
            torch.testing.assert_close(found[name], parameter.grad)


def test_bake_drops_gradients_of_coefficients_and_no_others() -> None:
    model, x = interspace(Residual(), layers=["stem"]), torch.randn(2, 3, 9, 9)
    backward(model, x)
    bake(model)
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["stem.weight"]


def test_the_storage_of_weights_stays() -> None:
    model = Residual()
    pointers = [model.stem.weight.data_ptr(), model.block["a"].weight.data_ptr()]
    interspace(model, basis="dct")
    bake(model)
    assert pointers == [model.stem.weight.data_ptr(), model.block["a"].weight.data_ptr()]


def test_weights_can_be_assigned() -> None:
    conv = interspace(nn.Conv2d(3, 4, 3), basis="dct")
    parameter, value = conv.parametrizations.weight.original, torch.randn(4, 3, 3, 3)
    conv.weight = value
    torch.testing.assert_close(conv.weight, value)
    assert conv.parametrizations.weight.original is parameter
    value.zero_()
    assert conv.weight.any()


def test_a_parametrization_of_someone_else_on_another_tensor_stays() -> None:
    conv = nn.Conv2d(3, 4, 3)
    nn.utils.parametrize.register_parametrization(conv, "bias", nn.Tanh())
    copied = copy.deepcopy(conv)
    interspace(conv)
    assert bake(conv).bias.abs().max() < 1 and nn.utils.parametrize.is_parametrized(conv, "bias")
    assert "weight" in dict(conv.named_parameters())
    assert copied.bias.shape == (4,) and copied.weight.shape == (4, 3, 3, 3)


def test_parameters_that_a_subclass_adds_keep_their_place() -> None:
    class Scaled(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 4, 3)
            self.scale = nn.Parameter(torch.ones(4))

    conv = Scaled()
    torch_prune.l1_unstructured(conv, "bias", 0.5)
    interspace(conv)
    torch_prune.l1_unstructured(conv, "scale", 0.5)
    assert [name for name, _ in bake(conv).named_parameters()] == ["weight", "bias", "scale"]


def test_optimizer_state_from_before_loads_into_the_baked_model() -> None:
    model, x = Residual(), torch.randn(2, 3, 9, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    backward(model, x)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    interspace(model)
    torch_prune.l1_unstructured(model.head, "weight", 0.5)
    torch_prune.l1_unstructured(model.skip, "bias", 0.5)
    bake(model)
    after = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    after.load_state_dict(saved)
    for parameter in model.parameters():
        assert torch.equal(after.state[parameter]["momentum_buffer"], optimizer.state[parameter]["momentum_buffer"])


def test_one_module_used_under_two_names_is_one_layer() -> None:
    conv = nn.Conv2d(3, 3, 3)
    model = nn.ModuleDict({"first": conv, "second": conv})
    interspace(model)
    assert len(prunable(model)) == 1
    assert type(bake(model)["second"]) is nn.Conv2d


def test_prunable_lists_targets_in_model_order() -> None:
    model = Residual()
    plain = [(model.stem, "weight"), (model.block["a"], "weight"), (model.block["b"], "weight")]
    plain += [(model.skip, "weight"), (model.head, "weight")]
    assert prunable(model) == plain
    interspace(model, layers=["block.a"])
    assert prunable(model) == [(layer.parametrizations.weight, "original") for layer, _ in plain]
    bake(model)
    assert prunable(model) == plain
    set_masks(model, {"head": torch.ones(3, 4)})
    plain[4] = (model.head.parametrizations.weight, "original")
    assert prunable(model) == plain


def test_prunable_lists_a_tied_weight_once_and_leaves_out_what_is_not_ours() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Embedding(3, 3), nn.LayerNorm(3))
    model[1].weight = model[0].weight
    assert prunable(model) == [(model[0], "weight")]
    parametrizations.weight_norm(model[0])
    assert prunable(nn.Sequential(model[0], model[2], nn.LazyLinear(3))) == []


def test_meta_models_convert_and_load_with_assign() -> None:
    dense = Residual()
    trained = interspace(copy.deepcopy(dense), sharing="model")
    with torch.device("meta"):
        model = interspace(Residual(), sharing="model")
    model.load_state_dict(trained.state_dict(), assign=True)
    x = torch.randn(1, 3, 9, 9)
    assert torch.equal(model(x), dense(x))


def test_a_state_dict_gives_the_same_outputs_bit_for_bit_in_another_process(tmp_path: Path) -> None:
    model, x = interspace(Residual(), basis="orthonormal", sharing="model").eval(), torch.randn(2, 3, 9, 9)
    set_masks(model, {"stem": torch.rand(4, 3, 7, 7) < 0.5, "head": torch.rand(3, 4) < 0.5})
    torch.save({"state": model.state_dict(), "x": x, "y": model(x)}, tmp_path / "saved.pt")
    script = f"""
import sys, torch
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
from test_convert import Residual
from ip_plugin import interspace, set_masks
saved = torch.load({str(tmp_path / "saved.pt")!r}, weights_only=True)
model = interspace(Residual(), basis="dct", sharing="model").eval()
set_masks(model, {{"head": torch.ones(3, 4)}})
model.load_state_dict(saved["state"], strict=True)
assert torch.equal(model(saved["x"]), saved["y"])
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "convnext_tiny", "googlenet"])
def test_networks_of_torchvision_go_there_and_back(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None, **({"init_weights": False} if name == "googlenet" else {}))
    model.eval()
    x = torch.randn(1, 3, 64, 64)
    parameters, expected = dict(model.named_parameters()), model(x)
    assert torch.equal(interspace(model, sharing="model")(x), expected)
    assert torch.equal(bake(model)(x), expected)
    assert list(parameters) == [name for name, _ in model.named_parameters()]
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


@pytest.mark.parametrize("basis", ["standard", "dct"])
def test_hooks_of_parameters_stay(basis: str) -> None:
    """DistributedDataParallel relies on these hooks."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2))
    called: list[int] = []
    for index, parameter in enumerate(model.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda _, index=index: called.append(index))
    x = torch.randn(1, 3, 5, 5)
    interspace(model, basis=basis)
    set_masks(model, {"0": torch.rand(4, 3, 3, 3) > 0.5, "2": torch.rand(2, 36) > 0.5})
    model(x).sum().backward()
    bake(model)(x).sum().backward()
    assert sorted(called) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_zeros_that_reach_a_tied_weight_are_warned_of() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.out.weight = self.embed.weight

    for mask in (torch.rand(6, 4) < 0.5, torch.ones(6, 4), None):
        model = Tied()
        if mask is not None:
            set_masks(model, {"out": mask})
        pruned = mask is not None and not bool(mask.all())
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            bake(model)
        assert [("'out.weight'" in str(w.message), "'embed.weight'" in str(w.message)) for w in seen] == [
            (True, True)
        ] * pruned
        assert model.out.weight is model.embed.weight
