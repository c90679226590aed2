"""Filter variety with NNI's pruners: as many channels go as before, but redundant ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ip_plugin import interspace, masks, set_masks
from ip_plugin.errors import AmountError, ArgumentError, HostError
from ip_plugin.methods.filter_variety import removal_order, varied

nni: Any = pytest.importorskip("nni")

from ip_plugin.adapters.nni import (  # noqa: E402
    AGPPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LevelPruner,
    TaylorPruner,
    TorchEvaluator,
    finish,
)
from ip_plugin.adapters.nni.variety import with_variety  # noqa: E402

SPACES = ["plain", "interspace"]
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def network(space: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    with torch.no_grad():
        copies = torch.randn(3, 3, 3, 3)
        model[0].weight.copy_(torch.cat([copies * 3, copies * 2, torch.randn(2, 3, 3, 3) * 0.1]))
    return interspace(model, basis="orthonormal") if space == "interspace" else model


def entry(ratio: float = 3 / 8, *names: str, **more: Any) -> list[dict[str, Any]]:
    return [{"op_names": list(names or ("0",)), "sparse_ratio": ratio, **more}]


def kept(model: nn.Module, layer: str = "0") -> list[int]:
    return masks(model)[layer].flatten(1).any(1).nonzero().squeeze(1).tolist()


def evaluator(model: nn.Module) -> TorchEvaluator:
    def run(model: Any, optimizer: Any, step: Any, *_: Any, max_steps: int | None = None, **__: Any) -> None:
        for _ in range(max_steps or 4):
            optimizer.zero_grad()
            step(X, model).backward()
            optimizer.step()

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.0)
    return TorchEvaluator(run, optimizer, lambda x, m: F.cross_entropy(m(x), torch.tensor([0, 1, 0, 1])))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("cls", [L1NormPruner, L2NormPruner])
def test_a_rare_filter_stays_and_the_weaker_copies_go(cls: Any, space: str) -> None:
    for with_it, expected in ((False, [0, 1, 2, 3, 4, 5]), (True, [0, 1, 2, 6, 7])):
        model = network(space)
        pruner = (with_variety(cls) if with_it else cls)(model, entry())
        pruner.compress()
        finish(pruner)
        assert len(kept(model)) == 5 and set(kept(model)) <= set(expected)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("cls", [FPGMPruner, TaylorPruner])
def test_other_metrics_of_channels(cls: Any, space: str) -> None:
    counts = []
    for made in (cls, with_variety(cls)):
        model = network(space)
        more = () if cls is FPGMPruner else (evaluator(model), 2)
        pruner = made(model, entry(0.5, "0", "2"), *more)
        pruner.compress()
        finish(pruner)
        counts.append([len(kept(model, name)) for name in ("0", "2")])
    assert counts == [[4, 4], [4, 4]]


def test_layers_that_depend_on_each_other_are_compared_by_all_their_kernels() -> None:
    different = 0
    for seed in range(5):
        model = network("plain")
        torch.manual_seed(seed)
        nn.init.normal_(model[0].weight)
        nn.init.normal_(model[2].weight)
        scores = [model[i].weight.detach().abs().flatten(1).sum(1) for i in (0, 2)]
        filters = [model[i].weight.detach().flatten(1) for i in (0, 2)]
        together = removal_order(torch.stack(scores).mean(0), torch.cat(filters, 1))
        alone = varied(scores[0], filters[0]) + varied(scores[1], filters[1])
        pruner = with_variety(L1NormPruner)(model, entry(0.5, "0", "2", dependency_group_id="a"))
        pruner.compress()
        finish(pruner)
        assert kept(model, "0") == kept(model, "2") == sorted(together[4:].tolist())
        different += sorted(alone.topk(4).indices.tolist()) != sorted(together[4:].tolist())
    assert different  # from what each layer would choose by itself


def test_filters_are_read_masked_and_in_unit_gauge() -> None:
    torch.manual_seed(0)
    basis = torch.eye(9) * torch.logspace(-1, 1, 9)[:, None]
    mask = torch.rand(8, 3, 3, 3) > 0.6
    orders = []
    for given in (torch.eye(9), basis):
        model = interspace(network("plain"), basis=given)
        set_masks(model, {"0": mask})
        pruner = with_variety(L1NormPruner)(model, entry(0.5))
        pruner.compress()
        finish(pruner)
        orders.append(kept(model))
    weight = network("plain")[0].weight.detach() * mask
    order = removal_order(weight.abs().sum((1, 2, 3)), weight)
    assert orders == [sorted(order[4:].tolist())] * 2


@pytest.mark.parametrize("similarity", ["coefficients", "weights"])
def test_coefficients_or_kernels_are_compared(similarity: Any) -> None:
    """In a skewed basis filters whose coefficients differ make kernels that are alike."""
    torch.manual_seed(0)
    model = interspace(nn.Sequential(nn.Conv2d(2, 16, 3, bias=False)), basis=torch.eye(9) + 0.8 * torch.rand(9, 9))
    space: Any = model[0].parametrizations.weight[0]
    norms = space.basis.detach().norm(dim=1).reshape(1, 1, 3, 3)
    found = model[0].parametrizations.weight.original.detach() * norms
    by = {"coefficients": found, "weights": model[0].weight.detach()}
    scores = found.flatten(1).abs().sum(1)
    expected = {name: sorted(removal_order(scores, filters)[8:].tolist()) for name, filters in by.items()}
    assert expected["coefficients"] != expected["weights"]
    pruner = with_variety(L1NormPruner, similarity=similarity)(model, entry(0.5))
    pruner.compress()
    finish(pruner)
    assert kept(model) == expected[similarity]


def test_no_strength_is_the_metric_alone() -> None:
    found = []
    for cls in (L2NormPruner, with_variety(L2NormPruner, 0.0), with_variety(L2NormPruner, 1.0)):
        model = network("plain")
        pruner = cls(model, entry(0.5))
        pruner.compress()
        finish(pruner)
        found.append(kept(model))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("space", SPACES)
def test_it_can_be_scheduled(space: str) -> None:
    model = network(space)
    inner = with_variety(L1NormPruner)(model, entry(0.5), evaluator(model))
    pruner = AGPPruner(inner, interval_steps=1, total_times=3)
    pruner.compress(max_steps=4, max_epochs=None)
    finish(pruner)
    assert len(kept(model)) == 4


def test_a_channel_that_is_masked_stays_so() -> None:
    """It is rare, so that without its mask it would be the last to go."""
    model = network("plain")
    pruner = with_variety(L1NormPruner)(model, entry(0.25))
    mask = torch.ones_like(model[0].weight)
    mask[6] = 0
    pruner.update_masks({"0": {"weight": mask}})
    _, found = pruner.compress()
    assert not found["0"]["weight"][6].any()


def test_what_ranks_no_channels_is_refused() -> None:
    pruner = with_variety(LevelPruner)(network("plain"), entry())
    with pytest.raises(HostError, match=r"rank channels.*\n.*\(8, 3, 3, 3\) for 'weight' of '0'"):
        pruner.compress()
    with pytest.raises(AmountError, match="2.0"):
        with_variety(L1NormPruner, 2.0)
    with pytest.raises(ArgumentError, match="'weight'"):
        with_variety(L1NormPruner, similarity="weight")  # type: ignore[arg-type]
