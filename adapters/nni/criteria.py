"""NNI's pruners as criteria of ``ip-plugin compare``."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from typing import Any

import nni
import torch
import torch.nn.functional as F
import torch_pruning as tp
from nni.compression import TorchEvaluator
from nni.compression.base.setting import PruningSetting
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ip_plugin.adapters import Criterion, TrainingContext, torch_prune, torch_pruning, with_and_without_variety
from ip_plugin.adapters.nni.pruners import (
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LevelPruner,
    TaylorPruner,
    plain_class,
)
from ip_plugin.adapters.nni.variety import with_variety
from ip_plugin.adapters.nni.wrappers import finish, speedup
from ip_plugin.adapters.torch_pruning.variety import MAKERS
from ip_plugin.core.convert import prunable
from ip_plugin.core.tensor_ref import TensorRef, prunable_tensors
from ip_plugin.methods.selection import rounded


def _level(model: nn.Module, ratios: dict[str, float], **setting: Any) -> None:
    """Prune the weights of some layers by NNI's level pruner."""
    for layer in prunable_tensors(model):
        _register(layer.module)
    entries = [
        {"op_names": [name], "target_names": ["weight"], "sparse_ratio": ratio, **setting}
        for name, ratio in ratios.items()
    ]
    pruner = LevelPruner(model, entries)
    pruner.compress()
    finish(pruner)


def _register(module: nn.Module) -> None:
    """Let NNI treat a subclass that it does not know, such as the linear layer of an attention, as its base class."""
    cls = plain_class(module)
    if cls.__name__ not in PruningSetting.registry:
        known = next(base.__name__ for base in cls.__mro__ if base.__name__ in PruningSetting.registry)
        PruningSetting.register(cls.__name__, PruningSetting.registry[known])


def _kept(layer: TensorRef) -> int:
    return layer.parameter.numel() if layer.mask is None else int(layer.mask.sum())


def _globally(model: nn.Module, count: int) -> None:
    """The level pruner with one threshold for all layers.

    NNI keeps every entry at the threshold, and prunes nothing where everything is to be pruned. The entries that are
    missing then are pruned by `torch.nn.utils.prune`, which ranks them in the same way.
    """
    sizes = {layer.module_name: layer.parameter.numel() for layer in prunable_tensors(model)}
    total, before = sum(sizes.values()), sum(map(_kept, prunable_tensors(model)))
    ratio = (total - before + count + 0.5) / total  # NNI rounds down
    if count and ratio < 1:
        _level(model, dict.fromkeys(sizes, ratio), global_group_id="all")
    missing = count - before + sum(map(_kept, prunable_tensors(model)))
    if missing:
        torch_prune.global_unstructured(prunable(model), torch_prune.L1Unstructured, amount=missing)


def _uniformly(model: nn.Module, count: int) -> None:
    """The level pruner without a group: `count` entries in all, the same share of every layer up to rounding."""
    if not count:
        return
    layers = prunable_tensors(model)
    kept = [_kept(layer) for layer in layers]
    counts = rounded([Fraction(count * number, sum(kept)) for number in kept])
    ratios: dict[str, float] = {}
    for layer, before, pruned in zip(layers, kept, counts, strict=True):
        size = layer.parameter.numel()
        if pruned:
            ratios[layer.module_name] = min(1.0, (size - before + pruned + 0.5) / size)  # NNI rounds down
    _level(model, ratios)


def _remove(pruner: Any, varied: bool, model: nn.Module, ratio: float, training: TrainingContext) -> None:
    """Mask a share of the output channels of every convolution, and remove them."""
    images, labels = training.batches(1)[0]
    convolutions = [layer for layer in prunable_tensors(model) if isinstance(layer.module, _ConvNd)]
    for layer in convolutions:
        _register(layer.module)
    coupled = _coupled(model, images[:1])
    names = [layer.module_name for layer in convolutions]
    entries = [{"op_names": [name], "sparse_ratio": ratio, **coupled.get(name, {})} for name in names]
    arguments = (_gradients(model, images, labels), 1) if pruner is TaylorPruner else ()
    host = (with_variety(pruner) if varied else pruner)(model, entries, *arguments)
    _, masks = host.compress()
    speedup(finish(host), masks, images[:1])
    model.zero_grad()


def _coupled(model: nn.Module, example: Tensor) -> dict[str, dict[str, str]]:
    """{layer: NNI's setting} of layers whose outputs are added, so that they must lose the same channels."""
    names = {layer.module: layer.module_name for layer in prunable_tensors(model)}
    graph = torch_pruning.pruner(tp.pruner.BasePruner, model, example, importance=tp.importance.RandomImportance()).DG
    settings: dict[str, dict[str, str]] = {}
    for number, group in enumerate(graph.get_all_groups()):
        makers = [names[item.dep.target.module] for item in group.items if item.dep.handler in MAKERS]
        if len(makers) > 1:
            settings |= {name: {"dependency_group_id": str(number)} for name in makers}
    return settings


def _gradients(model: nn.Module, images: Tensor, labels: Tensor) -> TorchEvaluator:
    """An evaluator, as NNI calls it, that computes gradients on one batch and does not train."""

    def run(
        model: nn.Module,
        optimizer: Any,
        step: Any,
        scheduler: Any = None,
        max_steps: Any = None,
        max_epochs: Any = None,
    ) -> None:
        del scheduler, max_epochs  # NNI passes them, too
        model.eval()
        for _ in range(max_steps or 1):
            optimizer.zero_grad()
            step((images, labels), model).backward()
            optimizer.step()

    def loss(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    return TorchEvaluator(run, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.0), loss)


CRITERIA: dict[str, Criterion] = {
    "level": Criterion.simple("NNI level pruner, one threshold, after training", "after training", _globally),
    "level_uniform": Criterion.simple(
        "NNI level pruner, every layer alike, after training", "after training", _uniformly
    ),
}
for _name, _pruner, _how in (
    ("l1_norm", L1NormPruner, "their L1 norm"),
    ("l2_norm", L2NormPruner, "their L2 norm"),
    ("fpgm", FPGMPruner, "distance to the geometric median"),
    ("taylor", TaylorPruner, "first-order effect on the loss"),
):
    CRITERIA |= with_and_without_variety(
        _name, f"NNI: channels by {_how}{{}}, after training", "after training", partial(_remove, _pruner)
    )
