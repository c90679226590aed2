"""NNI's helpers that look at layers find in the interspace what they find on the plain model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ip_plugin import interspace, masks, set_masks

pytest.importorskip("nni")
pytest.importorskip("torch_pruning")

from nni.compression import utils as host
from nni.compression.utils import counter as host_counter
from nni.compression.utils import shape_dependency as host_dependencies

from ip_plugin.adapters import nni

pytestmark = [pytest.mark.contract, pytest.mark.filterwarnings("ignore")]


class Residual(nn.Module):
    """A sum of two convolutions' outputs, and a grouped convolution behind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.left(x))
        return self.head(F.relu(self.grouped(x)).mean((2, 3)))


X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


def both_spaces() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Residual()
    model = interspace(copy.deepcopy(plain), basis="dct", sharing="model")
    return set_masks(model, {"head": torch.ones(4, 8), "left": torch.ones(8, 8, 3, 3)}), plain


def grouping(entries: Iterable[dict[str, Any]]) -> tuple[set[frozenset[str]], list[dict[str, Any]]]:
    """The layers of each group, whose names are random, and the rest of the entries."""
    groups: dict[str, set[str]] = {}
    rest = []
    for entry in entries:
        groups.setdefault(entry.get("dependency_group_id", ""), set()).update(entry["op_names"])
        rest.append({key: value for key, value in entry.items() if key != "dependency_group_id"})
    return {frozenset(names) for names in groups.values()}, rest


def test_groups_of_layers_that_depend_on_each_other() -> None:
    model, plain = both_spaces()
    training = {name: module.training for name, module in model.named_modules()}
    found = grouping(nni.auto_set_denpendency_group_ids(model, CONFIG, X))
    assert found == grouping(host.auto_set_denpendency_group_ids(plain, CONFIG, X))
    assert frozenset({"stem", "left"}) in found[0]
    assert {name: module.training for name, module in model.named_modules()} == training
    assert set(masks(model)) == {"head", "left"}


@pytest.mark.parametrize(
    "name", ["ChannelDependency", "InputChannelDependency", "GroupDependency", "ReshapeDependency"]
)
def test_dependencies_of_shapes(name: str) -> None:
    model, plain = both_spaces()
    ours, theirs = getattr(nni, name)(model, X), getattr(host_dependencies, name)(plain, X)
    for _ in range(2):
        assert ours.dependency == theirs.dependency and set(vars(ours)) == set(vars(theirs))
        ours.build_dependency(), theirs.build_dependency()


def test_operations_and_parameters() -> None:
    model, plain = both_spaces()
    found, expected = (
        count(each, X, verbose=False, mode="full")
        for count, each in ((nni.count_flops_params, model), (host_counter.count_flops_params, plain))
    )
    assert found == expected
    assert expected[0] > 8 * 8 * (8 * 27 + 8 * 72)


def test_sparsities_by_config() -> None:
    model, plain = both_spaces()
    halved = [copy.deepcopy(each) for each in (model, plain)]
    for each in halved:
        each.head = nn.Linear(8, 2)
    config = [{"op_types": ["Conv2d", "Linear"]}]
    assert nni.compute_sparsity_compact2origin(model, halved[0], config) == host.compute_sparsity_compact2origin(
        plain, halved[1], config
    )
    given = {"left": {"weight": torch.cat([torch.zeros(4, 8, 3, 3), torch.ones(4, 8, 3, 3)])}}
    config = [{"op_names": ["left"]}]
    found = nni.compute_sparsity_mask2compact(model, given, config)
    assert found == host.compute_sparsity_mask2compact(plain, given, config)
    assert found[0]["total_sparsity"] == 0.5


def test_a_pipeline_with_dependency_groups_is_cut_as_on_the_plain_model() -> None:
    channels = []
    for model in both_spaces():
        config = nni.auto_set_denpendency_group_ids(model, [{"op_names": ["stem", "left"], "sparse_ratio": 0.5}], X)
        pruner = nni.L1NormPruner(model, config)
        _, found = pruner.compress()
        nni.finish(pruner)
        expected = model.eval()(X)
        nni.speedup(model, found, X)
        torch.testing.assert_close(model(X), expected)
        channels.append((model.stem.out_channels, model.left.out_channels, model.grouped.in_channels))
    assert channels == [(4, 4, 4), (4, 4, 4)]


def test_a_helper_that_fails_gives_the_model_back() -> None:
    model, _ = both_spaces()
    with pytest.raises(RuntimeError):
        nni.auto_set_denpendency_group_ids(model, CONFIG, torch.randn(1, 5, 8, 8))
    assert type(model.stem).__name__ == "ParametrizedConv2d"
    assert model(X).shape == (1, 4)
