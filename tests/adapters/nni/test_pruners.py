"""NNI's pruners: one pipeline, two spaces, the host's masks, and a model that is given back whole."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_host
from torch.nn.utils.parametrize import ParametrizationList

from ip_plugin import bake, errors, interspace, join_optimizer, masks, param_groups, prunable, report, set_masks
from ip_plugin.adapters.shared import batch_norms
from ip_plugin.core.tensor_ref import by_basis, parametrized_tensors

pytest.importorskip("nni")

import nni as nni_host
import nni.compression.pruning as host
from nni.compression.base.setting import PruningSetting

from ip_plugin.adapters import nni
from ip_plugin.adapters.nni.criteria import CRITERIA

pytestmark = pytest.mark.contract


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The networks are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.getLogger("nni").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, (1, 3)),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 8),
    )


LAYERS = ["0", "3", "5", "10"]
X = torch.randn(60, 1, 6, 6, generator=torch.Generator().manual_seed(7))
Y = torch.arange(60) % 8


def step(batch: Any, model: nn.Module) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def loop(
    model: nn.Module,
    optimizer: Any,
    training_step: Callable[..., Tensor],
    schedulers: Any = None,
    steps: int | None = None,
    epochs: int | None = None,
) -> None:
    """A user's training function, as `TorchEvaluator` takes it."""
    done = 0
    for _ in range(epochs or 100):
        for index in torch.arange(60).split(10):
            optimizer.zero_grad()
            training_step((X[index], Y[index]), model).backward()
            optimizer.step()
            done += 1
            if steps and done >= steps:
                return


def evaluator(model: nn.Module, **options: Any) -> Any:
    optimizer = nni_host.trace(torch.optim.SGD)(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})
    return nni.TorchEvaluator(loop, optimizer, step)


ALL = {"op_types": ["Conv2d", "Linear"]}
HALF = [{**ALL, "sparse_ratio": 0.5}]


def aligned(source: str, *dims: int) -> dict[str, Any]:
    return {"align": {"module_name": source, "target_name": "weight", "dims": list(dims)}}


OUT = {"granularity": "out_channel"}
#: {what it is about: config list}
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "types": HALF,
    "names": [{"op_names": ["0", "10"], "sparse_ratio": 0.25}, {"op_names": ["3"], "sparse_ratio": 0.75}],
    "regular expressions": [
        {"op_names_re": ["[03]$"], "sparse_ratio": 0.5},
        {"op_names_re": ["1.*"], "op_types": ["Linear"], "sparse_ratio": 0.25},
    ],
    "names and types": [{"op_names_re": [".*"], "op_types": ["Conv2d"], "sparse_ratio": 0.5}],
    "excluded": [{**ALL, "exclude_op_names": ["5"], "exclude_op_names_re": ["1.$"], "sparse_ratio": 0.5}],
    "excluded types": [{"op_names": LAYERS, "exclude_op_types": ["Linear"], "sparse_ratio": 0.5}],
    "weights only": [{**ALL, "target_names": ["weight"], "sparse_ratio": 0.5}],
    "settings by target": [
        {
            "op_names": ["3", "5", "10"],
            "target_names": ["weight", "bias"],
            "target_settings": {"weight": {"sparse_ratio": 0.5, "granularity": "in_channel"}},
        }
    ],
    "threshold": [{**ALL, "sparse_threshold": 0.3, "min_sparse_ratio": 0.125, "max_sparse_ratio": 0.75}],
    "default granularity": [{**ALL, "sparse_ratio": 0.5, "granularity": "default"}],
    "out_channel": [{**ALL, "sparse_ratio": 0.5, **OUT}],
    "blocks": [
        {"op_names": ["10"], "sparse_ratio": 0.5, "granularity": [2, 4]},
        {"op_names": ["3"], "target_names": ["weight"], "sparse_ratio": 0.5, "granularity": [[2, 4], "back", -1]},
    ],
    "first entry wins": [{"op_names": ["3"], "sparse_ratio": 0.25}, {**ALL, "sparse_ratio": 0.5}],
    "global": [{**ALL, "sparse_ratio": 0.5, "global_group_id": "a", "max_sparse_ratio": 0.75}],
    "two groups": [
        {"op_names": ["0", "5"], "sparse_ratio": 0.5, "global_group_id": 1},
        {"op_names": ["3", "10"], "sparse_ratio": 0.25, "global_group_id": 2},
    ],
    "dependency": [
        {"op_names": ["0", "5"], "sparse_ratio": 0.5, "dependency_group_id": 1, "internal_metric_block": 2, **OUT},
        {"op_names": ["3"], "sparse_ratio": 0.25},
    ],
    "alignment": [
        {"op_names": ["0"], "sparse_ratio": 0.5, **OUT},
        {"op_names": ["1"], "target_settings": {"weight": aligned("0", 0), "bias": aligned("0", 0)}},
        {"op_names": ["5"], "target_names": ["bias"], "target_settings": {"bias": aligned("0", 0)}},
    ],
    "legacy": [{**ALL, "sparsity": 0.5}, {"op_names": ["5"], "exclude": True}],
    "legacy per layer": [{**ALL, "sparsity_per_layer": 0.25, "max_sparsity_per_layer": 0.5}],
    "legacy partial names": [{"op_partial_names": ["0"], **ALL, "sparsity": 0.5}],
}


def compressed(pruner: Any, *arguments: Any) -> dict[str, dict[str, Tensor]]:
    _, found = pruner.compress(*arguments)
    return {layer: {t: m for t, m in each.items() if m is not None} for layer, each in found.items()}


def once(name: str) -> Callable[[Any, nn.Module, Any], Any]:
    def pipeline(m: Any, model: nn.Module, entries: Any) -> Any:
        pruner = getattr(m, name)(model, entries)
        return pruner, compressed(pruner)

    return pipeline


def slim(m: Any, model: nn.Module, entries: Any) -> Any:
    pruner = m.SlimPruner(model, entries, evaluator(model), training_steps=4, regular_scale=0.1)
    return pruner, compressed(pruner)


def taylor(m: Any, model: nn.Module, entries: Any) -> Any:
    pruner = m.TaylorPruner(model, entries, evaluator(model), training_steps=4)
    return pruner, compressed(pruner)


def movement(m: Any, model: nn.Module, entries: Any) -> Any:
    pruner = m.MovementPruner(model, entries, evaluator(model), warmup_step=1, cooldown_begin_step=4)
    return pruner, compressed(pruner, 6, None)


def scheduled(kind: str, inner: str) -> Callable[[Any, nn.Module, Any], Any]:
    def pipeline(m: Any, model: nn.Module, entries: Any) -> Any:
        arguments = {"training_steps": 2} if inner in ("TaylorPruner", "SlimPruner") else {}
        bound = getattr(m, inner)(model, entries, evaluator=evaluator(model), **arguments)
        pruner = getattr(m, kind)(bound, 2, 3)
        return pruner, compressed(pruner, 8, None)

    return pipeline


DATA_FREE = {name: once(name) for name in ("LevelPruner", "L1NormPruner", "L2NormPruner", "FPGMPruner")}
TRAINED = {"SlimPruner": slim, "TaylorPruner": taylor, "MovementPruner": movement}
INNER = ["LevelPruner", "L1NormPruner", "L2NormPruner", "FPGMPruner", "SlimPruner", "TaylorPruner"]
SCHEDULED = {f"{kind} {inner}": scheduled(kind, inner) for kind in ("LinearPruner", "AGPPruner") for inner in INNER}
PIPELINES = {**DATA_FREE, **TRAINED, **SCHEDULED}


def same_masks(first: Any, second: Any) -> bool:
    return sorted(first) == sorted(second) and all(
        sorted(first[layer]) == sorted(second[layer])
        and all(torch.equal(mask, second[layer][name]) for name, mask in first[layer].items())
        for layer in first
    )


def agree(pipeline: Any, entries: Any, **options: Any) -> nn.Module:
    """NNI on the plain model and the adapter in the interspace choose the same; returns the model, finished."""
    torch.manual_seed(1)
    _, expected = pipeline(host, network(), copy.deepcopy(entries))
    model = interspace(network(), **options)
    before = {name: id(p) for name, p in model.named_parameters()}
    torch.manual_seed(1)
    pruner, found = pipeline(nni, model, copy.deepcopy(entries))
    assert same_masks(found, expected)
    assert any(not bool(mask.all()) for each in expected.values() for mask in each.values())
    assert nni.finish(pruner) is model
    # The masks of weights are ours now; where the host chose all of a tensor to stay there is none.
    chosen = {layer: each["weight"] != 0 for layer, each in expected.items() if "weight" in each}
    chosen = {layer: mask for layer, mask in chosen.items() if layer in LAYERS and not bool(mask.all())}
    kept = masks(model)
    assert sorted(kept) == sorted(chosen)
    assert all(torch.equal(mask, chosen[layer]) for layer, mask in kept.items())
    assert ordinary(model)
    after = {id(p) for p in model.parameters()}
    assert after == set(before.values())
    return model


def ordinary(model: nn.Module) -> bool:
    """Nothing of NNI is left."""
    return not any("_nni_wrapper" in module._modules or "forward" in vars(module) for module in model.modules())


# FPGM's scores are sums, and above any threshold that prunes by the other scores.
CASES = [(name, config) for name in DATA_FREE for config in CONFIGS if (name, config) != ("FPGMPruner", "threshold")]


@pytest.mark.parametrize("sharing", ["layer", "model"])
@pytest.mark.parametrize(("name", "config"), CASES)
def test_data_free_pruners_choose_the_hosts_masks(name: str, config: str, sharing: Any) -> None:
    agree(DATA_FREE[name], CONFIGS[config], sharing=sharing)


@pytest.mark.parametrize("config", ["types", "settings by target", "two groups", "alignment"])
@pytest.mark.parametrize("name", TRAINED)
def test_training_pruners_choose_the_hosts_masks_while_the_basis_is_frozen(name: str, config: str) -> None:
    model = agree(TRAINED[name], CONFIGS[config], train_basis=False)
    assert torch.equal(model[0].parametrizations.weight[0].basis, torch.eye(9))


@pytest.mark.parametrize("name", SCHEDULED)
def test_scheduled_pruners_choose_the_hosts_masks_while_the_basis_is_frozen(name: str) -> None:
    agree(SCHEDULED[name], HALF, train_basis=False)


@pytest.mark.parametrize("name", PIPELINES)
def test_on_a_plain_model_every_pruner_is_the_hosts(name: str) -> None:
    torch.manual_seed(1)
    reference = network()
    theirs, expected = PIPELINES[name](host, reference, HALF)
    theirs.unwrap_model()
    model = network()
    parameters = {n: id(p) for n, p in model.named_parameters()}
    torch.manual_seed(1)
    pruner, found = PIPELINES[name](nni, model, HALF)
    assert same_masks(found, expected)
    if "Slim" not in name:  # whose factors `finish` multiplies in
        pruner.unwrap_model()
        assert {n: id(p) for n, p in model.named_parameters()} == parameters
        assert all(torch.equal(p, q) for (_, p), (_, q) in zip(model.named_parameters(), sorted_like(reference, model)))
    nni.finish(pruner)
    assert ordinary(model) and [id(p) for p in bake(model).parameters()] == list(parameters.values())


def sorted_like(model: nn.Module, other: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The host puts its new Parameters last."""
    found = dict(model.named_parameters())
    return [(name, found[name]) for name, _ in other.named_parameters()]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pruner_trains_and_keeps_the_hosts_counts(name: str) -> None:
    """With bases that train along the choice may differ; how much is pruned in each layer does not."""
    torch.manual_seed(1)
    _, expected = PIPELINES[name](host, network(), HALF)
    model = interspace(network())
    torch.manual_seed(1)
    pruner, found = PIPELINES[name](nni, model, HALF)
    counts = {layer: {t: int(mask.sum()) for t, mask in each.items()} for layer, each in found.items()}
    assert counts == {layer: {t: int(mask.sum()) for t, mask in each.items()} for layer, each in expected.items()}
    nni.finish(pruner)
    basis = model[0].parametrizations.weight[0].basis
    assert torch.equal(basis, torch.eye(9)) == (name in DATA_FREE)


def moved(model: nn.Sequential) -> nn.Sequential:
    """In the interspace, with bases that are neither orthonormal nor of unit norms."""
    for layer in ("0", "3"):
        n = model.get_submodule(layer).weight.shape[2:].numel()  # type: ignore[union-attr, operator]
        generator = torch.Generator().manual_seed(n)
        interspace(
            model, layers=[layer], constraint="none",
            basis=torch.diag(torch.arange(1.0, n + 1)) + torch.rand(n, n, generator=generator),
        )  # fmt: skip
    return model


@pytest.mark.parametrize("config", ["types", "global", "dependency", "out_channel"])
@pytest.mark.parametrize("name", DATA_FREE)
def test_magnitudes_are_read_in_unit_gauge(name: str, config: str) -> None:
    model = moved(network())
    values = {n: p.detach().clone() for n, p in by_plain_names(model)}
    reference = network()
    for layer in ("0", "3"):
        chain = model.get_submodule(layer).parametrizations.weight  # type: ignore[union-attr]
        norms = chain[0].basis.norm(dim=1).reshape(chain.original.shape[2:])  # type: ignore[union-attr, operator, index]
        reference.get_submodule(layer).weight.data = chain.original.detach() * norms  # type: ignore[union-attr, operator]
    _, expected = DATA_FREE[name](host, reference, CONFIGS[config])
    raw = network()
    for layer in ("0", "3"):
        raw.get_submodule(layer).weight.data = values[f"{layer}.parametrizations.weight.original"]  # type: ignore[union-attr]
    assert not same_masks(DATA_FREE[name](host, raw, CONFIGS[config])[1], expected)
    pruner, found = DATA_FREE[name](nni, model, CONFIGS[config])
    assert same_masks(found, expected)
    nni.finish(pruner)
    left = dict(by_plain_names(model))
    assert all(torch.equal(left[n], value) for n, value in values.items())


def by_plain_names(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters by the names that they have without masks on spatial tensors."""
    spatial = {
        f"{each.module_name}.parametrizations.{each.tensor_name}.original": f"{each.module_name}.{each.tensor_name}"
        for each in parametrized_tensors(model)
        if not hasattr(each.parametrization, "basis")
    }
    for name, parameter in model.named_parameters():
        yield spatial.get(name, name), parameter


@pytest.mark.parametrize("name", ["TaylorPruner", "MovementPruner", "SlimPruner"])
def test_scores_made_of_gradients_do_not_depend_on_the_gauge(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, closure=None: None)

    def chosen(scaled: bool) -> Any:
        model = interspace(network(), layers=["0"], train_basis=False, constraint="none")
        if scaled:  # by powers of two, so that rounding is the same
            space, scale = model[0].parametrizations.weight, 2.0 ** torch.arange(-4, 5)
            space.original.data.div_(scale.reshape(3, 3))
            space[0].basis.data.mul_(scale[:, None])
        return TRAINED[name](nni, model, [{"op_names": ["0"], "sparse_ratio": 0.5, "target_names": ["weight"]}])[1]

    assert same_masks(chosen(True), chosen(False))


# --- What `finish` gives back ---------------------------------------------------------------------------------------


def without_norms() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, (1, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("space", ["spatial", "interspace"])
@pytest.mark.parametrize("name", PIPELINES)
def test_the_finished_model_computes_what_the_wrapped_one_computed(name: str, space: str) -> None:
    model = without_norms()
    parameters = [(n, id(p)) for n, p in model.named_parameters()]
    if space == "interspace":
        for layer, n in {"0": 9, "2": 3}.items():
            interspace(model, layers=[layer], basis=torch.eye(n) + 0.3 * torch.rand(n, n))
    pruner, _ = PIPELINES[name](nni, model, HALF)
    expected = model(X).detach()
    nni.finish(pruner)
    assert torch.allclose(model(X), expected, atol=1e-6)
    assert ordinary(model)
    baked = bake(copy.deepcopy(model))
    assert torch.allclose(baked(X), expected, atol=1e-6)
    assert [(n, id(p)) for n, p in bake(model).named_parameters()] == parameters


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    loop(model, optimizer, step, steps=steps)


def test_a_finished_model_trains_copies_saves_and_loads() -> None:
    model = interspace(network(), basis="orthonormal", sharing="model")
    pruner, _ = once("LevelPruner")(nni, model, [{**ALL, "sparse_ratio": 0.5, "global_group_id": 1}])
    nni.finish(pruner)
    kept = masks(model)
    total = sum(mask.numel() for mask in kept.values())
    assert sum(int((~mask).sum()) for mask in kept.values()) == total // 2 == report(model).prunable.parameters // 2

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, torch.optim.SGD(param_groups(model, weight_decay=1e-2), lr=0.1, momentum=0.9))
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    output = model.eval()(X)
    copied = copy.deepcopy(model)
    for layer, mask in kept.items():  # nothing behind a mask counts
        where = dict(zip(kept, prunable(copied)))[layer]
        getattr(*where).data[~mask] = 1e6
    assert torch.equal(copied(X), output)

    fresh = interspace(network(), basis="orthonormal", sharing="model")
    set_masks(fresh, {layer: torch.ones_like(mask) for layer, mask in kept.items()})
    biases = [key for key in model.state_dict() if key.endswith("bias.original")]
    assert not biases  # no bias was masked
    fresh.load_state_dict(model.state_dict())
    assert torch.allclose(fresh.eval()(X), output, atol=1e-6)
    assert torch.allclose(bake(model)(X), output, atol=1e-5)


def smaller(model: nn.Sequential, left: Tensor) -> nn.Sequential:
    """The network of `grown` without the channels of its first convolution that are not left."""
    plain = bake(copy.deepcopy(model)).eval()
    conv, norm, after = plain[0], plain[1], plain[3]
    conv.weight, conv.bias = nn.Parameter(conv.weight[left]), nn.Parameter(conv.bias[left])
    for name in ("weight", "bias"):
        if getattr(norm, name) is not None:
            setattr(norm, name, nn.Parameter(getattr(norm, name)[left]))
    norm.running_mean, norm.running_var = norm.running_mean[left], norm.running_var[left]
    after.weight = nn.Parameter(after.weight[:, left])
    return plain


@pytest.mark.parametrize("targets", [None, ["weight"]])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_channels_that_are_masked_whole_are_gone(space: str, affine: bool, targets: list[str] | None) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, affine=affine), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(32, 8))
    if space == "interspace":
        interspace(model, basis="orthonormal")
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=6)
    entry = {"op_names": ["0"], "sparse_ratio": 0.5, **({"target_names": targets} if targets else {})}
    pruner, _ = once("L2NormPruner")(nni, model, [entry])
    wrapped = model.eval()(X)
    nni.finish(pruner)
    left = masks(model)["0"].flatten(1).any(1)
    assert int(left.sum()) == 4
    assert torch.allclose(model(X), smaller(model, left)(X), atol=1e-5)
    assert not torch.allclose(model(X), wrapped, atol=1e-3)  # the BatchNorm made constants of them
    assert not torch.any(model[1](model[0](X))[:, ~left])
    train(model.train(), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1))
    assert not torch.any(model.eval()[1](model[0](X))[:, ~left])
    assert torch.allclose(model(X), smaller(model, left)(X), atol=1e-5)


def test_transposed_and_grouped_layers_lose_the_biases_of_their_output_channels() -> None:
    torch.manual_seed(0)
    model = interspace(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2)))
    # The first's dimension 1 is one of its three output channels in both of its groups.
    pruner, _ = once("L1NormPruner")(
        nni,
        model,
        [
            {"op_names": ["0"], "target_names": ["weight"], "sparse_ratio": 0.4, "granularity": "in_channel"},
            {"op_names": ["2"], "target_names": ["weight"], "sparse_ratio": 0.5},
        ],
    )
    nni.finish(pruner)
    (gone,) = (~masks(model)["0"].any(3).any(2).any(0)).nonzero().flatten().tolist()
    biases = model[0].parametrizations.bias[0].mask
    assert biases.tolist() == [channel % 3 != gone for channel in range(6)]
    y = torch.randn(2, 4, 5, 5)
    assert not torch.any(model[0](y)[:, [gone, gone + 3]])
    assert torch.equal(model[2].parametrizations.bias[0].mask, masks(model)["2"].flatten(1).any(1))


def test_unstructured_masks_leave_biases_and_norms_as_the_host_does() -> None:
    model = interspace(network())
    model[0].parametrizations.weight.original.data[2] *= 1e-6
    entries = [{"op_names": ["0"], "target_names": ["weight"], "sparse_ratio": 0.5}]
    pruner, _ = once("LevelPruner")(nni, model, entries)
    nni.finish(pruner)
    assert not bool(masks(model)["0"][2].any())
    assert [(each.module_name, each.tensor_name) for each in parametrized_tensors(model) if each.mask is not None] == [
        ("0", "weight")
    ]


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x if x.sum() > 0 else -x))


def test_a_model_that_cannot_be_traced_keeps_its_norms_and_says_so() -> None:
    model = interspace(Branching())
    pruner, _ = once("L1NormPruner")(nni, model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    with pytest.warns(UserWarning, match="cannot be traced.*layers conv"):
        nni.finish(pruner)
    assert not nn.utils.parametrize.is_parametrized(model.norm)
    assert int(masks(model)["conv"].flatten(1).any(1).sum()) == 4


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sole, self.shared, self.again, self.late, self.aux = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(5))
        self.norm_sole, self.norm_shared, self.norm_again, self.norm_late, self.norm_aux = (
            nn.BatchNorm2d(4) for _ in range(5)
        )
        self.seen: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_sole(F.relu(self.sole(x)))
        y = self.shared(x)
        x = self.norm_shared(y) + y
        x = self.norm_again(self.again(self.norm_again(self.again(x))))
        self.seen = x
        y = self.late(x)
        return self.norm_late(y) + self.norm_aux(self.aux(x)) if self.training else y


def test_only_a_norm_that_is_the_sole_consumer_follows() -> None:
    model = Residual()
    names = ["sole", "shared", "again", "late", "aux"]
    assert batch_norms.following(model, names) == {"sole": "norm_sole", "aux": "norm_aux"}
    assert batch_norms.following(interspace(model), names) == {"sole": "norm_sole", "aux": "norm_aux"}
    assert model.seen is None and model.training
    assert batch_norms.following(model, ["shared"]) == {}


# --- Optimizers -----------------------------------------------------------------------------------------------------


def named(model: nn.Module) -> Any:
    """Parameters with their names, where optimizers take those (torch 2.6)."""
    taken = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)
    return model.named_parameters() if taken else model.parameters()


@pytest.mark.parametrize("space", ["spatial", "interspace"])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_of_the_wrapped_model_goes_on(cls: Any, space: str) -> None:
    def model() -> nn.Sequential:
        return interspace(without_norms(), basis="dct") if space == "interspace" else without_norms()

    options = {"lr": 0.01, **({"momentum": 0.9} if cls is torch.optim.SGD else {})}

    def run(finished: bool) -> Tensor:
        network = model()
        pruner, _ = once("L1NormPruner")(nni, network, HALF)
        optimizer = cls(named(network), **options)
        train(network, optimizer)
        if finished:
            nni.finish(pruner, optimizer)
            assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in network.parameters()}
            assert set(optimizer.state) == set(network.parameters())
            names = [name for group in optimizer.param_groups for name in group.get("param_names", [])]
            assert not any("_nni" in name for name in names)
        train(network, optimizer)
        return network(X).detach()

    assert torch.allclose(run(finished=True), run(finished=False), atol=1e-5)


def test_an_optimizer_from_before_the_pruner_goes_on() -> None:
    model = without_norms()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    join_optimizer(interspace(model), optimizer)
    state = {id(p): s["momentum_buffer"].clone() for p, s in optimizer.state.items()}
    pruner, _ = taylor(nni, model, HALF)
    nni.finish(pruner, optimizer)
    assert all(torch.equal(s["momentum_buffer"], state[id(p)]) for p, s in optimizer.state.items())
    before = model(X).detach()
    train(model, optimizer)
    assert not torch.allclose(model(X), before)


@pytest.mark.parametrize("name", ["MovementPruner", "SlimPruner"])
def test_parameters_that_were_the_pruners_own_leave_the_optimizer(name: str) -> None:
    model = interspace(network())
    pruner, _ = TRAINED[name](nni, model, HALF)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    assert len(optimizer.param_groups[0]["params"]) > len(list(network().parameters())) + 2
    nni.finish(pruner, optimizer)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} <= {id(p) for p in model.parameters()}


def traced(parameters: Any, **options: Any) -> Any:
    return nni_host.trace(torch.optim.SGD)(parameters, lr=0.1, **options)


@pytest.mark.parametrize("sharing", ["layer", "model"])
@pytest.mark.parametrize("built", ["before", "after", "groups", "by keyword"])
def test_bases_train_along_wherever_the_optimizer_was_built(built: str, sharing: Any) -> None:
    model = network()
    seen: list[Any] = []

    def watching(model: nn.Module, optimizer: Any, *rest: Any) -> None:
        seen.append(optimizer)
        loop(model, optimizer, *rest)

    optimizer = traced(model.parameters(), momentum=0.9) if built == "before" else None
    interspace(model, sharing=sharing)
    if built == "after":
        optimizer = traced(model.parameters(), momentum=0.9)
    elif built == "groups":
        optimizer = traced(param_groups(model, weight_decay=1e-2), momentum=0.9)
    elif built == "by keyword":
        optimizer = nni_host.trace(torch.optim.SGD)(params=[prunable(model)[0][0].original], lr=0.1, momentum=0.9)
    bases = {id(basis): basis for basis in by_basis(parametrized_tensors(model))}
    pruner = nni.TaylorPruner(model, HALF, nni.TorchEvaluator(watching, optimizer, step), training_steps=3)
    pruner.compress()
    params = [p for group in seen[0].param_groups for p in group["params"]]
    assert len({id(p) for p in params}) == len(params)
    first = list(bases)[:1]
    assert [i for i in bases if i in {id(p) for p in params}] == (first if built == "by keyword" else list(bases))
    if built == "groups":
        assert {id(p) for p in seen[0].param_groups[1]["params"]} == set(bases)
        assert seen[0].param_groups[1]["weight_decay"] == 0
    trained = [not torch.equal(basis, torch.eye(len(basis))) for basis in bases.values()]
    assert trained[0] and (all(trained) or built == "by keyword")


def test_a_frozen_basis_stays_out_of_the_optimizer() -> None:
    model = network()
    optimizer = traced(model.parameters())
    interspace(model, train_basis=False)
    pruner = nni.LevelPruner(model, HALF, nni.TorchEvaluator(loop, optimizer, step))
    pruner.evaluator.bind_model(model, pruner._get_param_names_map())
    (group,) = pruner.evaluator._optimizers[0].param_groups
    assert len(group["params"]) == len(list(network().parameters()))
    nni.finish(pruner)  # though the evaluator still holds the model
    assert pruner.evaluator.model is None


def test_an_evaluator_that_only_the_schedule_has_trains_what_is_pruned() -> None:
    """With the host's own classes the optimizer would hold none of the pruned tensors."""
    model = interspace(network())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = evaluator(model)
    pruner = nni.AGPPruner(nni.LevelPruner(model, HALF), 2, 2, trainer)
    pruner.compress(5, None)
    nni.finish(pruner)
    assert all(not torch.equal(p, before[n]) for n, p in by_plain_names(model) if n.endswith(("basis", "original")))


# --- Masks that are there, masks by name ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_masks_of_ours_hold(name: str) -> None:
    model = interspace(network())
    before = {layer: torch.rand(getattr(*where).shape) < 0.75 for layer, where in zip(LAYERS, prunable(model))}
    set_masks(model, before)
    reference = model(X).detach()
    pruner, _ = PIPELINES[name](nni, model, [{**ALL, "target_names": ["weight"], "sparse_ratio": 0.25}])
    if name in DATA_FREE:
        pruner.update_masks({layer: {"weight": torch.ones_like(mask)} for layer, mask in before.items()})
        assert torch.allclose(model(X), reference, atol=1e-5)
    nni.finish(pruner)
    assert all(not bool((mask & ~before[layer]).any()) for layer, mask in masks(model).items())


def test_masked_entries_are_the_first_to_be_chosen() -> None:
    model = interspace(network())
    model[3].parametrizations.weight.original.data[0] = 0.0
    kept = {"3": torch.arange(192).reshape(8, 8, 1, 3) % 4 != 0}
    set_masks(model, kept)
    pruner, _ = once("LevelPruner")(nni, model, [{"op_names": ["3"], "target_names": ["weight"], "sparse_ratio": 0.25}])
    nni.finish(pruner)
    assert torch.equal(masks(model)["3"], kept["3"])
    pruner, _ = once("LevelPruner")(nni, model, [{"op_names": ["3"], "target_names": ["weight"], "sparse_ratio": 0.5}])
    nni.finish(pruner)
    assert int(masks(model)["3"].sum()) == 96


def test_masks_are_read_and_set_by_the_plain_models_names() -> None:
    model = interspace(network())
    pruner = nni.LevelPruner(model, HALF)
    assert {layer: tuple(each) for layer, each in pruner.get_masks().items()} == dict.fromkeys(
        LAYERS, ("weight", "bias")
    )
    mine = torch.rand(8, 1, 3, 3) < 0.5
    pruner.update_masks({"0": {"weight": mine, "bias": torch.arange(8) > 3}})
    assert torch.equal(pruner.get_masks()["0"]["weight"], mine.float())
    nni.finish(pruner)
    assert torch.equal(masks(model)["0"], mine)
    assert model[0].bias.tolist() == [*[0.0] * 4, *model[0].bias[4:].tolist()]


def test_masks_of_outputs_follow_the_coefficients() -> None:
    setting = {**aligned(None, 0), "granularity": "per_channel", "apply_method": "mul"}  # type: ignore[arg-type]
    entries = [
        {
            "op_names": ["0"],
            "target_names": ["weight", "_output_"],
            "target_settings": {"weight": {"sparse_ratio": 0.5}, "_output_": setting},
        }
    ]

    def chosen(m: Any, model: nn.Module) -> Any:
        pruner = m.L1NormPruner(model, entries)
        pruner.track_forward(X)
        return pruner, compressed(pruner)

    _, expected = chosen(host, network())
    model = interspace(network())
    pruner, found = chosen(nni, model)
    # The host gives no initial mask to outputs, so it is the chosen one that is kept.
    assert same_masks(found, expected)
    assert int((model[0](X).detach().abs().sum((0, 2, 3)) == 0).sum()) == 4
    nni.finish(pruner)
    assert int((model[0](X).detach().abs().sum((0, 2, 3)) == 0).sum()) == 4


# --- The config list ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_list_is_left_alone_on_a_plain_model_and_the_second_time(config: str) -> None:
    entries = CONFIGS[config]
    before = copy.deepcopy(entries)
    assert nni.config_list(network(), entries) is entries
    model = interspace(network())
    reaching = nni.config_list(model, entries)
    assert entries == before and reaching != entries
    again = nni.config_list(model, reaching)
    assert [e["op_names"] for e in again] == [e["op_names"] for e in reaching]
    # In the host's own class it chooses what the adapter's chooses.
    model, other = interspace(network()), interspace(network())
    theirs = host.L1NormPruner(model, list(nni.config_list(model, entries)))
    theirs.compress()
    mine, _ = once("L1NormPruner")(nni, other, entries)
    nni.finish(theirs)
    nni.finish(mine)
    assert sorted(masks(model)) == sorted(masks(other))
    assert all(torch.equal(mask, masks(other)[layer]) for layer, mask in masks(model).items())
    assert ordinary(model)


def test_settings_that_a_user_registered_for_a_class_reach_its_coefficients() -> None:
    class OwnConv(nn.Conv2d):
        pass

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(OwnConv(3, 8, 3), nn.Conv2d(8, 8, 3))

    weight = {"sparse_ratio": 0.25, "granularity": [[4, 1], "back", -1], "global_group_id": None, "apply_method": "mul"}
    PruningSetting.register("OwnConv", {"weight": weight})
    entries = [{"op_types": ["OwnConv"]}, {"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    _, expected = once("L1NormPruner")(host, model(), entries)
    _, found = once("L1NormPruner")(nni, interspace(model()), entries)
    assert same_masks(found, expected) and int(found["0"]["weight"].sum()) == 216 - 36  # one of six blocks


@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_what_the_host_refuses_is_refused(space: str) -> None:
    model = interspace(network()) if space == "interspace" else network()
    before = snapshot(model)
    with pytest.raises(AssertionError, match="ReLU is not registered"):
        nni.LevelPruner(model, [{"op_types": ["ReLU"], "sparse_ratio": 0.5}])
    with pytest.raises(Exception, match="group_id|Wrong key"):
        nni.LevelPruner(model, [{**ALL, "total_sparsity": 0.5}])  # the host refuses what it makes of its own old key
    with pytest.raises(Exception, match="spars_ratio"):
        nni.LevelPruner(model, [{**ALL, "spars_ratio": 0.5}])
    assert same(snapshot(model), before)


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        name: (
            type(m),
            sorted(vars(m)),
            list(m._modules),
            {n: (id(p), p.detach().clone()) for n, p in m._parameters.items() if p is not None},
            list(m._buffers),
        )
        for name, m in model.named_modules()
    }


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return list(first) == list(second) and all(
        a[:3] == b[:3]
        and list(a[3]) == list(b[3])
        and a[4] == b[4]
        and all(a[3][n][0] == b[3][n][0] and torch.equal(a[3][n][1], b[3][n][1]) for n in a[3])
        for a, b in zip(first.values(), second.values())
    )


Refused = tuple[Callable[[nn.Module], Any], type[Exception], str | None]
REFUSED: dict[str, Refused] = {
    "a type that is not there": (
        lambda m: nni.LevelPruner(m, [*HALF, {"op_types": ["Conv3d"], "sparse_ratio": 0.5}]),
        errors.SelectionError,
        r"no module of the model for \{'op_types': \['Conv3d'\]",
    ),
    "a regular expression that matches nothing": (
        lambda m: nni.config_list(m, [{"op_names_re": ["layer.*"], "sparse_ratio": 0.5}]),
        errors.SelectionError,
        "layer",
    ),
    "everything excluded": (
        lambda m: nni.config_list(m, [{"op_names": ["0"], "exclude_op_types": ["Conv2d"], "sparse_ratio": 0.5}]),
        errors.SelectionError,
        "exclude_op_types",
    ),
    "a name that is not there": (
        lambda m: nni.config_list(m, [{"op_names": ["0", "00"], "sparse_ratio": 0.5}]),
        errors.SelectionError,
        "no module '00' for",
    ),
    "arguments that the host refuses late": (
        lambda m: nni.MovementPruner(m, HALF, evaluator(m), warmup_step=3, cooldown_begin_step=1),
        AssertionError,
        None,
    ),
    "a granularity that the host refuses late": (
        lambda m: nni.LevelPruner(m, [{**ALL, "sparse_ratio": 0.5, "granularity": "per_channel"}]),
        AssertionError,
        None,
    ),
    "not a pruner": (lambda m: nni.finish(m), errors.HostError, "a Sequential"),
}


@pytest.mark.parametrize("space", ["spatial", "interspace"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_call_that_is_refused_changes_nothing(name: str, space: str) -> None:
    call, error, message = REFUSED[name]
    model = interspace(network()) if space == "interspace" else network()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        call(model)
    assert same(snapshot(model), before)


@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_finish_refuses_and_changes_nothing(space: str) -> None:
    model = interspace(network()) if space == "interspace" else network()
    pruner, _ = once("LevelPruner")(nni, model, HALF)
    before = snapshot(model)
    with pytest.raises(errors.HostError, match="wrapped already: '(0|0.parametrizations.weight)'"):
        nni.L1NormPruner(model, HALF)
    with pytest.raises(errors.OptimizerError, match="a SGD with other"):
        nni.finish(pruner, torch.optim.SGD(network().parameters(), lr=0.1))
    with pytest.raises(AssertionError):
        nni.AGPPruner(pruner, 1, 1)  # no evaluator
    assert same(snapshot(model), before)
    nni.finish(pruner)
    with pytest.raises(errors.HostError, match="LevelPruner that was finished before"):
        nni.finish(pruner)
    nni.finish(once("L1NormPruner")(nni, model, HALF)[0])  # another one may take over now


def test_masks_of_torch_prune_must_be_taken_over_first() -> None:
    for model, pair in ((network(), None), (interspace(network()), None)):
        pair = prunable(model)[1]
        torch_host.l1_unstructured(*pair, amount=3)
        with pytest.raises(errors.HostError, match="module '3'"):
            nni.LevelPruner(model, HALF)
        nni.LevelPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])


def test_a_parametrization_of_someone_else_is_left_to_the_host() -> None:
    model = network()
    parametrizations.weight_norm(model[3])
    interspace(model, layers=["0"])
    with pytest.raises(errors.SelectionError):
        nni.config_list(model, [{"op_names": ["3"], "op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    PruningSetting.register("ParametrizationList", {"original1": {"sparse_ratio": 0.5}})
    entry = {"op_names": ["3.parametrizations.weight"], "target_names": ["original1"], "sparse_ratio": 0.5}
    pruner, _ = once("L1NormPruner")(nni, model, [entry])
    with pytest.raises(errors.ConversionError, match="3.parametrizations.weight"):
        nni.finish(pruner)
    assert isinstance(model[3].parametrizations.weight, ParametrizationList)


def test_pruners_that_follow_each_other_keep_all_masks() -> None:
    model = interspace(network())
    parameters = {id(p) for p in model.parameters()}
    trainer = evaluator(model)
    first = nni.L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    first.compress()
    with pytest.raises(errors.SelectionError):
        nni.TaylorPruner.from_compressor(first, [{"op_names": ["-"], "sparse_ratio": 0.5}], 2)
    assert first._is_wrapped
    second = nni.TaylorPruner.from_compressor(first, [{"op_names": ["3"], "sparse_ratio": 0.25}], 2, evaluator=trainer)
    second.compress(4, None)
    nni.finish(second)
    assert {name: int(mask.flatten(1).any(1).sum()) for name, mask in masks(model).items()} == {"0": 4, "3": 6}
    assert {id(p) for p in model.parameters()} == parameters and ordinary(model)


def test_the_wrapped_model_may_change_its_dtype() -> None:
    model = interspace(network())
    parameters = {id(p) for p in model.parameters()}
    pruner, _ = once("LevelPruner")(nni, model, HALF)
    expected = model.double()(X.double())
    assert nni.finish(pruner)(X.double()).dtype == expected.dtype == torch.float64
    assert {id(p) for p in model.parameters()} == parameters
    assert all(p.dtype == torch.float64 for p in model.parameters())


def test_weights_that_are_tied_stay_as_the_host_leaves_them() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    pruner, _ = once("LevelPruner")(nni, model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()  # the two are trained apart
    expected = model(torch.ones(1, 4)).detach()
    nni.finish(pruner, optimizer)
    assert torch.equal(model(torch.ones(1, 4)), expected)
    assert model[0].parametrizations.weight.original is not model[2].weight


@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_parameters_return_to_their_places(space: str) -> None:
    model = interspace(network()) if space == "interspace" else network()
    parameters = [(n, id(p)) for n, p in model.named_parameters()]
    entries = [{**ALL, "target_names": ["weight"], "sparse_ratio": 0.5}]
    pruner = nni.LevelPruner(model, entries)
    wrapper: Any = next(iter(pruner._module_wrappers.values()))
    (frozen,) = wrapper.parameters()
    frozen.requires_grad_(False)
    pruner.unwrap_model()
    assert [(n, id(p)) for n, p in model.named_parameters()] == parameters
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    nni.finish(pruner)  # nothing was pruned: there is no mask, and nothing has changed
    assert [(n, id(p)) for n, p in model.named_parameters()] == parameters and not masks(model)


def test_pruning_without_training_leaves_state_that_can_be_carried_over() -> None:
    """`join_optimizer` asks whether coefficients were trained since the conversion; they were not."""
    model = without_norms()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    momentum = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    interspace(model, basis="dct")
    nni.finish(once("LevelPruner")(nni, model, HALF)[0], optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        join_optimizer(model, optimizer)
    chain = model[0].parametrizations.weight
    expected = momentum.flatten(2) @ chain[0].basis.detach().T
    assert torch.allclose(optimizer.state[chain.original]["momentum_buffer"].flatten(2), expected, atol=1e-6)


def test_a_norm_of_something_else_than_the_channels_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5))  # of inputs (N, 5, 4)
    pruner, _ = once("L1NormPruner")(nni, model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    nni.finish(pruner)
    assert [(each.module_name, each.tensor_name) for each in parametrized_tensors(model)] == [
        ("0", "weight"),
        ("0", "bias"),
    ]
    assert model(torch.ones(2, 5, 4)).shape == (2, 5, 6)


# --- Criteria and Lightning -----------------------------------------------------------------------------------------


EXACT = [name for name, criterion in CRITERIA.items() if not criterion.removes_channels]


@pytest.mark.parametrize("name", [name for name in CRITERIA if name not in EXACT])
def test_channels_are_removed_as_on_the_plain_twin(name: str) -> None:
    plain = network()
    plain(X)
    model = interspace(copy.deepcopy(plain), sharing="model")
    context: Any = SimpleNamespace(batches=lambda count: [(X, Y)])
    for each in (plain, model):
        CRITERIA[name].prune(each, 0.5, context)
        assert [module.out_channels for module in each if isinstance(module, nn.Conv2d)] == [4, 4, 4]
        assert all(parameter.grad is None for parameter in each.parameters())
    torch.testing.assert_close(bake(model).eval()(X), plain.eval()(X))


@pytest.mark.filterwarnings("ignore::ip_plugin.errors.LayerCollapseWarning")
@pytest.mark.parametrize("space", ["spatial", "interspace", "interspace moved"])
@pytest.mark.parametrize("name", EXACT)
def test_criteria_prune_exactly_as_many_as_asked(name: str, space: str) -> None:
    criterion = CRITERIA[name]
    total = report(network()).prunable.parameters
    assert criterion.stage == "after training"
    for count in (0, 1, 2, 7, 100, total // 2, total - 1, total):
        model = {"spatial": lambda m: m, "interspace": interspace, "interspace moved": moved}[space](network())  # type: ignore[operator]
        parameters = {id(p) for p in model.parameters()}
        criterion.prune(model, count)
        assert sum(int((~mask).sum()) for mask in masks(model).values()) == count
        assert {id(p) for p in model.parameters()} == parameters and ordinary(model)
        more = min(50, total - count)
        criterion.prune(model, more)
        assert sum(int((~mask).sum()) for mask in masks(model).values()) == count + more


@pytest.mark.parametrize("name", EXACT)
def test_criteria_are_exact_among_equals(name: str) -> None:
    model = interspace(network())
    for module, tensor_name in prunable(model):
        getattr(module, tensor_name).data.sign_()
    for count in (100, 57, 1):
        before = sum(int((~mask).sum()) for mask in masks(model).values())
        CRITERIA[name].prune(model, count)
        assert sum(int((~mask).sum()) for mask in masks(model).values()) == before + count


def test_the_level_criterion_ranks_all_layers_together() -> None:
    model, reference = interspace(network()), network()
    CRITERIA["level"].prune(model, 300)
    magnitudes = torch.cat([getattr(*where).detach().abs().flatten() for where in prunable(reference)])
    threshold = magnitudes.sort().values[300]
    for layer, (module, tensor_name) in zip(LAYERS, prunable(reference)):
        assert torch.equal(masks(model)[layer], getattr(module, tensor_name).abs() >= threshold)


def test_the_uniform_criterion_takes_the_same_part_of_every_layer() -> None:
    model = interspace(network())
    CRITERIA["level_uniform"].prune(model, 100)
    assert report(model).prunable.parameters == 584
    # 72, 192, 64 and 256 entries; 100 / 584 of them are 12.3, 32.9, 11.0 and 43.8.
    assert [int((~mask).sum()) for mask in masks(model).values()] == [12, 33, 11, 44]


def test_a_subclass_that_nni_does_not_know_is_pruned_by_a_criterion() -> None:
    model = nn.MultiheadAttention(8, 2)
    CRITERIA["level"].prune(model, 10)
    assert int((~masks(model)["out_proj"]).sum()) == 10


@pytest.mark.parametrize("space", ["spatial", "interspace"])
@pytest.mark.parametrize("name", ["steps", "epochs", "schedule"])
def test_the_lightning_evaluator(name: str, space: str) -> None:
    lightning = pytest.importorskip("pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    class Lit(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.steps = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)  # type: ignore[no-any-return]

        def training_step(self, batch: Any, index: int) -> Tensor:
            self.steps += 1
            return step(batch, self)

        def configure_optimizers(self) -> Any:
            return traced([p for n, p in self.named_parameters() if not n.endswith("basis")])

    class Data(lightning.LightningDataModule):  # type: ignore[misc, name-defined]
        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=10)

    quiet = dict.fromkeys(("enable_progress_bar", "enable_checkpointing", "logger", "enable_model_summary"), False)
    trainer = nni_host.trace(lightning.Trainer)(accelerator="cpu", max_epochs=3, **quiet)
    evaluator = nni.LightningEvaluator(trainer, nni_host.trace(Data)())
    model = Lit()
    if space == "interspace":
        interspace(model)
    entries = [{**ALL, "sparse_ratio": 0.5}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "steps":
            pruner: Any = nni.TaylorPruner(model, entries, evaluator, training_steps=8)
            pruner.compress()
            assert model.steps == 8
        elif name == "epochs":
            pruner = nni.MovementPruner(model, entries, evaluator, 1, 4)
            pruner.compress(None, 1)
            assert model.steps == 6
        else:
            pruner = nni.AGPPruner(nni.SlimPruner(model, entries, evaluator, 2), 2, 3)
            pruner.compress(8, None)
            assert model.steps == 8
    nni.finish(pruner)
    assert ordinary(model)
    assert {layer: int(mask.flatten(1).any(1).sum()) for layer, mask in masks(model).items()} == {
        f"net.{layer}": 4 for layer in LAYERS
    }
    assert int((model.net[1].bias == 0).sum()) == 4  # the BatchNorm behind the first convolution
    for each in parametrized_tensors(model):
        basis = getattr(each.parametrization, "basis", None)
        assert basis is None or not torch.equal(basis, torch.eye(len(basis)))
    assert copy.deepcopy(model)(X).shape == (60, 8)
