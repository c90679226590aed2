"""The drop-in for torch.nn.utils.prune: one pipeline, two spaces, the host's masks."""

from __future__ import annotations

import copy
import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as host

from ip_plugin import adopt_masks, bake, errors, interspace, masks, prunable, report, set_masks
from ip_plugin.adapters import Criterion, hosts
from ip_plugin.adapters import torch_prune as prune

pytestmark = pytest.mark.contract

Pairs: TypeAlias = list[tuple[nn.Module, str]]
Pipeline: TypeAlias = Callable[[Any, Pairs], None]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, (1, 3)), nn.Flatten(), nn.Linear(144, 4))


def by_name(model: nn.Module) -> Pairs:
    """What an existing pipeline prunes; it knows nothing of spaces."""
    return [(module, "weight") for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7))


class EveryOther(prune.BasePruningMethod):
    """The example of PyTorch's tutorial."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        mask.view(-1)[::2] = 0
        return mask


class EveryOtherOfTheHost(host.BasePruningMethod):
    PRUNING_TYPE = "unstructured"
    compute_mask = EveryOther.compute_mask


def each(name: str, **arguments: Any) -> Pipeline:
    def pipeline(prune: Any, pairs: Pairs) -> None:
        for module, tensor_name in pairs:
            assert getattr(prune, name)(module, tensor_name, **arguments) is module

    return pipeline


def globally(method: str, **arguments: Any) -> Pipeline:
    return lambda prune, pairs: prune.global_unstructured(pairs, getattr(prune, method), **arguments)


def scores_of(module: nn.Module, name: str) -> Tensor:
    shape = getattr(module, name).shape
    return torch.rand(shape, generator=torch.Generator().manual_seed(shape.numel()))


def custom(prune: Any, pairs: Pairs) -> None:
    for module, name in pairs:
        prune.custom_from_mask(module, name, mask=(scores_of(module, name) < 0.5).float())


def own_method(prune: Any, pairs: Pairs) -> None:
    for module, name in pairs:
        (EveryOtherOfTheHost if prune is host else EveryOther).apply(module, name)


def by_scores(prune: Any, pairs: Pairs) -> None:
    for module, name in pairs:
        prune.l1_unstructured(module, name, 0.3, importance_scores=scores_of(module, name))
        prune.ln_structured(module, name, 0.4, n=2, dim=0, importance_scores=scores_of(module, name))


def globally_by_scores(prune: Any, pairs: Pairs) -> None:
    scores = {pair: scores_of(*pair) for pair in pairs[:2]}
    prune.global_unstructured(pairs, prune.L1Unstructured, importance_scores=scores, amount=0.5)


def mixed(prune: Any, pairs: Pairs) -> None:
    globally("L1Unstructured", amount=0.3)(prune, pairs)
    each("random_structured", amount=1, dim=0)(prune, pairs)
    each("ln_structured", amount=0.4, n=1, dim=1)(prune, pairs)
    custom(prune, pairs)
    globally("RandomUnstructured", amount=10)(prune, pairs)
    each("l1_unstructured", amount=0.25)(prune, pairs)


PIPELINES: dict[str, Pipeline] = {
    "identity": each("identity"),
    "random_unstructured": each("random_unstructured", amount=0.3),
    "l1_unstructured": each("l1_unstructured", amount=0.3),
    "l1_unstructured count": each("l1_unstructured", amount=7),
    "random_structured": each("random_structured", amount=0.4, dim=0),
    "ln_structured": each("ln_structured", amount=0.5, n=2, dim=0),
    "ln_structured l1 of inputs": each("ln_structured", amount=1, n=1, dim=1),
    "ln_structured infinity": each("ln_structured", amount=2, n=math.inf, dim=0),
    "nothing": each("l1_unstructured", amount=0),
    "everything": each("l1_unstructured", amount=1.0),
    "custom_from_mask": custom,
    "own method": own_method,
    "scores": by_scores,
    "global l1": globally("L1Unstructured", amount=0.6),
    "global count": globally("L1Unstructured", amount=100),
    "global random": globally("RandomUnstructured", amount=0.6),
    "global scores": globally_by_scores,
    "mixed": mixed,
}
every_pipeline = pytest.mark.parametrize("name", PIPELINES)


def run(name: str, prune: Any, pairs: Pairs) -> None:
    torch.manual_seed(1)
    PIPELINES[name](prune, pairs)


def host_masks_of(name: str) -> dict[str, Tensor]:
    """What the host itself chooses on the plain model."""
    model = network()
    run(name, host, by_name(model))
    return masks(model)


@pytest.mark.parametrize("pairs", [by_name, prunable], ids=["conv weight", "prunable"])
@pytest.mark.parametrize("space", ["spatial", "interspace", "interspace shared"])
@every_pipeline
def test_the_masks_are_the_hosts_on_the_plain_model(name: str, space: str, pairs: Callable[..., Pairs]) -> None:
    expected = host_masks_of(name)
    model = network()
    if space != "spatial":
        interspace(model, sharing="layer" if space == "interspace" else lambda n, m: m.kernel_size)
    parameters = {id(p): p.detach().clone() for p in model.parameters()}
    run(name, prune, pairs(model))
    found = masks(model)
    assert list(found) == list(expected) == ["0", "2", "4"]
    assert all(torch.equal(found[layer], mask) for layer, mask in expected.items())
    # Nothing of the host is left; the Parameters and their values are those from before.
    assert prune.is_pruned(model) and not host.is_pruned(model)
    assert {id(p) for p in model.parameters()} == set(parameters)
    assert all(torch.equal(p, parameters[id(p)]) for p in model.parameters())


@every_pipeline
def test_the_host_itself_chooses_the_same_on_targets(name: str) -> None:
    expected = host_masks_of(name)
    model = interspace(network())
    run(name, host, list(prunable(model)))
    assert all(torch.equal(masks(model)[layer], mask) for layer, mask in expected.items())
    output = model(X)
    torch.testing.assert_close(adopt_masks(model)(X), output)


@pytest.mark.parametrize("space", ["spatial", "interspace"])
@every_pipeline
def test_pruned_models_copy_run_train_and_bake(name: str, space: str) -> None:
    model = network() if space == "spatial" else interspace(network(), basis="orthonormal")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run(name, prune, by_name(model))
    for _ in range(2):
        optimizer.zero_grad()
        model(X).sum().backward()
        optimizer.step()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), model(X))
    torch.testing.assert_close(bake(copied)(X), model(X))
    assert prune.is_pruned(model) and not prune.is_pruned(copied)
    run(name, prune, by_name(model))  # and again on top


@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_magnitudes_are_read_in_unit_gauge_and_no_parameter_changes(space: str) -> None:
    model = network()
    if space == "interspace":
        interspace(model, constraint="none")
        for index, stretch in ((0, 9.0), (2, 0.01)):
            basis = model[index].parametrizations.weight[0].basis
            basis.data *= stretch
            model[index].parametrizations.weight.original.data /= stretch
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in ("l1_unstructured", "ln_structured", "global l1"):
        expected = host_masks_of(name)
        pruned = copy.deepcopy(model)
        run(name, prune, by_name(pruned))
        assert all(torch.equal(masks(pruned)[layer], mask) for layer, mask in expected.items()), name
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_remove_makes_zeros_permanent(space: str) -> None:
    model = network() if space == "spatial" else interspace(network())
    parameters = [id(p) for p in model.parameters()]
    prune.global_unstructured(by_name(model), prune.L1Unstructured, amount=0.5)
    prune.l1_unstructured(model[0], "bias", amount=3)
    expected, nonzeros = model(X), report(model).everything.nonzeros
    for module, name in [*by_name(model), (model[0], "bias")]:
        assert prune.remove(module, name) is module
    assert not prune.is_pruned(model) and masks(model) == {}
    assert torch.equal(model(X), expected) and report(model).everything.nonzeros == nonzeros
    assert sorted(id(p) for p in model.parameters()) == sorted(parameters)
    assert type(model[4]) is nn.Linear and list(dict(model[4].named_parameters())) == ["weight", "bias"]
    assert isinstance(model[0].bias, nn.Parameter)
    with pytest.raises(errors.NotPrunedError, match="'weight' must be pruned"):
        prune.remove(model[0], "weight")


@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_a_second_pruning_goes_by_the_present_values(space: str) -> None:
    model = network() if space == "spatial" else interspace(network())
    prune.l1_unstructured(model[4], "weight", amount=100)
    model(X)
    parameter = getattr(*prunable(model)[2])
    kept = masks(model)["4"]
    with torch.no_grad():
        parameter.copy_(torch.arange(576.0).view(4, 144).flip(1))
    prune.l1_unstructured(model[4], "weight", amount=50)
    values = torch.where(kept, parameter.detach(), torch.inf)
    expected = kept & (values > values.flatten().kthvalue(50).values)
    assert torch.equal(masks(model)["4"], expected)


def test_remove_of_a_target_and_of_the_hosts_mask() -> None:
    model = interspace(network())
    host.l1_unstructured(*prunable(model)[0], amount=5)
    prune.l1_unstructured(model[4], "weight", amount=5)
    for target in (prunable(model)[0], prunable(model)[2]):
        prune.remove(*target)
    assert not prune.is_pruned(model)
    assert int((prunable(model)[0][0].original == 0).sum()) == 5
    assert int((bake(model)[4].weight == 0).sum()) == 5


@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_what_the_host_leaves_as_attributes_can_be_read(space: str) -> None:
    model = network() if space == "spatial" else interspace(network())
    original = prunable(model)[0]
    weight = getattr(*original)
    assert not hasattr(model[0], "weight_mask")
    prune.l1_unstructured(model[0], "weight", amount=10)
    assert model[0].weight_orig is weight
    assert model[0].weight_mask.dtype == torch.float32 and int((model[0].weight_mask == 0).sum()) == 10
    copied = copy.deepcopy(model)
    prune.l1_unstructured(copied[0], "weight", amount=10)
    assert [int((m[0].weight_mask == 0).sum()) for m in (model, copied)] == [10, 20]
    assert copied[0].weight_orig is not weight
    prune.remove(model[0], "weight")
    for gone in ("weight_mask", "weight_orig"):
        assert hasattr(copied[0], gone) and not hasattr(model[0], gone)
    assert not hasattr(interspace(network())[0], "weight_mask")


def test_generators_and_scores_that_are_not_contiguous() -> None:
    expected, shape = network(), network()[0].weight.shape
    scores = torch.rand(shape).to(memory_format=torch.channels_last)
    host.global_unstructured(
        by_name(expected), host.L1Unstructured, {(expected[0], "weight"): scores.contiguous()}, amount=0.5
    )
    for model in (network(), interspace(network())):
        given = {(model[0], "weight"): scores}
        prune.global_unstructured((pair for pair in by_name(model)), prune.L1Unstructured, given, amount=0.5)
        assert all(torch.equal(masks(model)[name], mask) for name, mask in masks(expected).items())
        prune.l1_unstructured(model[0], "weight", amount=5, importance_scores=scores)
        assert int((~masks(model)["0"]).sum()) == int((~masks(expected)["0"]).sum()) + 5


@pytest.mark.parametrize("space", ["spatial", "interspace"])
@every_pipeline
def test_channels_last_models_are_pruned_like_others(name: str, space: str) -> None:
    if name == "own method":
        pytest.skip("the method itself views a mask as flat")
    expected = host_masks_of(name)
    model = network().to(memory_format=torch.channels_last)
    run(name, prune, by_name(model if space == "spatial" else interspace(model)))
    assert all(torch.equal(masks(model)[layer], mask) for layer, mask in expected.items())
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_target_takes_the_scores_of_its_other_name() -> None:
    model = interspace(network())
    scores = {tuple(prunable(model)[0]): scores_of(model[0], "weight")}
    prune.global_unstructured(by_name(model)[:1], prune.L1Unstructured, scores, amount=0.5)
    expected = network()
    host.l1_unstructured(expected[0], "weight", 0.5, importance_scores=scores_of(expected[0], "weight"))
    assert torch.equal(masks(model)["0"], masks(expected)["0"])


def test_methods_of_the_host_and_of_the_user_go_into_global_pruning() -> None:
    for method in (EveryOther, EveryOtherOfTheHost):
        model = interspace(network())
        prune.global_unstructured(by_name(model), method)
        total = report(model).prunable
        assert total.nonzeros == total.parameters // 2


def test_biases_and_norms_are_pruned_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    interspace(model)
    for _ in range(2):
        prune.l1_unstructured(model[0], "bias", amount=2)
        prune.l1_unstructured(model[1], "weight", amount=2)
    model.train()(X).sum().backward()
    copied = copy.deepcopy(model)
    assert int((copied[0].bias == 0).sum()) == 4 == int((copied[1].weight == 0).sum())
    bake(model)
    assert list(dict(model.named_parameters())) == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_pruned_as_by_the_host(kind: type[nn.RNNBase]) -> None:
    expected, found = kind(3, 4), kind(3, 4)
    found.load_state_dict(expected.state_dict())
    names = list(dict(found.named_parameters()))
    x = torch.randn(5, 2, 3)
    for name in ("weight_hh_l0", "weight_ih_l0"):
        host.l1_unstructured(expected, name, amount=0.5)
        prune.l1_unstructured(found, name, amount=0.5)
        assert torch.equal(found(x)[0], expected(x)[0])
    removed = prune.remove(found, "weight_ih_l0")
    assert all(isinstance(weight, nn.Parameter) for weight in removed._flat_weights[::2])  # weight_hh_l0 is masked
    prune.remove(found, "weight_hh_l0")
    assert torch.equal(copy.deepcopy(found)(x)[0], expected(x)[0])
    assert list(dict(found.named_parameters())) == names


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_baked(kind: type[nn.RNNBase]) -> None:
    layer, x = kind(3, 4), torch.randn(5, 2, 3)
    names = list(dict(layer.named_parameters()))
    prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)
    expected = layer(x)[0]
    assert torch.equal(copy.deepcopy(bake(layer))(x)[0], expected)
    assert list(dict(layer.named_parameters())) == names


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_a_checkpoint_of_a_model_that_the_host_pruned_loads(space: str, masked: bool) -> None:
    saved = network()
    for module, name, amount in ((saved[0], "weight", 20), (saved[4], "weight", 100), (saved[4], "bias", 2)):
        host.l1_unstructured(module, name, amount)
    model = network() if space == "spatial" else interspace(network())
    prune.identity(model[4], "weight")
    prune.identity(model[4], "bias")
    if space == "spatial":
        prune.identity(model[0], "weight")
    if masked:
        prune.random_unstructured(model[0], "weight", amount=150)
    model.load_state_dict(saved.state_dict(), strict=True)
    assert torch.equal(model(X), saved(X))
    assert {name: mask.tolist() for name, mask in masks(model).items()} == {
        name: mask.tolist() for name, mask in masks(saved).items()
    }
    assert torch.equal(getattr(*prunable(model)[0]), saved[0].weight_orig)
    assert int((model[4].bias == 0).sum()) == 2


def test_a_checkpoint_of_a_model_that_the_host_pruned_does_not_fit_another_basis() -> None:
    saved = network()
    host.l1_unstructured(saved[0], "weight", 20)
    model = interspace(network(), basis="dct")
    with pytest.raises(RuntimeError, match=r"0\.weight was pruned by torch\.nn\.utils\.prune.*ip_plugin\.bake"):
        model.load_state_dict(saved.state_dict())


def test_a_weight_that_someone_else_parametrizes_stays_with_the_host() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    prune.l1_unstructured(layer.parametrizations.weight, "original", amount=3)
    assert host.is_pruned(layer) and int((layer.parametrizations.weight.original == 0).sum()) == 3


def test_our_masks_and_the_hosts_are_one_past_for_the_next_pruning() -> None:
    model = interspace(network())
    set_masks(model, {"4": torch.arange(576).view(4, 144) >= 100})
    host.custom_from_mask(*prunable(model)[2], mask=(torch.arange(576).view(4, 144) < 500).float())
    prune.l1_unstructured(model[4], "weight", amount=100)
    kept = masks(model)["4"].view(-1)
    assert not kept[:100].any() and not kept[500:].any() and int(kept.sum()) == 300


BAD: dict[str, tuple[Callable[[nn.Sequential], Any], type[Exception], str]] = {
    "too large a fraction": (
        lambda m: prune.l1_unstructured(m[0], "weight", 1.5), errors.InvalidAmountError, r"fraction in .*\n.*1\.5"
    ),
    "negative": (lambda m: prune.random_unstructured(m[4], "weight", -0.1), errors.InvalidAmountError, "-0.1"),
    "negative count": (lambda m: prune.random_structured(m[4], "weight", -1, 0), errors.InvalidAmountError, "-1"),
    "more than there is": (
        lambda m: prune.l1_unstructured(m[0], "weight", 217), errors.InvalidAmountError, "at most 216",
    ),
    "more channels than there are": (
        lambda m: prune.ln_structured(m[0], "weight", 9, 2, 0), errors.InvalidAmountError, "at most 8",
    ),
    "not a number": (
        lambda m: prune.l1_unstructured(m[0], "weight", float("nan")), errors.InvalidAmountError, "nan",
    ),
    "text": (lambda m: prune.l1_unstructured(m[0], "weight", "half"), errors.InvalidAmountError, "'half'"),
    "a bool": (lambda m: prune.l1_unstructured(m[0], "weight", True), errors.InvalidAmountError, "True"),
    "more than there is in all": (
        lambda m: prune.global_unstructured(by_name(m), prune.L1Unstructured, amount=937),
        errors.InvalidAmountError, "at most 936",
    ),
    "mask of a wrong shape": (
        lambda m: prune.custom_from_mask(m[0], "weight", torch.ones(8, 3, 9)), errors.InvalidMaskError, r"\(8, 3, 9\)",
    ),
    "no mask": (lambda m: prune.custom_from_mask(m[0], "weight", None), errors.InvalidMaskError, "NoneType"),
    "scores of a wrong shape": (
        lambda m: prune.l1_unstructured(m[0], "weight", 3, torch.ones(8, 3)), errors.InvalidScoresError, r"\(8, 3\)",
    ),
    "scores of a wrong shape in all": (
        lambda m: prune.global_unstructured(by_name(m), prune.L1Unstructured, {(m[4], "weight"): X}, amount=3),
        errors.InvalidScoresError, r"\(4, 144\).*\n.*\(2, 3, 8, 8\)",
    ),
    "nothing": (
        lambda m: prune.global_unstructured([], prune.L1Unstructured, amount=3), errors.NothingToPruneError, "empty",
    ),
    "twice": (
        lambda m: prune.global_unstructured([*by_name(m), prunable(m)[0]], prune.L1Unstructured, amount=3),
        errors.DuplicateTargetError, "given twice",
    ),
    "structured in all": (
        lambda m: prune.global_unstructured(by_name(m), prune.LnStructured, amount=3, n=2), TypeError, "unstructured",
    ),
    "scores of a wrong type": (
        lambda m: prune.global_unstructured(by_name(m), prune.L1Unstructured, [X], amount=3), TypeError, "dict",
    ),
    "unknown tensor": (lambda m: prune.l1_unstructured(m[0], "wieght", 3), AttributeError, "wieght"),
    "unknown dimension": (lambda m: prune.ln_structured(m[0], "weight", 1, 2, 7), IndexError, "ndex"),
    "a method that fails": (lambda m: Failing.apply(m[0], "weight"), ZeroDivisionError, "division"),
    "a method that fails in all": (
        lambda m: prune.global_unstructured(by_name(m), Failing), ZeroDivisionError, "division",
    ),
}  # fmt: skip


class Failing(prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        return default_mask * (1 // 0)


def state(model: nn.Module) -> Any:
    return [
        (
            name,
            type(module),
            sorted(vars(module)),
            [*module._forward_pre_hooks],
            [*module._parameters],
            [*module._buffers],
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("past", ["fresh", "ours", "host"])
@pytest.mark.parametrize("space", ["spatial", "interspace"])
@pytest.mark.parametrize("name", BAD)
def test_bad_calls_are_refused_and_change_nothing(name: str, space: str, past: str) -> None:
    model = network() if space == "spatial" else interspace(network())
    if past != "fresh":
        if "more" in name:
            pytest.skip("counts what is there when nothing is pruned")
        (prune if past == "ours" else host).global_unstructured(prunable(model), prune.L1Unstructured, amount=0.5)
    before, expected, found = state(model), model(X), masks(model)
    call, error, text = BAD[name]
    with pytest.raises(error, match=text):
        call(model)
    assert [layer[:3] for layer in state(model)] == [layer[:3] for layer in before]
    assert [sorted(map(len, layer[3:])) for layer in state(model)] == [sorted(map(len, layer[3:])) for layer in before]
    assert torch.equal(model(X), expected)
    assert list(found) == list(masks(model))
    assert all(torch.equal(masks(model)[layer], mask) for layer, mask in found.items())


def test_every_public_name_of_the_host_is_here_with_its_arguments() -> None:
    names = [n for n, v in vars(host).items() if getattr(v, "__module__", "") == host.__name__ and n[0] != "_"]
    assert sorted(names) == sorted(prune.__all__)
    for name in names:
        theirs, ours = getattr(host, name), getattr(prune, name)
        if inspect.isfunction(theirs):
            assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name
        else:
            assert issubclass(ours, theirs)
            assert inspect.signature(ours) == inspect.signature(theirs), name


def test_the_host_is_found_by_its_entry_point_and_offers_criteria() -> None:
    criteria = hosts()["torch"].load().CRITERIA
    for criterion in criteria.values():
        assert isinstance(criterion, Criterion)
        model = interspace(network())
        criterion.prune(model, 123)
        assert report(model).prunable.nonzeros == report(model).prunable.parameters - 123


def test_the_host_is_untouched_by_the_import() -> None:
    script = """
import torch.nn.utils.prune as host
before = dict(vars(host)), dict(vars(host.BasePruningMethod))
import ip_plugin.adapters.torch_prune
assert before == (dict(vars(host)), dict(vars(host.BasePruningMethod)))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
