"""NNI's wrappers: what they take from a model, and how the model is restored with masks of this package.

While NNI prunes, a wrapper replaces the Parameters of each module by copies of its own, beside their masks. `remember`
keeps the Parameters, `put_back` restores them with the trained values, and `finish` does everything.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from nni.compression.base.compressor import Compressor
from nni.compression.base.setting import INPUT_PREFIX, OUTPUT_PREFIX
from nni.compression.base.target_space import TargetType
from nni.compression.pruning.slim_pruner import SLIM_SCALING_FACTOR_PNAME
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from ip_plugin.adapters.shared.batch_norms import following
from ip_plugin.adapters.shared.transaction import check_trained, transaction
from ip_plugin.core.channels import output_filters
from ip_plugin.core.masking import warn_of_thin_layers
from ip_plugin.core.parametrization import restore_order
from ip_plugin.core.tensor_ref import Model, TensorRef, parametrized_by_another, unknown_layer
from ip_plugin.errors import HostError, MaskError, listed

#: NNI's name for the wrapper of a module, among the module's children.
WRAPPER = "_nni_wrapper"


def remember(wrapper: Any) -> None:
    """Keep the Parameters that `wrapper` is going to replace, and their order."""
    module = wrapper.module
    if WRAPPER not in module._modules:
        parameters = {name: module._parameters.get(name) for name in wrapper.pruning_target_spaces}
        wrapper.originals = {name: parameter for name, parameter in parameters.items() if parameter is not None}
        wrapper.order = tuple(module._parameters)


@torch.no_grad()
def put_back(wrapper: Any, model: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Restore the Parameters that `remember` has kept in an unwrapped module, with the trained values.

    Returns {NNI's Parameter: the one that replaces it}. One tied outside of the wrapper stays untied, as NNI left it.
    """
    module = wrapper.module
    forward = vars(module).get("forward")
    if getattr(forward, "__func__", None) is type(module).forward:
        del module.forward  # NNI leaves the method as an attribute of the module
    successors = {}
    for name, original in vars(wrapper).get("originals", {}).items():
        theirs = module._parameters.get(name)
        if theirs is None or theirs is original or any(parameter is original for parameter in model.parameters()):
            continue
        original.data = original.data.to(theirs)  # the wrapped model may have moved to another device
        if not torch.equal(original, theirs):
            original.copy_(theirs)
        original.requires_grad_(theirs.requires_grad)
        original.grad = wrapper.pruning_target_spaces[name].target.grad
        module.register_parameter(name, original)
        successors[theirs] = original
    restore_order(module, vars(wrapper).get("order", ("weight", "bias")))
    return successors


class _Pruned(NamedTuple):
    """A tensor that NNI has pruned, by its name in the plain model; `space` is what NNI keeps for it."""

    ref: TensorRef
    space: Any
    kept: Tensor
    slim_factor: Tensor | None


def check_unwrapped(model: nn.Module) -> None:
    """Raise HostError if another pruner of NNI still holds the model."""
    wrapped = [name for name, module in model.named_modules() if WRAPPER in module._modules]
    if wrapped:
        raise HostError(
            "Only one pruner of NNI at a time can hold a model.",
            f"wrapped already: {listed(wrapped)}",
            "call finish(pruner) of ip_plugin.adapters.nni first, or build the new pruner with from_compressor",
        )


def plain_name(module_name: str, tensor_name: str, module: nn.Module) -> tuple[str, str]:
    """Name of a tensor in the plain model: ``("0", "weight")`` for ``("0.parametrizations.weight", "original")``."""
    if tensor_name != "original" or TensorRef(module, tensor_name).chain is None:
        return module_name, tensor_name
    layer, _, name = module_name.rpartition("parametrizations.")
    return layer.removesuffix("."), name


def finish(pruner: Any, optimizer: Optimizer | None = None) -> nn.Module:
    """Take the model back from NNI: its masks become ours, its wrappers go, the model's own Parameters return.

    The Parameter objects are those from before the pruner, in their order, with the trained values; masks that the
    model had before still apply. Afterwards `ip_plugin.bake`, `report`, `masks`, ``state_dict``, ``copy.deepcopy`` and
    training do what they do without NNI.

    Where a pruner with a granularity has masked a whole output channel, the channel's bias is masked too, and its
    weight and bias in the BatchNorm behind the layer (see `ip_plugin.adapters.shared.batch_norms`): the model then
    computes what a network without these channels computes, as long as activations map 0 to 0. Masks of inputs and
    outputs end with the pruner. The factors of `SlimPruner` (NNI's ``unwrap_model`` drops them) scale the values.

    Args:
        pruner: after ``compress()``; of this adapter, or of NNI itself, whose Parameter objects then stay.
        optimizer: one that trains the model, built at any time: keeps its state, and trains the restored Parameters.

    Returns:
        The model that the pruner was made for.

    Raises:
        HostError: not a pruner, or one that was finished before.
        OptimizerError: the optimizer trains none of the pruner's tensors.
        ConversionError: NNI has pruned below someone else's parametrization. In all cases nothing has changed.

    Warns:
        LayerCollapseWarning: of a global group, layers keep less than a tenth of the share that all keep together.

    >>> from ip_plugin import interspace, masks
    >>> from ip_plugin.adapters.nni import L1NormPruner
    >>> model = interspace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    >>> pruner = L1NormPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.25}])
    >>> _ = pruner.compress()
    >>> finish(pruner) is model
    True
    >>> masks(model)["0"].flatten(1).any(1).sum(), (model[1].bias == 0).sum()
    (tensor(6), tensor(8))
    """
    finished = isinstance(pruner, Compressor) and vars(pruner).get("finished")
    if finished or not isinstance(pruner, Compressor):
        raise HostError(
            "`finish` takes a pruner of NNI that still holds its model.",
            f"a {type(pruner).__name__}{' that was finished before' if finished else ''}",
            "pass the pruner itself, once",
        )
    model: nn.Module = pruner.bound_model
    wrappers = list(pruner._module_wrappers.values())
    tensors = [tensor for wrapper in wrappers for tensor in _pruned(wrapper, model)]
    for tensor in tensors:
        if tensor.ref.is_foreign:
            raise parametrized_by_another(tensor.ref.module_name, "another package")
    theirs = [p for wrapper in wrappers for p in (*wrapper.parameters(), *vars(wrapper).get("originals", {}).values())]
    check_trained(optimizer, [*model.parameters(), *theirs])
    _unwrap(pruner, wrappers)

    successors: dict[nn.Parameter, nn.Parameter | None] = dict.fromkeys(p for w in wrappers for p in w.parameters())
    for wrapper in wrappers:
        successors.update(put_back(wrapper, model))
    successors.update({tensor.space.target: tensor.ref.parameter for tensor in tensors})
    if optimizer is not None:
        _replace_parameters(optimizer, successors)
    by_group: dict[Any, list[tuple[str, Tensor]]] = {}
    for ref, space, kept, factor in tensors:
        if factor is not None:
            ref.parameter.data.mul_(factor.detach())
        ref.add_mask(kept)
        by_group.setdefault(space.global_group_id, []).append((ref.module_name, kept))
    weights = [tensor for tensor in tensors if tensor.ref.tensor_name == "weight"]
    _mask_empty_channels(model, {ref.module_name for ref, space, *_ in weights if space.granularity is not None})
    pruner.finished = True
    for group, masks in by_group.items():
        if group is not None:  # layers of a group have one threshold
            warn_of_thin_layers(masks)
    return model


def speedup(
    model: Model,
    masks: Mapping[str, Mapping[str, Tensor | None]],
    example_input: Any,
    *,
    optimizer: Optimizer | None = None,
) -> Model:
    """Remove the channels that NNI's masks have left empty, as NNI's ``ModelSpeedup`` (which fails now) is meant to.

    Needs the extra ``torch-pruning``, which says which channels belong together and removes them. A channel to which a
    bias or a norm still contributes stays, unless its layer's mask is one of whole channels: see `finish`.

    Args:
        model: one that `finish` has returned, or one without wrappers to which the masks belong; changed in place.
        masks: as ``compress()`` has returned them; masks of inputs and outputs are ignored.
        example_input: a tensor, a tuple of arguments, or a dict of keyword arguments.
        optimizer: one that trains the model; pruned Parameters are replaced in it, with their state.

    Returns:
        The model: it computes what it computed with the masks.

    Raises:
        HostError: NNI's wrappers are on the model, or its outputs would change (see `cut_masked_channels`).
        SelectionError, MaskError: masks of another model.
        BatchError: the model does not run on the example input. In all cases nothing has changed.

    >>> from ip_plugin import interspace
    >>> from ip_plugin.adapters.nni import L1NormPruner
    >>> model = interspace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    >>> pruner = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.25}])
    >>> _, masks = pruner.compress()
    >>> speedup(finish(pruner), masks, torch.zeros(1, 3, 9, 9))[2].in_channels
    6
    """
    from ip_plugin.adapters.torch_pruning.masked_channels import cut_masked_channels

    check_unwrapped(model)
    checked = list(_checked_masks(model, masks))
    with transaction(list(model.modules()), optimizer):
        for ref, kept in checked:
            ref.add_mask(kept.to(ref.parameter.device))
        whole = {n for n in masks if _is_of_channels(model.get_submodule(n), masks[n].get("weight"))}
        _mask_empty_channels(model, whole)
        return cut_masked_channels(model, example_input, optimizer=optimizer)


def _checked_masks(
    model: nn.Module, masks: Mapping[str, Mapping[str, Tensor | None]]
) -> Iterator[tuple[TensorRef, Tensor]]:
    modules = dict(model.named_modules())
    for name, by_tensor in masks.items():
        if name not in modules:
            raise unknown_layer(name, modules, argument="masks")
        for tensor_name, mask in by_tensor.items():
            if mask is None or tensor_name.startswith((INPUT_PREFIX, OUTPUT_PREFIX)):
                continue  # NNI has None for biases that do not exist
            ref = TensorRef(modules[name], tensor_name)
            values = getattr(*ref.target, None)
            if not isinstance(values, Tensor) or mask.shape != values.shape:
                expected = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else "a tensor of that name"
                raise MaskError(
                    f"The mask of '{name}.{tensor_name}' must be for a tensor of the model: {expected}.",
                    f"shape {tuple(mask.shape)}",
                    "pass the masks that `compress()` has returned for this model",
                )
            yield ref, mask.detach() != 0


def _is_of_channels(module: nn.Module, mask: Tensor | None) -> bool:
    """Whether a mask keeps or prunes whole output channels of a layer only."""
    if mask is None or not isinstance(module, (_ConvNd, nn.Linear)):
        return False
    kept = output_filters(module, mask != 0)
    return torch.equal(kept.any(1), kept.all(1))


def _pruned(wrapper: Any, model: nn.Module) -> Iterator[_Pruned]:
    for name, space in wrapper.pruning_target_spaces.items():
        if space.type is not TargetType.PARAMETER or space.mask is None:
            continue
        factor = getattr(wrapper, SLIM_SCALING_FACTOR_PNAME.format(name), None)
        if factor is not None and space._scaler is not None:
            factor = space._scaler.expand(factor, space.shape, keepdim=True)
        layer, tensor_name = plain_name(wrapper.name, name, wrapper.module)
        ref = TensorRef(model.get_submodule(layer), tensor_name, layer)
        yield _Pruned(ref, space, space.mask.detach() != 0, factor)


def _unwrap(pruner: Any, wrappers: list[Any]) -> None:
    if getattr(pruner.evaluator, "model", None) is not None:
        pruner.evaluator.unbind_model()  # a training run that broke off has left its hooks
    if pruner._is_wrapped:
        pruner.unwrap_model()
    for wrapper in wrappers:
        if wrapper.module._modules.get(WRAPPER) is wrapper:
            wrapper.unwrap()


def _replace_parameters(optimizer: Optimizer, successors: dict[nn.Parameter, nn.Parameter | None]) -> None:
    """Let an optimizer train the successors of its Parameters; those whose successor is None are removed."""
    present = {p for group in optimizer.param_groups for p in group["params"]}
    for group in optimizer.param_groups:
        names = group.get("param_names", [""] * len(group["params"]))
        members: list[tuple[nn.Parameter, str]] = []
        for parameter, name in zip(group["params"], names, strict=True):
            successor = successors.get(parameter, parameter)
            if successor is not parameter:
                state = optimizer.state.pop(parameter, None)
                if successor is None or successor in present:
                    continue
                if state is not None:
                    optimizer.state[successor] = state
            members.append((successor, name.replace(WRAPPER + ".", "")))
        group["params"] = [parameter for parameter, _ in members]
        if "param_names" in group:
            group["param_names"] = [name for _, name in members]


def _mask_empty_channels(model: nn.Module, layers: set[str]) -> None:
    """Of output channels with no weight left, mask the bias too, and the weight and bias in the BatchNorm behind."""
    kept: dict[str, Tensor] = {}
    for name in layers:
        module = model.get_submodule(name)
        mask = TensorRef(module).mask if isinstance(module, (_ConvNd, nn.Linear)) else None
        channels = None if mask is None else output_filters(module, mask).any(1)
        if channels is not None and not bool(channels.all()):
            kept[name] = channels
            if module.bias is not None:
                TensorRef(module, "bias").add_mask(channels)
    if not kept or not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    norms = following(model, kept)
    if norms is None:
        warnings.warn(
            "the model's forward cannot be traced, so the BatchNorms behind pruned channels were left as they are and "
            f"may turn these channels into constants: layers {', '.join(sorted(kept))}",
            stacklevel=3,
        )
        return
    for layer, norm in norms.items():
        module = model.get_submodule(norm)
        assert isinstance(module, _BatchNorm)
        if module.num_features != len(kept[layer]):
            continue
        if module.affine:
            TensorRef(module, "weight").add_mask(kept[layer])
            TensorRef(module, "bias").add_mask(kept[layer])
        elif module.running_mean is not None:
            module.running_mean.mul_(kept[layer])
