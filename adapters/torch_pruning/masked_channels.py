"""Channels that masks have left empty: cut out, so that a masked network becomes a smaller one.

A channel can go if nothing is left that makes it (weights and bias of every layer that feeds it, and its place in the
norms behind them), or if nothing is left that uses it. Torch-Pruning finds what belongs together and cuts it.
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

from ip_plugin.core.parametrization import Interspace, leave
from ip_plugin.core.tensor_ref import Model, parametrized_tensors
from ip_plugin.errors import ChangedOutputError
from ip_plugin.utils.example_input import run

from ..shared.channels import inputs_left, outputs_left
from ..shared.transaction import transaction
from .wrapping import lent, pruner

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


def cut_masked_channels(model: Model, example_inputs: Any, *, optimizer: Optimizer | None = None) -> Model:
    """Cut every channel of which masks (or zeros) have left nothing; the model computes what it computed.

    Masks may be ours or `torch.nn.utils.prune`'s, in either space; those that have nothing to mask any more go. Layers
    whose norms mix channels (LayerNorm, GroupNorm) keep theirs, and of a layer without anything left one channel stays.
    The groups of a grouped convolution must lose equally many channels, and those of a transposed one none.

    Args:
        model: changed in place.
        example_inputs: a tensor, a tuple or list of arguments, or a dict of keyword arguments.
        optimizer: as for `ip_plugin.adapters.torch_pruning.pruner`.

    Returns:
        The model.

    Raises:
        ExampleInputError: the model does not run on the example inputs.
        ChangedOutputError: the outputs for the example inputs would change (an activation does not take 0 to 0, for
            example), or are NaN; the model is as it was.

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
    nans = sum(int(each.isnan().sum()) for each in before)
    if nans:
        raise ChangedOutputError(
            "The model's outputs for the example inputs must be numbers, or no change of them can be seen.",
            f"{nans} NaN values in the outputs before anything was cut",
            "pass other example inputs, or a model that has not diverged",
        )
    with transaction(list(model.modules()), optimizer):
        cutter: Any = pruner(
            tp.pruner.BasePruner, model, example_inputs, importance=lambda _: None, optimizer=optimizer
        )
        with lent(cutter):
            graph = cutter.DG
            plans: list[tuple[Any, list[int]]] = []
            for group in graph.get_all_groups(root_module_types=_ROOTS):
                empty = _empty(group, graph)
                cut = _allowed(group, graph, empty)
                plans.append((group[0].dep, cut.nonzero().flatten().tolist()))
                grouped = [item.dep.target.module for item in group.items if _is_grouped(item.dep.target.module)]
                stay = int(empty.sum()) - int(cut.sum())
                if grouped and stay > 0:
                    name, reader = (graph._module2name[each] for each in (group[0].dep.target.module, grouped[0]))
                    warnings.warn(
                        f"{stay} masked channels of {name!r} stay: {_WHY_THEY_STAY} ({reader!r})", stacklevel=2
                    )
            for dep, channels in plans:
                if channels:
                    group = graph.get_pruning_group(dep.target.module, dep.handler, channels)
                    group.arranged = _arranged(group, graph)
                    group.prune()
        for ref in parametrized_tensors(model):
            parametrization = ref.parametrization
            assert parametrization is not None
            if parametrization.mask is not None and bool(parametrization.mask.all()):
                parametrization.mask = None
                if not isinstance(parametrization, Interspace):
                    leave(ref.module, ref.tensor_name, ref.parameter.detach())
        _compare(before, _outputs(model, example_inputs))
    return model


_ROOTS = (_ConvNd, nn.Linear)
_WHY_THEY_STAY = (
    "the groups of a grouped convolution must lose equally many channels, and Torch-Pruning cuts no transposed ones"
)
#: Layers of which a channel cannot be judged by itself.
_MIXING = (nn.LayerNorm, nn.GroupNorm, _InstanceNorm, nn.RNNBase, nn.MultiheadAttention, nn.Embedding)


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    inputs = tuple(example_inputs) if isinstance(example_inputs, list) else example_inputs
    return [each for each in tree_leaves(run(model, inputs)) if isinstance(each, Tensor)]


def _compare(before: list[Tensor], after: list[Tensor]) -> None:
    for first, second in zip(before, after, strict=True):
        same_shape = first.shape == second.shape
        moved = float("inf")
        if same_shape:
            change = torch.where(first == second, 0, first - second)  # also where both are infinite
            moved = float(change.norm() / first[first.isfinite()].norm().clamp_min(1e-30))
        if not moved <= _TOLERANCE.get(first.dtype, 1e-2):
            raise ChangedOutputError(
                "A channel that masks have left empty must contribute nothing to the model's outputs.",
                f"the outputs for the example inputs would change by {moved:.2g} of their size",
                "an activation that does not take 0 to 0 may be the reason; prune with the channels cut, "
                "by Torch-Pruning",
            )


def _empty(group: Any, graph: Any) -> Tensor:
    """Which channels of a group nothing makes, or nothing uses."""
    count = len(group[0].idxs)
    unmade, unused = torch.ones(count, dtype=torch.bool), torch.ones(count, dtype=torch.bool)
    consumers = 0
    for item in group.items:
        module, where = item.dep.target.module, torch.tensor(item.idxs)
        fixed = item.dep.target.type in (tp.ops.OPTYPE.OUTPUT, tp.ops.OPTYPE.PARAMETER)
        if None in item.root_idxs or fixed or isinstance(module, _MIXING):
            return torch.zeros(count, dtype=torch.bool)
        roots = torch.tensor(item.root_idxs)
        if isinstance(module, _BatchNorm):
            unmade[roots[~_keeps_zero(module)[where]]] = False
        elif _is_depthwise(module):
            unmade[roots[_nonzero(module.bias, module.out_channels)[where]]] = False
        elif isinstance(module, _ROOTS):
            if graph.is_out_channel_pruning_fn(item.dep.handler):
                made = outputs_left(module, module.weight != 0)
                unmade[roots[(made | _nonzero(module.bias, len(made)))[where]]] = False
            else:
                consumers += 1
                unused[roots[inputs_left(module, module.weight != 0)[where]]] = False
    return unmade | (unused if consumers else torch.zeros_like(unused))


def _allowed(group: Any, graph: Any, empty: Tensor) -> Tensor:
    """Of the channels that are empty those that may go together.

    Each group of a grouped convolution must lose equally many, and every layer keeps a channel.
    """
    cut = empty.clone()
    layers: list[tuple[int, Tensor]] = []  # number of groups, and for each channel its number in `cut`, or -1
    for item in group.items:
        module, out = item.dep.target.module, graph.is_out_channel_pruning_fn(item.dep.handler)
        if not isinstance(module, _ROOTS):
            continue
        if _is_grouped(module) and isinstance(module, _ConvTransposeNd):
            return torch.zeros_like(cut)
        count = graph.get_out_channels(module) if out else graph.get_in_channels(module)
        roots = torch.full((count,), -1)
        roots[torch.tensor(item.idxs)] = torch.tensor(item.root_idxs)
        layers.append((module.groups if _is_grouped(module) else 1, roots))
    before = -1
    while before != int(cut.sum()):
        before = int(cut.sum())
        for groups, roots in layers:
            blocks = roots.reshape(groups, -1)
            going = cut[blocks] & (blocks >= 0)
            most = min(int(going.sum(1).min()), blocks.shape[1] - 1)
            stays = going & (going.cumsum(1) > most)
            cut[blocks[stays]] = False
    return cut


def _arranged(group: Any, graph: Any) -> dict[tuple[nn.Module, str], Tensor]:
    """For grouped convolutions whose groups lose different input channels: weights in the order of the host's cut.

    The host cuts from all groups the inputs that go from the first.
    """
    found: dict[tuple[nn.Module, str], Tensor] = {}
    for item in group.items:
        module = item.dep.target.module
        if not _is_grouped(module) or graph.is_out_channel_pruning_fn(item.dep.handler):
            continue
        gone = torch.zeros(module.in_channels, dtype=torch.bool)
        gone[torch.tensor(item.idxs)] = True
        # In each group, first what goes, then what stays, to where these are in the first group.
        order = gone.reshape(module.groups, -1).to(torch.int8).argsort(dim=1, descending=True, stable=True)
        order = torch.empty_like(order).scatter_(1, order[:1].expand_as(order), order)
        positions = torch.arange(module.weight.numel()).reshape(module.groups, -1, *module.weight.shape[1:])
        columns = order.reshape(module.groups, 1, -1, *[1] * (module.weight.dim() - 2)).expand_as(positions)
        found[module, "weight"] = positions.gather(2, columns).reshape(module.weight.shape)
    return found


def _is_depthwise(module: nn.Module) -> TypeGuard[_ConvNd]:
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1


def _is_grouped(module: nn.Module) -> TypeGuard[_ConvNd]:
    return isinstance(module, _ConvNd) and module.groups > 1 and not _is_depthwise(module)


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
