"""NNI's pruners as criteria of ``ip-plugin compare``."""

from __future__ import annotations

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

from ip_plugin import prunable
from ip_plugin.adapters import VARIED, AnyCriterion, ChannelCriterion, Criterion, torch_prune, torch_pruning
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
from ip_plugin.core.tensor_ref import TensorRef, prunable_tensors


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


def _left(layer: TensorRef) -> int:
    return layer.parameter.numel() if layer.mask is None else int(layer.mask.sum())


def _globally(model: nn.Module, count: int) -> None:
    """The level pruner with one threshold for all layers.

    NNI prunes what is below the threshold, so that of equal magnitudes it prunes none, and nothing at all where it is
    asked for everything: what is missing then is pruned by `torch.nn.utils.prune`, whose ranking is the same.
    """
    found = {layer.module_name: layer.parameter.numel() for layer in prunable_tensors(model)}
    total, before = sum(found.values()), sum(map(_left, prunable_tensors(model)))
    ratio = (total - before + count + 0.5) / total  # NNI rounds down
    if count and ratio < 1:
        _level(model, dict.fromkeys(found, ratio), global_group_id="all")
    missing = count - before + sum(map(_left, prunable_tensors(model)))
    if missing:
        torch_prune.global_unstructured(prunable(model), torch_prune.L1Unstructured, amount=missing)


def _uniformly(model: nn.Module, count: int) -> None:
    """The level pruner as it is without a group: every layer loses the same part, to rounding, `count` in all."""
    if not count:
        return
    left = {layer.module_name: _left(layer) for layer in prunable_tensors(model)}
    sizes = {layer.module_name: layer.parameter.numel() for layer in prunable_tensors(model)}
    shares = {name: divmod(count * number, sum(left.values())) for name, number in left.items()}
    lost = {name: share for name, (share, _) in shares.items()}
    for name in sorted(shares, key=lambda each: -shares[each][1])[: count - sum(lost.values())]:
        lost[name] += 1
    gone = {name: sizes[name] - left[name] + lost[name] for name in sizes}
    _level(model, {name: min(1.0, (gone[name] + 0.5) / sizes[name]) for name in sizes if lost[name]})


def _cut(pruner: Any, model: nn.Module, ratio: float, images: Tensor, labels: Tensor) -> None:
    """Mask a share of the output channels of every convolution, and cut them."""
    convolutions = [layer for layer in prunable_tensors(model) if isinstance(layer.module, _ConvNd)]
    for layer in convolutions:
        _register(layer.module)
    groups = _coupled(model, images[:1])
    entries = [
        {"op_names": [layer.module_name], "sparse_ratio": ratio}
        | ({"dependency_group_id": groups[layer.module_name]} if layer.module_name in groups else {})
        for layer in convolutions
    ]
    if issubclass(pruner, TaylorPruner):
        found = pruner(model, entries, _gradients(model, images, labels), training_steps=1)
    else:
        found = pruner(model, entries)
    _, masks = found.compress()
    speedup(finish(found), masks, images[:1])
    model.zero_grad()


def _coupled(model: nn.Module, example: Tensor) -> dict[str, str]:
    """A name for each set of layers whose outputs are added, by layer: they must lose the same channels."""
    names = {layer.module: layer.module_name for layer in prunable_tensors(model)}
    graph = torch_pruning.pruner(tp.pruner.BasePruner, model, example, importance=tp.importance.RandomImportance()).DG
    found: dict[str, str] = {}
    for number, group in enumerate(graph.get_all_groups()):
        makers = [names[item.dep.target.module] for item in group.items if item.dep.handler in MAKERS]
        if len(makers) > 1:
            found |= dict.fromkeys(makers, str(number))
    return found


def _gradients(model: nn.Module, images: Tensor, labels: Tensor) -> TorchEvaluator:
    """What NNI calls an evaluator: it computes gradients on a batch, and trains nothing."""

    def run(
        model: nn.Module,
        optimizer: Any,
        step: Any,
        scheduler: object = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        del scheduler, max_epochs  # NNI hands them over by name
        model.eval()
        for _ in range(max_steps or 1):
            optimizer.zero_grad()
            step((images, labels), model).backward()
            optimizer.step()

    def loss(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    return TorchEvaluator(run, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.0), loss)


_CHANNELS: dict[str, tuple[type, str]] = {
    "l1_norm": (L1NormPruner, "their L1 norm"),
    "l2_norm": (L2NormPruner, "their L2 norm"),
    "fpgm": (FPGMPruner, "distance to the geometric median"),
    "taylor": (TaylorPruner, "first-order effect on the loss"),
}


def _channels() -> dict[str, AnyCriterion]:
    """Each with variety and without."""
    found: dict[str, AnyCriterion] = {}
    for name, (pruner, how) in _CHANNELS.items():
        for suffix, made, also in (("", pruner, ""), (VARIED, with_variety(pruner), " with variety")):
            title = f"NNI: channels by {how}{also}, after training"
            found[name + suffix] = ChannelCriterion(title, "after training", partial(_cut, made))
    return found


CRITERIA: dict[str, AnyCriterion] = {
    "level": Criterion("NNI level pruner, one threshold, after training", "after training", _globally),
    "level_uniform": Criterion("NNI level pruner, every layer alike, after training", "after training", _uniformly),
    **_channels(),
}
