"""What a user can get wrong: an error that says so, and a model as it was before."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as host

import ip_plugin
from ip_plugin import adopt_masks, bake, errors, interspace, join_optimizer, load, normalize, report, save, set_masks
from ip_plugin.adapters import torch_prune

pytestmark = pytest.mark.contract


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, (1, 3)),
        nn.Flatten(),
        nn.Linear(48, 2),
    )


def snapshot(model: nn.Module) -> Any:
    """Everything of a model that a failed call could have changed."""
    return {
        name: (
            type(module),
            module.training,
            list(module._forward_pre_hooks),
            list(module._forward_hooks),
            list(module._load_state_dict_pre_hooks),
            sorted(vars(module)),
            {n: (id(p), values(p), p.requires_grad) for n, p in module._parameters.items() if p is not None},
            {n: b.clone() for n, b in module._buffers.items() if b is not None},
        )
        for name, module in model.named_modules()
    }


def values(parameter: nn.Parameter) -> Tensor | None:
    lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
    return None if lazy else parameter.detach().clone()


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first.nan_to_num(7), second.nan_to_num(7))
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[k], second[k]) for k in first)
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def spoilt(model: nn.Sequential, value: float) -> nn.Sequential:
    model[3].weight.data[0, 0, 0, 1] = value
    return model


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = model[0].weight
    return model


BAD_INTERSPACE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = {
    "nothing to convert": (lambda: nn.Linear(2, 2), {}, errors.SelectionError, "0 such convolutions in the model"),
    "nothing selected": (network, {"layers": []}, errors.SelectionError, "2 such convolutions.*selected"),
    "predicate selects nothing": (network, {"layers": lambda n, m: False}, errors.SelectionError, "none of them"),
    "unknown name": (network, {"layers": ["0", "00"]}, errors.SelectionError, "no module '00'"),
    "a name that is no string": (network, {"layers": [0]}, errors.SelectionError, "no module '0'"),
    "a string": (network, {"layers": "0"}, errors.SelectionError, r"write layers=\['0'\]"),
    "a number": (network, {"layers": 3}, errors.SelectionError, "int 3"),
    "a 1x1 convolution": (network, {"layers": ["2"]}, errors.SelectionError, "its kernel has one element"),
    "a linear layer": (network, {"layers": ["5"]}, errors.SelectionError, "a Linear, not a convolution"),
    "a lazy convolution": (
        lambda: nn.Sequential(nn.LazyConv2d(3, 3)), {"layers": ["0"]}, errors.ConversionError, "not initialised",
    ),
    "a lazy convolution among others": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.LazyConv2d(3, 3)), {}, errors.ConversionError,
        "layer '1': its weight is not initialised yet",
    ),
    "already there": (lambda: interspace(network()), {}, errors.ConversionError, "already there: '0', '3'"),
    "one is already there": (
        lambda: interspace(network(), layers=["0"]), {}, errors.ConversionError, "already there: '0'",
    ),
    "pruned by the host": (
        lambda: nn.Sequential(host.l1_unstructured(nn.Conv2d(3, 3, 3), "weight", 0.5)), {},
        errors.ConversionError, "'0': pruned by torch.nn.utils.prune",
    ),
    "pruned by us": (
        lambda: set_masks(network(), {"0": torch.ones(4, 3, 3, 3)}), {}, errors.ConversionError, "mask of ip_plugin",
    ),
    "parametrized": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 3, 3))), {},
        errors.ConversionError, "_WeightNorm",
    ),
    "spectral norm, whose state a look would change": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 3, 3))), {},
        errors.ConversionError, "_SpectralNorm",
    ),
    "computed by a hook": (
        lambda: nn.Sequential(torch.nn.utils.spectral_norm(nn.Conv2d(3, 3, 3))), {},
        errors.ConversionError, "a plain tensor, not a Parameter",
    ),
    "tied": (tied, {}, errors.ConversionError, "one Parameter is the weight of '0', '1'"),
    "wrapped": (lambda: nn.DataParallel(network()), {}, errors.ConversionError, "DataParallel"),
    "sharing unknown": (network, {"sharing": "stage"}, errors.ArgumentError, "Found: 'stage'\n"),
    "sharing unhashable": (
        network, {"sharing": lambda n, m: []}, errors.ArgumentError,
        r"Found: it returned \[\] for layer '0', which is not hashable\n",
    ),
    "a count where a fraction belongs": (
        network, {"basis": "fitted", "sparsity": 3}, errors.AmountError,
        r"`sparsity` must be a fraction in \[0, 1\].\nFound: 3 \(int\)\nWhat to do: pass a number between 0.0 and 1.0$",
    ),
    "kernel shapes that cannot share": (
        network, {"sharing": lambda n, m: 0}, errors.BasisError,
        r"'0' has kernel shape \(3, 3\), layer '3' has kernel shape \(1, 3\)",
    ),
    "dtypes that cannot share": (
        lambda: nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3).double()), {"sharing": lambda n, m: 0},
        errors.BasisError, "dtype torch.float32, layer '1' has dtype torch.float64",
    ),
    "basis unknown": (network, {"basis": "wavelet"}, errors.BasisError, "'wavelet'"),
    "basis singular": (network, {"basis": torch.ones(9, 9), "layers": ["0"]}, errors.BasisError, "dependent"),
    "basis for another kernel": (network, {"basis": torch.eye(9)}, errors.BasisError, r"shape \(9, 9\)"),
    "basis singular once rounded to the weights' dtype": (
        lambda: nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3).bfloat16()),
        {"basis": 1 + 3e-3 * torch.eye(9)}, errors.BasisError, "dependent",
    ),
    "NaN": (lambda: spoilt(network(), math.nan), {}, errors.ConversionError, "layer '3': 1 NaN or infinite"),
    "infinity": (lambda: spoilt(network(), math.inf), {}, errors.ConversionError, "layer '3': 1 NaN or infinite"),
    "complex": (
        lambda: network().to(torch.complex64), {}, errors.ConversionError, "layer '0': torch.complex64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INTERSPACE)
def test_interspace_refuses_and_changes_nothing(name: str) -> None:
    make, arguments, error, text = BAD_INTERSPACE[name]
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=text) as caught:
        interspace(model, **arguments)
    assert isinstance(caught.value, ValueError)
    assert same(before, snapshot(model))
    message = str(caught.value)
    assert "\nFound: " in message and "\nWhat to do: " in message


def test_an_integer_weight_is_refused() -> None:
    conv = nn.Conv2d(3, 3, 3)
    conv.weight = nn.Parameter(torch.ones(3, 3, 3, 3, dtype=torch.int32), requires_grad=False)
    with pytest.raises(errors.ConversionError, match=r"torch\.int32"):
        interspace(conv)
    assert type(conv) is nn.Conv2d


BAD_MASKS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "shape": ({"5": torch.ones(2, 48), "0": torch.ones(4, 3, 9)}, errors.MaskError, r"shape \(4, 3, 9\)"),
    "broadcastable shape": ({"0": torch.ones(4, 1, 1, 1)}, errors.MaskError, r"must be .* \(4, 3, 3, 3\)"),
    "values": ({"5": torch.ones(2, 48), "0": torch.rand(4, 3, 3, 3)}, errors.MaskError, "values other than"),
    "NaN": ({"0": torch.full((4, 3, 3, 3), math.nan)}, errors.MaskError, "values other than"),
    "no tensor": ({"0": [1, 0]}, errors.MaskError, "a list"),
    "name": ({"5": torch.ones(2, 48), "6": torch.ones(2, 48)}, errors.SelectionError, "`masks`.*\n.*no module '6'"),
    "no layer": ({"1": torch.ones(4)}, errors.SelectionError, "no module '1'"),
}


@pytest.mark.parametrize("convert", [False, True], ids=["spatial", "interspace"])
@pytest.mark.parametrize("name", BAD_MASKS)
def test_set_masks_refuses_and_changes_nothing(name: str, convert: bool) -> None:
    model = interspace(network()) if convert else network()
    before = snapshot(model)
    masks, error, text = BAD_MASKS[name]
    with pytest.raises(error, match=text):
        set_masks(model, masks)
    assert same(before, snapshot(model))


def test_set_masks_names_the_parametrization_of_someone_else() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 3, 3)))
    with pytest.raises(errors.ConversionError, match="layer '0'"):
        set_masks(model, {"0": torch.ones(3, 3, 3, 3)})


def test_bake_refuses_what_sits_on_top_and_changes_nothing() -> None:
    model = interspace(network())
    torch_prune.l1_unstructured(model[5], "weight", 0.5)
    parametrizations.weight_norm(model[0])
    before = snapshot(model)
    with pytest.raises(errors.ConversionError, match="bake the model first") as caught:
        bake(model)
    assert "'0': weight parametrized by _WeightNorm, besides that of ip_plugin" in str(caught.value)
    assert same(before, snapshot(model))


def test_normalize_refuses_a_filter_that_vanished_and_changes_nothing() -> None:
    model = interspace(network(), basis="dct", constraint="none")
    model[3].parametrizations.weight[0].basis.data[2] = 0
    model[0].parametrizations.weight[0].basis.data *= 2
    before = snapshot(model)
    with pytest.raises(errors.BasisError, match="filter 2 of the basis of layer '3' has norm 0.0"):
        normalize(model)
    assert same(before, snapshot(model))


def test_join_optimizer_refuses_the_optimizer_of_another_model() -> None:
    model, other = interspace(network()), network()
    with pytest.raises(errors.OptimizerError, match="2 interspace layers, none"):
        join_optimizer(model, torch.optim.SGD(other.parameters(), lr=0.1))


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "meta": (
        lambda path: save(nn.Linear(2, 2, device="meta"), path), errors.CheckpointError, "'weight': on the meta",
    ),
    "dtype": (
        lambda path: save(nn.Linear(2, 2), path, dtype=torch.int8), errors.CheckpointError, r"dtype=torch\.int8",
    ),
    "no compact file": (lambda path: load(nn.Linear(2, 2), path), errors.CheckpointError, "has not written"),
    "another model": (
        lambda path: (save(nn.Linear(3, 2), path), load(nn.Linear(2, 2), path)), errors.CheckpointError,
        r"'weight' of shape \(2, 3\) in the file and \(2, 2\) in the model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_checkpoints_are_refused(name: str, tmp_path: Path) -> None:
    call, error, text = BAD_CHECKPOINTS[name]
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(error, match=text) as caught:
        call(tmp_path / "file")
    assert "\nFound: " in str(caught.value) and "\nWhat to do: " in str(caught.value)


@pytest.mark.parametrize("example", [torch.zeros(1, 2, 9, 9), (1, 2, 3), {"y": torch.zeros(1)}, "text"])
def test_report_refuses_an_input_that_the_model_does_not_take(example: object) -> None:
    model = interspace(network())
    before = snapshot(model)
    with pytest.raises(errors.BatchError, match="What to do: pass an input as the model's forward takes it"):
        report(model, example)
    assert same(before, snapshot(model))


def test_loading_into_a_basis_that_became_singular_is_an_error_of_load_state_dict() -> None:
    model = interspace(network())
    model[0].parametrizations.weight[0].basis.data.fill_(1.0)
    with pytest.raises(RuntimeError, match=r"0\.weight cannot be written in its basis"):
        model.load_state_dict(network().state_dict())


def test_loading_dense_weights_into_a_basis_without_values_is_an_error_of_load_state_dict() -> None:
    with torch.device("meta"):
        model = interspace(network())
    with pytest.raises(RuntimeError, match="a basis on the meta device"):
        model.load_state_dict(network().state_dict(), assign=True)


def test_a_dense_weight_of_another_shape_is_torchs_own_error() -> None:
    model = interspace(network())
    state = network().state_dict()
    state["0.weight"] = torch.zeros(4, 3, 5, 5)
    with pytest.raises(RuntimeError, match="size mismatch for .*original"):
        model.load_state_dict(state)


def test_errors_survive_pickling() -> None:
    error = errors.SelectionError("A rule.", "no module 'convl'", "use 'conv1'")
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is type(error) and str(copied) == str(error)
    assert (copied.rule, copied.found, copied.remedy) == ("A rule.", "no module 'convl'", "use 'conv1'")


def test_an_unknown_name_is_answered_with_similar_ones() -> None:
    model = nn.Sequential()
    for name in ("head", "conv1", "conv2"):
        model.add_module(name, nn.Conv2d(1, 1, 3))
    with pytest.raises(errors.SelectionError, match="the closest are 'conv[12]', 'conv[12]'$"):
        interspace(model, layers=["convl"])


def test_plain_models_pass_through_every_verb() -> None:
    model = network()
    before = snapshot(model)
    optimizer = torch.optim.Adam(model.parameters())
    assert normalize(join_optimizer(adopt_masks(bake(model)), optimizer)) is model
    assert ip_plugin.masks(model) == {}
    assert len(ip_plugin.param_groups(model, weight_decay=0.1)) == 1
    assert same(before, snapshot(model))
    assert copy.deepcopy(model) is not model
