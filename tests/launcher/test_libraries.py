"""Torch-Pruning, NNI and Lightning while the interspace is switched on: equal to code changed by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch
import nni
import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from lightning.pytorch.callbacks import ModelPruning
from nni.compression import TorchEvaluator
from nni.compression.pruning import AGPPruner, L1NormPruner, TaylorPruner  # noqa: F401
from nni.compression.speedup import ModelSpeedup
from torch import Tensor, nn

import ip_plugin
from ip_plugin import interspace, masks, report
from ip_plugin.adapters import lightning as ip_lightning
from ip_plugin.adapters import nni as ip_nni
from ip_plugin.adapters import torch_pruning as ip_tp

X, Y = torch.randn(8, 3, 8, 8), torch.arange(8)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _off() -> Iterator[None]:
    yield
    ip_plugin.switch_off()


def trained(model: nn.Module, cutter: Any = None) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        if cutter is not None:
            cutter.regularize(model)
        optimizer.step()
    return optimizer


def equal(switched: nn.Module, changed: nn.Module) -> bool:
    return all(row.space == "interspace" for row in report(switched).rows[:2]) and torch.equal(
        switched.eval()(X), changed.eval()(X)
    )


@pytest.mark.parametrize("cls", ["GroupNormPruner", "MagnitudePruner", "BNScalePruner", "derived"])
def test_torch_pruning(cls: str) -> None:
    def run(make: Callable[..., Any], model: nn.Module, count: Callable[..., Any]) -> Any:
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        options = {"importance": importance, "pruning_ratio": 0.5, "ignored_layers": [model[7]]}
        cutter = make(model, X[:1], **options)
        trained(model, cutter if cls == "GroupNormPruner" else None)
        for group in cutter.step(interactive=True):
            group.prune()
        trained(model)
        return count(model, X[:1])

    with ip_plugin.switched_on(quiet=True):
        host = type("Derived", (tp.pruner.GroupNormPruner,), {}) if cls == "derived" else getattr(tp.pruner, cls)
        switched = network()
        counted = run(host, switched, tp.utils.count_ops_and_params)
        assert issubclass(host, tp.pruner.BasePruner)
        assert (tp.pruner.GroupNormPruner is not host) == (cls != "GroupNormPruner")
    host = getattr(tp.pruner, "GroupNormPruner" if cls == "derived" else cls)
    changed = interspace(network())
    by_hand = run(lambda *a, **k: ip_tp.pruner(host, *a, **k), changed, ip_tp.count_ops_and_params)
    assert counted == by_hand
    assert switched[0].weight.shape == (4, 3, 3, 3)
    assert equal(switched, changed)


def test_a_pruner_is_an_instance_of_the_class_that_was_asked_for() -> None:
    with ip_plugin.switched_on(quiet=True):
        model = network()
        importance = tp.importance.MagnitudeImportance(p=1)
        cutter = tp.pruner.MagnitudePruner(model, X[:1], importance, ignored_layers=[model[7]])  # one by position
        assert isinstance(cutter, tp.pruner.MagnitudePruner)
        assert isinstance(cutter, tp.pruner.BasePruner)
        assert not isinstance(cutter, tp.pruner.GroupNormPruner)


def loop(
    model: nn.Module, optimizer: Any, training_step: Any, lr_scheduler: Any, max_steps: int, max_epochs: int
) -> None:
    for _ in range(max_steps or 3):
        optimizer.zero_grad()
        training_step((X, Y), model).backward()
        optimizer.step()


def loss(batch: Any, model: nn.Module) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("scheduled", [False, True])
def test_nni(scheduled: bool) -> None:
    entries = [{"op_names": ["0", "3"], "sparse_ratio": 0.5}]

    def pruned(model: nn.Module, library: Any) -> tuple[Any, Any]:
        trained(model)
        if not scheduled:
            pruner = library["L1NormPruner"](model, entries)
            return pruner, pruner.compress()[1]
        optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01)
        evaluator = TorchEvaluator(loop, optimizer, loss)
        inner = library["TaylorPruner"](model, entries, evaluator, training_steps=2)
        pruner = library["AGPPruner"](inner, interval_steps=2, total_times=2)
        return pruner, pruner.compress(max_steps=4, max_epochs=None)[1]

    with ip_plugin.switched_on(quiet=True):
        switched = network()
        pruner, found = pruned(switched, globals())
        pruner.unwrap_model()
        assert masks(switched)
        ModelSpeedup(switched, X[:1], found).speedup_model()
        trained(switched)
    changed = interspace(network())
    pruner, found = pruned(changed, vars(ip_nni))
    ip_nni.speedup(ip_nni.finish(pruner), found, X[:1])
    trained(changed)
    assert switched[0].out_channels < 8
    assert equal(switched, changed)


class Module(lightning.pytorch.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def training_step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4)


@pytest.mark.parametrize("convert_at", ["start", "pruning"])
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_lightning(convert_at: str) -> None:
    def fit(module: Module, callback: Any) -> nn.Module:
        options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.pytorch.Trainer(
            max_epochs=2, accelerator="cpu", callbacks=[callback], enable_model_summary=False, **options
        )
        trainer.fit(module)
        return module.model

    arguments: dict[str, Any] = {
        "amount": 0.5,
        "use_global_unstructured": False,
        "use_lottery_ticket_hypothesis": False,
        "make_pruning_permanent": False,
    }
    with ip_plugin.switched_on(quiet=True, convert_at=convert_at):
        switched = fit(Module(), ModelPruning("l1_unstructured", **arguments))
    assert [row.space for row in report(switched).rows] == ["interspace", "interspace", "spatial"]
    if convert_at == "start":
        module = Module()
        interspace(module)
        changed = fit(module, ip_lightning.ModelPruning("l1_unstructured", **arguments))
        assert equal(switched, changed)
        assert masks(switched).keys() == masks(changed).keys()
    assert report(switched).prunable.sparsity > 0.5
