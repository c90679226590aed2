"""Channels that masks have left empty: cut out, so that a masked network becomes a smaller one.

A channel can go if nothing is left that makes it (weights and bias of every layer that feeds it, and its place in the
norms behind them), or if nothing is left that uses it. Torch-Pruning finds what belongs together and cuts it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from ip_plugin.errors import ChangedOutputError
from ip_plugin.example_input import run
from ip_plugin.model import Model
from ip_plugin.reparametrization import Interspace, held, leave

from .channels import inputs_left, outputs_left
from .torch_pruning import lent, pruner
from .transaction import transaction

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


def cut_masked_channels(model: Model, example_inputs: Any, *, optimizer: Optimizer | None = None) -> Model:
    """Cut every channel of which masks (or zeros) have left nothing; the model computes what it computed.

    Masks may be ours or `torch.nn.utils.prune`'s, in either space; those that have nothing to mask any more go. Layers
    whose norms mix channels (LayerNorm, GroupNorm) keep theirs, and of a layer without anything left one channel stays.

    Args:
        model: changed in place.
        example_inputs: a tensor, a tuple or list of arguments, or a dict of keyword arguments.
        optimizer: as for `ip_plugin.adapters.torch_pruning.pruner`.

    Returns:
        The model.

    Raises:
        ExampleInputError: the model does not run on the example inputs.
        ChangedOutputError: the outputs for the example inputs would change (an activation does not take 0 to 0, for
            example); the model is as it was.

    >>> from ip_plugin import interspace
    >>> from ip_plugin.adapters import torch_prune as prune
    >>> model = interspace(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    >>> _ = prune.ln_structured(model[0], "weight", amount=0.5, n=2, dim=0)
    >>> cut_masked_channels(model, torch.zeros(1, 3, 9, 9))[2].in_channels
    4
    """
    before = _outputs(model, example_inputs)
    with transaction(list(model.modules()), optimizer):
        cutter: Any = pruner(
            tp.pruner.BasePruner, model, example_inputs, importance=lambda _: None, optimizer=optimizer
        )
        with lent(cutter):
            graph = cutter.DG
            found = [(group[0], _empty(group, graph)) for group in graph.get_all_groups(root_module_types=_ROOTS)]
            for root, channels in found:
                if channels:
                    graph.get_pruning_group(root.dep.target.module, root.dep.handler, channels).prune()
        for each in held(model):
            mask = each.parametrization.mask
            if mask is not None and bool(mask.all()):
                each.parametrization.mask = None
                if not isinstance(each.parametrization, Interspace):
                    leave(each.module, each.tensor_name, each.chain.original.detach())
        _compare(before, _outputs(model, example_inputs))
    return model


_ROOTS = (_ConvNd, nn.Linear)
#: Layers of which a channel cannot be judged by itself.
_MIXING = (nn.LayerNorm, nn.GroupNorm, _InstanceNorm, nn.RNNBase, nn.MultiheadAttention, nn.Embedding)


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    inputs = tuple(example_inputs) if isinstance(example_inputs, list) else example_inputs
    return [each for each in tree_leaves(run(model, inputs)) if isinstance(each, Tensor)]


def _compare(before: list[Tensor], after: list[Tensor]) -> None:
    for first, second in zip(before, after, strict=True):
        same_shape = first.shape == second.shape
        moved = float((first - second).norm() / first.norm().clamp_min(1e-30)) if same_shape else float("inf")
        if not moved <= _TOLERANCE.get(first.dtype, 1e-2):
            raise ChangedOutputError(moved)


def _empty(group: Any, graph: Any) -> list[int]:
    """The channels of a group that can go."""
    count = len(group[0].idxs)
    unmade, unused = torch.ones(count, dtype=torch.bool), torch.ones(count, dtype=torch.bool)
    consumers, in_step = 0, 1
    for item in group.items:
        module, where = item.dep.target.module, torch.tensor(item.idxs)
        if None in item.root_idxs or item.dep.target.type in (tp.ops.OPTYPE.OUTPUT, tp.ops.OPTYPE.PARAMETER):
            return []
        roots = torch.tensor(item.root_idxs)
        if isinstance(module, _BatchNorm):
            unmade[roots[~_keeps_zero(module)[where]]] = False
        elif isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1:
            unmade[roots[_nonzero(module.bias, module.out_channels)[where]]] = False
        elif isinstance(module, _ROOTS):
            if isinstance(module, _ConvNd):
                in_step = max(in_step, module.groups)
            if graph.is_out_channel_pruning_fn(item.dep.handler):
                made = outputs_left(module, module.weight != 0)
                unmade[roots[(made | _nonzero(module.bias, len(made)))[where]]] = False
            else:
                consumers += 1
                unused[roots[inputs_left(module, module.weight != 0)[where]]] = False
        elif isinstance(module, _MIXING):
            return []
    empty = unmade | (unused if consumers else torch.zeros_like(unused))
    if count % in_step:
        return []
    # The groups of a grouped convolution lose the same channels.
    steps = empty.reshape(in_step, -1).all(0)
    if bool(steps.all()):
        steps[0] = False
    return [int(index) for index in steps.repeat(in_step).nonzero()]


def _nonzero(bias: Tensor | None, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.bool) if bias is None else (bias != 0).cpu()


def _keeps_zero(norm: _BatchNorm) -> Tensor:
    """Channels at which a norm takes zeros to zeros, in training and in evaluation."""
    kept = torch.ones(norm.num_features, dtype=torch.bool)
    if norm.running_mean is not None:
        kept &= (norm.running_mean == 0).cpu()
    if norm.affine:
        kept |= (norm.weight == 0).cpu()
        kept &= (norm.bias == 0).cpu()
    return kept
