"""prune_fitted: exact counts, smaller errors than magnitude pruning, in either space."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from kinds import KINDS
from torch import Tensor, nn

from ip_plugin import adopt_masks, bake, interspace, masks, param_groups, prunable, report, set_masks
from ip_plugin.adapters import torch_prune, torch_pruning
from ip_plugin.basis import dictionary
from ip_plugin.basis.fitting import fit
from ip_plugin.compare import builtin_criteria
from ip_plugin.core.tensor_ref import prunable_tensors
from ip_plugin.errors import (
    AmountError,
    ArgumentError,
    BatchError,
    ConversionError,
    SelectionError,
)
from ip_plugin.methods import (
    apply_masks,
    lamp,
    magnitude,
    prune,
    prune_fitted,
    reconstruct,
    reestimate_batch_norm,
    refine,
    select,
)
from ip_plugin.methods.post_training import fitted

X = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """How far the search goes is tested elsewhere."""
    monkeypatch.setattr(dictionary, "_MOST_ROUNDS", 4)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    smooth = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 4
    with torch.no_grad():
        for index in (0, 3):  # as trained ones: neighbouring weights are alike
            weight = model[index].weight
            blurred = F.conv2d(weight.flatten(0, 1)[:, None], smooth[None, None], padding=1)
            weight.copy_(blurred.reshape(weight.shape))
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {layer.module_name: layer.module.weight.detach().clone() for layer in prunable_tensors(model)}  # type: ignore[operator]


def error(model: nn.Module, original: dict[str, Tensor]) -> float:
    return sum(float((now - original[name]).square().sum()) for name, now in weights(model).items())


@pytest.mark.filterwarnings("ignore::ip_plugin.errors.LayerCollapseWarning")
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sharing", [None, "layer", "model", lambda name, module: module.kernel_size])
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 0.9, 1.0])
def test_counts_are_exact_and_the_error_is_smaller(sparsity: float, sharing: Any, scope: Any) -> None:
    model, plain = network(), network()
    original = weights(plain)
    size = sum(each.numel() for each in original.values())
    assert prune_fitted(model, sparsity=sparsity, sharing=sharing, scope=scope) is model
    assert report(model).prunable.nonzeros == size - round(sparsity * size)
    assert report(model).prunable.basis_parameters == (81 * 2 if sharing == "layer" else 81) + 625
    prune(plain, sparsity=sparsity, scope=scope)
    if 0 < sparsity < 1:
        assert error(model, original) < 0.95 * error(plain, original)
    if scope == "layer" and sparsity == 0.6:
        for name, mask in masks(model).items():
            assert int(mask.sum()) == pytest.approx(0.4 * mask.numel(), abs=1), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind: str) -> None:
    model, x = KINDS[kind].ready()
    plain = copy.deepcopy(model)
    original = weights(plain)
    prune_fitted(model, sparsity=0.5)
    prune(plain, sparsity=0.5)
    assert error(model, original) <= error(plain, original) * (1 + 1e-5)
    assert model(x).isfinite().all()
    before = model(x)
    torch.testing.assert_close(bake(model)(x), before, atol=1e-5, rtol=1e-4)


def test_a_model_in_the_interspace_gets_new_bases_where_it_has_some() -> None:
    model = interspace(network(), layers=["0", "3"], basis="orthonormal", sharing="model")
    original = weights(model)
    reference = copy.deepcopy(model)
    prune_fitted(model, sparsity=0.8)
    assert [layer.module_name for layer in prunable_tensors(model) if layer.interspace] == ["0", "3"]
    assert model[0].parametrizations.weight[0].basis is model[3].parametrizations.weight[0].basis
    apply_masks(reference, select(magnitude(reference), sparsity=0.8))
    assert error(model, original) < 0.95 * error(reference, original)


@pytest.mark.parametrize("converted", [False, True])
def test_large_kernels_are_pruned_as_weights_in_the_same_budget(converted: bool) -> None:
    model = nn.Sequential(nn.Conv2d(4, 40, (129, 1)), nn.Conv2d(40, 4, 3))
    if converted:
        interspace(model)
    with pytest.warns(UserWarning, match="at most 128 elements.*weights: '0'"):
        prune_fitted(model, sparsity=0.8)
    assert [layer.module_name for layer in prunable_tensors(model) if layer.interspace] == ["1"]
    assert masks(model).keys() == {"0", "1"}
    assert report(model).prunable.nonzeros == 22080 - round(0.8 * 22080)


def test_large_kernels_alone_are_refused() -> None:
    model = nn.Sequential(nn.Conv1d(4, 40, 129))
    with pytest.raises(SelectionError, match="only larger ones: '0'"):
        prune_fitted(model, sparsity=0.8)
    assert not masks(model)


def test_masks_of_a_model_in_the_interspace_are_applied_before() -> None:
    model = interspace(network(), layers=["0"])
    set_masks(model, {"0": torch.rand(16, 3, 3, 3) > 0.3, "9": torch.rand(3, 8) > 0.5})
    pruned = {name: tensor.clone() for name, tensor in weights(model).items()}
    prune_fitted(model, sparsity=0.5)
    assert not weights(model)["9"][pruned["9"] == 0].any()
    assert error(model, pruned) < 0.3 * sum(float(each.square().sum()) for each in pruned.values())


def test_bases_are_fitted_in_the_scope_in_which_is_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[list[int]] = []

    def watched(kernels: Any, keep: Any, **options: Any) -> Any:
        kept.append([int(mask.sum()) for mask in keep([torch.ones(10, 1), 2 * torch.ones(10, 1)])])
        return fit(kernels, keep, **options)

    monkeypatch.setattr(fitted, "fit", watched)
    for scope in ("global", "layer"):
        prune_fitted(network(), sparsity=0.5, scope=scope)  # type: ignore[arg-type]
    assert kept == [[0, 10], [5, 5]]


def test_min_per_layer_and_equal_calls() -> None:
    models = [prune_fitted(network(), sparsity=0.99, min_per_layer=2) for _ in range(2)]
    assert all(int(mask.sum()) >= 2 for mask in masks(models[0]).values())
    assert all(torch.equal(tensor, models[1].state_dict()[key]) for key, tensor in models[0].state_dict().items())


def test_the_network_can_be_fine_tuned() -> None:
    model = prune_fitted(network(), sparsity=0.8)
    before, bases = masks(model), [layer.interspace.basis for layer in prunable_tensors(model) if layer.interspace]
    assert not any(basis.requires_grad for basis in bases)
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=0.0), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0] and math.isfinite(losses[-1])
    assert all(torch.equal(mask, before[name]) for name, mask in masks(model).items())


def test_frozen_layers_get_frozen_bases_and_half_precision_stays() -> None:
    model = network().bfloat16()
    model[0].weight.requires_grad_(False)
    prune_fitted(model, sparsity=0.5, sharing="layer")
    space = model[0].parametrizations.weight[0]
    assert not space.basis.requires_grad and space.basis.dtype == torch.bfloat16


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    prune_fitted(network(), sparsity=0.5, progress=True)
    shown = capsys.readouterr().out
    assert all(f"{what} bases: round" in shown and "relative error 0." in shown for what in ("fitting", "refining"))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "scope": ({"sparsity": 0.5, "scope": "erk"}, ArgumentError, "erk"),
    "sparsity": ({"sparsity": 1.5}, AmountError, "1.5"),
    "min_per_layer": ({"sparsity": 0.99, "min_per_layer": 1000}, AmountError, "1000 for each of 5 layers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_changes_nothing(name: str) -> None:
    options, kind, text = BAD[name]
    for model in (network(), interspace(network())):
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with pytest.raises(kind, match=text):
            prune_fitted(model, **options)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_masked_convolution_of_a_plain_model_is_refused() -> None:
    model = set_masks(network(), {"0": torch.rand(16, 3, 3, 3) > 0.5})
    with pytest.raises(ConversionError, match="mask of ip_plugin"):
        prune_fitted(model, sparsity=0.9)
    assert masks(model).keys() == {"0"}


def test_the_criterion_of_studies_is_magnitude_pruning_in_the_plain_network() -> None:
    criterion: Any = builtin_criteria.CRITERIA["fitted"]
    model, reference = network(), network()
    criterion.prune(model, 3000)
    apply_masks(reference, select(magnitude(reference), count=3000, min_per_layer=1))
    assert all(torch.equal(mask, masks(reference)[name]) for name, mask in masks(model).items())
    inter = interspace(network(), basis="orthonormal", sharing="model")
    original = weights(inter)
    criterion.prune(inter, 3000)
    assert sum(int((~mask).sum()) for mask in masks(inter).values()) == 3000
    assert error(inter, original) < error(reference, original)


BATCHES = [(torch.rand(16, 3, 10, 10, generator=torch.Generator().manual_seed(n)), None) for n in range(3)]


def distance(model: nn.Module, dense: nn.Module) -> float:
    return sum(float((model.eval()(x) - dense.eval()(x)).detach().square().sum()) for x, _ in BATCHES)


@pytest.mark.parametrize("score", [magnitude, lamp])
def test_with_data_the_outputs_are_nearer_and_the_counts_as_exact(score: Any) -> None:
    dense = reestimate_batch_norm(network(), BATCHES)
    free = prune_fitted(copy.deepcopy(dense), sparsity=0.8, score=score)
    model = copy.deepcopy(dense).train()
    assert prune_fitted(model, sparsity=0.8, score=score, batches=iter(BATCHES)) is model
    assert all(module.training for module in model.modules())
    assert report(model).prunable.nonzeros == report(free).prunable.nonzeros
    once = prune_fitted(copy.deepcopy(dense), sparsity=0.8, score=score, batches=BATCHES, rounds=1)
    assert distance(model, dense) < 0.5 * distance(free, dense)
    assert distance(once, dense) < 0.7 * distance(free, dense)
    reference = copy.deepcopy(model)
    reestimate_batch_norm(reference, BATCHES)
    assert torch.equal(reference[1].running_var, model[1].running_var)


def test_by_magnitude_rounds_bring_the_outputs_nearer_than_one_does() -> None:
    nearer = 0  # by LAMP in 9 of 16 networks only
    for seed in range(4):
        dense = reestimate_batch_norm(network(seed), BATCHES)
        rounds = prune_fitted(copy.deepcopy(dense), sparsity=0.8, batches=BATCHES)
        once = prune_fitted(copy.deepcopy(dense), sparsity=0.8, batches=BATCHES, rounds=1)
        nearer += distance(rounds, dense) < distance(once, dense)
    assert nearer >= 3


def test_rounds_are_those_of_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    densities: list[float] = []

    def watched(model: Any, *rest: Any) -> Any:
        densities.append(1 - report(model).prunable.sparsity)
        return reconstruct(model, *rest)

    monkeypatch.setattr(fitted, "reconstruct", watched)
    prune_fitted(network(), sparsity=0.84, batches=BATCHES, rounds=2)
    assert densities == pytest.approx([0.4, 0.16, 0.16], abs=1e-3)  # the last time with other bases
    densities.clear()
    prune_fitted(network(), sparsity=0.84, batches=BATCHES, orthonormal=True)
    assert len(densities) == 4


def test_bases_are_refined_towards_the_dense_kernels_with_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not towards those that were fitted to the outputs meanwhile."""
    dense = reestimate_batch_norm(network(), BATCHES)
    seen: list[tuple[dict[str, Tensor], int]] = []

    def watched(model: Any, reference: Any, *, seed: int, **options: Any) -> Any:
        seen.append((weights(reference), seed))
        return refine(model, reference, seed=seed, **options)

    monkeypatch.setattr(fitted, "refine", watched)
    prune_fitted(copy.deepcopy(dense), sparsity=0.8, batches=BATCHES, seed=7)
    assert len(seen) == 1 and seen[0][1] == 7
    assert all(torch.equal(seen[0][0][name], weight) for name, weight in weights(dense).items())


@pytest.mark.parametrize("batches", [None, BATCHES])
def test_bases_are_orthonormal_and_trained_if_asked_for(batches: Any) -> None:
    dense = reestimate_batch_norm(network(), BATCHES)
    model = prune_fitted(copy.deepcopy(dense), sparsity=0.8, batches=batches)
    other = prune_fitted(copy.deepcopy(dense), sparsity=0.8, batches=batches, orthonormal=True, train_basis=True)
    counts = [{name: int(mask.sum()) for name, mask in masks(each).items()} for each in (model, other)]
    assert counts[0] == counts[1]
    if batches is None:
        assert error(model, weights(dense)) < 0.97 * error(other, weights(dense))
    for one, another in zip(prunable_tensors(model), prunable_tensors(other), strict=True):
        if one.interspace is not None and another.interspace is not None:
            basis, orthonormal = one.interspace.basis.detach(), another.interspace.basis
            torch.testing.assert_close(orthonormal @ orthonormal.mT, torch.eye(len(basis)))
            assert orthonormal.requires_grad
            assert not torch.allclose(basis @ basis.mT, torch.eye(len(basis)), atol=0.1)
            assert float(torch.linalg.matrix_norm(basis, 2)) == pytest.approx(1)


BAD_DATA: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no batches": ({"batches": []}, BatchError, "empty"),
    "no pairs": ({"batches": [X]}, BatchError, "a Tensor"),
    "inputs that it does not take": ({"batches": [*BATCHES, (X[:, :2], None)]}, RuntimeError, "channels"),
    "rounds": ({"batches": BATCHES, "rounds": 0}, ArgumentError, "`rounds`"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused_and_changes_nothing(name: str) -> None:
    options, kind, text = BAD_DATA[name]
    model = network()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(kind, match=text):
        prune_fitted(model, sparsity=0.5, **options)
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in now)


def test_infinite_values_are_refused_in_linear_layers_too() -> None:
    model = network()
    model[9].weight.data[0, 0] = math.inf
    with pytest.raises(ConversionError, match="layer '9'"):
        prune_fitted(model, sparsity=0.5)
    assert not masks(model) and not any(layer.interspace for layer in prunable_tensors(model))


@pytest.mark.parametrize("batches", [None, BATCHES])
def test_torchs_pruning_goes_on_from_a_fitted_model(batches: Any) -> None:
    model = prune_fitted(network(), sparsity=0.6, batches=batches)
    before = masks(model)
    torch_prune.global_unstructured(prunable(model), torch_prune.L1Unstructured, amount=0.5)
    after = masks(adopt_masks(model))
    size = sum(mask.numel() for mask in before.values())
    kept = size - round(0.6 * size)
    assert report(model).prunable.nonzeros == kept - round(0.5 * kept)
    assert not any((after[name] & ~mask).any() for name, mask in before.items())
    model.eval()
    outputs = model(X)
    torch.testing.assert_close(bake(model)(X), outputs, atol=1e-5, rtol=1e-4)


def test_torch_pruning_cuts_channels_of_a_fitted_model() -> None:
    model = prune_fitted(network().eval(), sparsity=0.6)
    basis = model[0].parametrizations.weight[0].basis
    importance = tp.importance.MagnitudeImportance()
    pruner = torch_pruning.pruner(
        tp.pruner.BasePruner, model, X[:1], importance=importance, pruning_ratio=0.5, ignored_layers=[model[9]]
    )
    pruner.step()
    assert model[0].weight.shape == (8, 3, 3, 3) and model[3].weight.shape == (8, 8, 3, 3)
    assert masks(model)["3"].shape == (8, 8, 3, 3)
    assert model[3].parametrizations.weight[0].basis is basis
    outputs = model(X)
    torch.testing.assert_close(bake(model)(X), outputs, atol=1e-5, rtol=1e-4)


def test_a_pruner_of_nni_goes_on_from_a_fitted_model() -> None:
    nni = pytest.importorskip("ip_plugin.adapters.nni")
    model = prune_fitted(network(), sparsity=0.5)
    pruner = nni.L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    pruner.compress()
    nni.finish(pruner)
    empty = (~masks(model)["0"]).flatten(1).all(1)
    assert int(empty.sum()) == 8
    assert model[0].parametrizations.weight[0].basis is model[3].parametrizations.weight[0].basis


def test_a_fitted_model_loads_what_was_saved() -> None:
    model = prune_fitted(network(), sparsity=0.8, batches=BATCHES).eval()
    other = interspace(network(), basis="dct", sharing="model").eval()
    set_masks(other, {"5": torch.ones(8, 16, 1, 1), "9": torch.ones(3, 8)})  # plain so far
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))
    assert report(other).prunable == report(model).prunable


@pytest.mark.parametrize("batches", [None, BATCHES])
def test_the_score_and_the_scope_decide_what_is_kept(batches: Any) -> None:
    options: list[dict[str, Any]] = [{}, {"score": lamp}, {"scope": "layer"}]
    found = [masks(prune_fitted(network(), sparsity=0.8, batches=batches, rounds=1, **each)) for each in options]
    densities = [[float(mask.float().mean()) for mask in each.values()] for each in found]
    assert densities[2] == pytest.approx([0.2] * 5, abs=0.02)
    assert abs(densities[0][-1] - densities[1][-1]) > 0.02 and abs(densities[0][-1] - 0.2) > 0.05
