"""Remove the channels that masks have left empty, so that a masked network becomes a smaller one.

A channel is empty if nothing computes it any more (neither weights nor biases of the layers that feed it, nor the norms
behind them), or if nothing reads it any more. Torch-Pruning says which channels belong together, and removes them.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeGuard

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from ip_plugin.core.channels import by_group, input_filters, output_filters
from ip_plugin.core.parametrization import Interspace, leave
from ip_plugin.core.tensor_ref import Model, Target, parametrized_tensors
from ip_plugin.errors import BatchError, HostError
from ip_plugin.utils.example_input import run

from ..shared.transaction import transaction
from .wrapping import exposed, pruner

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


def cut_masked_channels(model: Model, example_inputs: Any, *, optimizer: Optimizer | None = None) -> Model:
    """Remove every channel of which masks (or zeros) have left nothing; the model computes what it computed.

    Masks may be ours or those of `torch.nn.utils.prune`, in either space; those that prune nothing any more are
    removed. Layers behind norms that mix channels (LayerNorm, GroupNorm) keep theirs, and of a layer with nothing left
    one channel stays. The groups of a grouped convolution must lose equally many (of a transposed one: no) channels.

    Args:
        model: changed in place.
        example_inputs: a tensor, a tuple or list of arguments, or a dict of keyword arguments.
        optimizer: as for `ip_plugin.adapters.torch_pruning.pruner`.

    Returns:
        The model.

    Raises:
        BatchError: the model does not run on the example inputs, or its outputs are NaN.
        HostError: the outputs would change (an activation may not take 0 to 0). In both cases nothing has changed.

    Warns:
        UserWarning: channels stay because of a grouped convolution.

    >>> from ip_plugin import interspace
    >>> from ip_plugin.adapters import torch_prune as prune
    >>> model = interspace(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    >>> _ = prune.ln_structured(model[0], "weight", amount=0.5, n=2, dim=0)
    >>> cut_masked_channels(model, torch.zeros(1, 3, 9, 9))[2].in_channels
    4
    """
    before = _outputs(model, example_inputs)
    nans = sum(int(output.isnan().sum()) for output in before)
    if nans:
        raise BatchError(
            "The model's outputs for the example inputs must be numbers, or no change of them can be seen.",
            f"{nans} NaN values in the outputs before anything was removed",
            "pass other example inputs, or a model that has not diverged",
        )
    with transaction(list(model.modules()), optimizer):
        channel_pruner: Any = pruner(
            tp.pruner.BasePruner, model, example_inputs, importance=lambda _: None, optimizer=optimizer
        )
        with exposed(channel_pruner):
            _remove_empty_channels(channel_pruner.DG)
        for ref in parametrized_tensors(model):
            parametrization = ref.parametrization
            if parametrization is not None and parametrization.mask is not None and bool(parametrization.mask.all()):
                parametrization.mask = None
                if not isinstance(parametrization, Interspace):
                    leave(ref.module, ref.tensor_name, ref.parameter.detach())
        _check_same(before, _outputs(model, example_inputs))
    return model


_ROOTS = (_ConvNd, nn.Linear)
#: Layers that mix channels, so that one channel cannot be judged by itself.
_MIXING = (nn.LayerNorm, nn.GroupNorm, _InstanceNorm, nn.RNNBase, nn.MultiheadAttention, nn.Embedding)


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    inputs = tuple(example_inputs) if isinstance(example_inputs, list) else example_inputs
    return [output for output in tree_leaves(run(model, inputs)) if isinstance(output, Tensor)]


def _check_same(before: list[Tensor], after: list[Tensor]) -> None:
    """Raise HostError if outputs have changed by more than rounding."""
    for first, second in zip(before, after, strict=True):
        relative = float("inf")
        if first.shape == second.shape:
            change = torch.where(first == second, 0, first - second)  # also where both are infinite
            relative = float(change.norm() / first[first.isfinite()].norm().clamp_min(1e-30))
        if not relative <= _TOLERANCE.get(first.dtype, 1e-2):
            raise HostError(
                "A channel that masks have left empty must contribute nothing to the model's outputs.",
                f"the outputs for the example inputs would change by {relative:.2g} of their size",
                "an activation that does not take 0 to 0 may be the reason; let Torch-Pruning remove channels",
            )


def _remove_empty_channels(graph: Any) -> None:
    """Remove the empty channels of every group of a dependency graph; all groups are judged before."""
    plans: list[tuple[Any, list[int]]] = []
    for group in graph.get_all_groups(root_module_types=_ROOTS):
        empty = _empty(group, graph)
        removed = _removable(group, graph, empty)
        plans.append((group[0].dep, removed.nonzero().flatten().tolist()))
        grouped = [item.dep.target.module for item in group.items if _is_grouped(item.dep.target.module)]
        stay = int(empty.sum()) - int(removed.sum())
        if grouped and stay > 0:
            name, reader = (graph._module2name[module] for module in (group[0].dep.target.module, grouped[0]))
            warnings.warn(
                f"{stay} masked channels of {name!r} stay: the groups of a grouped convolution must lose equally many "
                f"channels, and Torch-Pruning prunes no transposed ones ({reader!r})",
                stacklevel=3,
            )
    for dep, channels in plans:
        if channels:
            group = graph.get_pruning_group(dep.target.module, dep.handler, channels)
            group.entry_order = _entry_order(group, graph)
            group.prune()


def _empty(group: Any, graph: Any) -> Tensor:
    """The channels of a group that nothing computes, or nothing reads: bools."""
    count = len(group[0].idxs)
    unmade, unread = torch.ones(count, dtype=torch.bool), torch.ones(count, dtype=torch.bool)
    readers = 0
    for item in group.items:
        module, channels = item.dep.target.module, torch.tensor(item.idxs)
        fixed = item.dep.target.type in (tp.ops.OPTYPE.OUTPUT, tp.ops.OPTYPE.PARAMETER)
        if None in item.root_idxs or fixed or isinstance(module, _MIXING):
            return torch.zeros(count, dtype=torch.bool)
        roots = torch.tensor(item.root_idxs)
        if isinstance(module, _BatchNorm):
            unmade[roots[~_keeps_zero(module)[channels]]] = False
        elif _is_depthwise(module):
            unmade[roots[_nonzero(module.bias, module.out_channels)[channels]]] = False
        elif isinstance(module, _ROOTS):
            if graph.is_out_channel_pruning_fn(item.dep.handler):
                made = output_filters(module, module.weight != 0).any(1).cpu()
                unmade[roots[(made | _nonzero(module.bias, len(made)))[channels]]] = False
            else:
                readers += 1
                unread[roots[input_filters(module, module.weight != 0).any(1).cpu()[channels]]] = False
    return unmade | (unread if readers else torch.zeros_like(unread))


def _removable(group: Any, graph: Any, empty: Tensor) -> Tensor:
    """The empty channels that can be removed together.

    Each group of a grouped convolution must lose equally many, and every layer keeps a channel.
    """
    removed = empty.clone()
    layers: list[tuple[int, Tensor]] = []  # number of groups, and of each channel the index in `removed`, or -1
    for item in group.items:
        module, out = item.dep.target.module, graph.is_out_channel_pruning_fn(item.dep.handler)
        if not isinstance(module, _ROOTS):
            continue
        if _is_grouped(module) and isinstance(module, _ConvTransposeNd):
            return torch.zeros_like(removed)
        count = graph.get_out_channels(module) if out else graph.get_in_channels(module)
        roots = torch.full((count,), -1)
        roots[torch.tensor(item.idxs)] = torch.tensor(item.root_idxs)
        layers.append((module.groups if _is_grouped(module) else 1, roots))
    before = -1
    while before != int(removed.sum()):
        before = int(removed.sum())
        for groups, roots in layers:
            blocks = roots.reshape(groups, -1)
            candidates = removed[blocks] & (blocks >= 0)
            most = min(int(candidates.sum(1).min()), blocks.shape[1] - 1)
            stays = candidates & (candidates.cumsum(1) > most)
            removed[blocks[stays]] = False
    return removed


def _entry_order(group: Any, graph: Any) -> dict[Target, Tensor]:
    """Weights of grouped convolutions whose groups lose different input channels, in an order that Torch-Pruning needs.

    It removes from all groups the inputs that are removed from the first.
    """
    orders: dict[Target, Tensor] = {}
    for item in group.items:
        module = item.dep.target.module
        if not _is_grouped(module) or graph.is_out_channel_pruning_fn(item.dep.handler):
            continue
        removed = torch.zeros(module.in_channels, dtype=torch.bool)
        removed[torch.tensor(item.idxs)] = True
        # In each group the removed inputs come where they are in the first group, and the others where those are.
        order = removed.reshape(module.groups, -1).to(torch.int8).argsort(dim=1, descending=True, stable=True)
        order = torch.empty_like(order).scatter_(1, order[:1].expand_as(order), order)
        positions = by_group(module, torch.arange(module.weight.numel()).reshape(module.weight.shape))
        columns = order[:, None, :, None].expand_as(positions)
        orders[module, "weight"] = positions.gather(2, columns).reshape(module.weight.shape)
    return orders


def _is_depthwise(module: nn.Module) -> TypeGuard[_ConvNd]:
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1


def _is_grouped(module: nn.Module) -> TypeGuard[_ConvNd]:
    return isinstance(module, _ConvNd) and module.groups > 1 and not _is_depthwise(module)


def _nonzero(values: Tensor | None, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.bool) if values is None else (values != 0).cpu()


def _keeps_zero(norm: _BatchNorm) -> Tensor:
    """The channels at which a norm maps zeros to zeros, in training and in evaluation mode."""
    shifted, scaled, biased = (_nonzero(t, norm.num_features) for t in (norm.running_mean, norm.weight, norm.bias))
    return ~(shifted & scaled | biased) if norm.affine else ~shifted
