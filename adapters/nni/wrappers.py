"""NNI's wrappers: what they take from a model, and how it is given back with masks of ours.

While NNI prunes, a wrapper stands before each module: it holds copies of the Parameters as Parameters of its own, with
the masks beside them, and the module's are gone. `remember` keeps them, `put_back` returns them with the trained
values, `finish` does the whole.
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
from ip_plugin.adapters.shared.channels import outputs_left
from ip_plugin.adapters.shared.transaction import transaction
from ip_plugin.core.masking import warn_of_thin_layers
from ip_plugin.core.parametrization import restore_order
from ip_plugin.core.tensor_ref import Model, TensorRef
from ip_plugin.errors import (
    AlreadyParametrizedError,
    AlreadyWrappedError,
    InvalidMaskError,
    NotAPrunerError,
    OptimizerMismatchError,
    UnknownLayerError,
)

#: NNI's name for the wrapper of a module, among the module's children.
WRAPPER = "_nni_wrapper"


def remember(wrapper: Any) -> None:
    """Keep the Parameters that `wrapper` is about to replace, and their order."""
    module = wrapper.module
    if WRAPPER in module._modules:
        return
    found = {name: module._parameters.get(name) for name in wrapper.pruning_target_spaces}
    wrapper.originals = {name: parameter for name, parameter in found.items() if parameter is not None}
    wrapper.order = tuple(module._parameters)


@torch.no_grad()
def put_back(wrapper: Any, model: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Return the Parameters that `remember` has kept to a module that is unwrapped, with the trained values.

    A Parameter that was tied to one outside of the wrapper stays untied, as NNI has left it.

    Returns:
        {NNI's Parameter of the module: the one that has its place again}.
    """
    module = wrapper.module
    forward = vars(module).get("forward")
    if getattr(forward, "__func__", None) is type(module).forward:
        del module.forward  # NNI leaves the method as an attribute of the module
    heirs = {}
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
        heirs[theirs] = original
    restore_order(module, vars(wrapper).get("order", ("weight", "bias")))
    return heirs


class _Found(NamedTuple):
    """What NNI knows of one tensor when it has pruned."""

    wrapper: Any
    tensor_name: str
    kept: Tensor
    in_blocks: bool
    factor: Tensor | None

    @property
    def layer(self) -> tuple[str, str]:
        """Name of the layer, and of its tensor."""
        return plain_name(self.wrapper.name, self.tensor_name, self.wrapper.module)


def plain_name(module_name: str, tensor_name: str, module: nn.Module) -> tuple[str, str]:
    """Where a tensor is on the plain model: ``("0.parametrizations.weight", "original")`` is ``("0", "weight")``."""
    if TensorRef(module, "original").chain is None or tensor_name != "original":
        return module_name, tensor_name
    layer, _, name = module_name.rpartition("parametrizations.")
    return layer.removesuffix("."), name


def finish(pruner: Any, optimizer: Optimizer | None = None) -> nn.Module:
    """Take the model out of NNI's hands: its masks become ours, its wrappers go, the model's own Parameters return.

    The Parameter objects are those from before the pruner, in their order, with the trained values; masks that the
    model had before still hold. Afterwards `ip_plugin.bake`, `report`, `masks`, ``state_dict``, ``copy.deepcopy`` and
    training do what they do without NNI.

    Where a pruner with a granularity has masked a whole output channel, the channel's bias goes too, and its weight and
    bias in the BatchNorm that alone follows (see `ip_plugin.adapters.shared.batch_norms`): the model then computes what
    a network without these channels computes, as long as activations take 0 to 0. Masks of inputs and outputs end with
    the pruner. The factors by which `SlimPruner` scales channels are multiplied into the values (the host's
    ``unwrap_model`` drops them).

    Args:
        pruner: after ``compress()``; of this adapter, or of NNI itself, whose Parameter objects then stay.
        optimizer: one that trains the model, built before or after the pruner: it keeps its state and goes on with
            the Parameters that are back.

    Returns:
        The model that the pruner was made for.

    Raises:
        NotAPrunerError: not a pruner, or one that was finished before.
        OptimizerMismatchError: the optimizer trains none of the pruner's tensors.
        AlreadyParametrizedError: NNI has pruned below someone else's parametrization.
            In all cases nothing has changed.

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
    if not isinstance(pruner, Compressor):
        raise NotAPrunerError(f"a {type(pruner).__name__}")
    if vars(pruner).get("finished"):
        raise NotAPrunerError(f"a {type(pruner).__name__} that was finished before")
    model: nn.Module = pruner.bound_model
    wrappers = list(pruner._module_wrappers.values())
    found = [each for wrapper in wrappers for each in _found(wrapper)]
    for each in found:
        if TensorRef(each.wrapper.module, each.tensor_name).is_foreign:
            raise AlreadyParametrizedError(each.wrapper.name, "another package")
    _check_optimizer(optimizer, model, wrappers)
    _unwrap(pruner, wrappers)

    heirs: dict[nn.Parameter, nn.Parameter | None] = {p: None for wrapper in wrappers for p in wrapper.parameters()}
    for wrapper in wrappers:
        heirs.update(put_back(wrapper, model))
    for each in found:
        heirs[each.wrapper.pruning_target_spaces[each.tensor_name].target] = getattr(
            each.wrapper.module, each.tensor_name
        )
    if optimizer is not None:
        _hand_over(optimizer, heirs)
    for each in found:
        if each.factor is not None:
            getattr(each.wrapper.module, each.tensor_name).data.mul_(each.factor)
    for each in found:
        TensorRef(each.wrapper.module, each.tensor_name).add_mask(each.kept)
    _remove_channels(model, {each.layer[0] for each in found if each.in_blocks and each.layer[1] == "weight"})
    pruner.finished = True
    groups: dict[Any, list[tuple[str, Tensor]]] = {}
    for each in found:
        group = each.wrapper.pruning_target_spaces[each.tensor_name].global_group_id
        groups.setdefault(group, []).append((each.layer[0], each.kept))
    for group, kept in groups.items():
        if group is not None:  # one threshold for them all
            warn_of_thin_layers(kept)
    return model


def speedup(
    model: Model,
    masks: Mapping[str, Mapping[str, Tensor | None]],
    example_input: Any,
    *,
    optimizer: Optimizer | None = None,
) -> Model:
    """Cut the channels that NNI's masks have left empty: what the host's ``ModelSpeedup`` is for, which fails now.

    Needs torch-pruning, which finds what belongs together and cuts it (the extra ``torch-pruning``). A channel that its
    bias or a norm still makes something of stays, except where a mask is one of whole channels: see `finish`.

    Args:
        model: what `finish` has returned, or a model without wrappers that the masks are meant for; changed in place.
        masks: as ``compress()`` has returned them; masks of inputs and outputs are passed over.
        example_input: a tensor, a tuple of arguments, or a dict of keyword arguments.
        optimizer: one that trains the model; Parameters that are cut are replaced in it, with their state.

    Returns:
        The model: it computes what it computed with the masks.

    Raises:
        AlreadyWrappedError: NNI's wrappers are on the model.
        UnknownLayerError, InvalidMaskError: masks of another model.
        ExampleInputError, ChangedOutputError: see `ip_plugin.adapters.torch_pruning.cut_masked_channels`.
            In all cases nothing has changed.

    >>> from ip_plugin import interspace
    >>> from ip_plugin.adapters.nni import L1NormPruner
    >>> model = interspace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    >>> pruner = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.25}])
    >>> _, masks = pruner.compress()
    >>> speedup(finish(pruner), masks, torch.zeros(1, 3, 9, 9))[2].in_channels
    6
    """
    from ip_plugin.adapters.torch_pruning.masked_channels import cut_masked_channels

    wrapped = [name for name, module in model.named_modules() if WRAPPER in module._modules]
    if wrapped:
        raise AlreadyWrappedError(wrapped)
    modules = dict(model.named_modules())
    found: list[tuple[TensorRef, Tensor]] = []
    for name, by_tensor in masks.items():
        if name not in modules:
            raise UnknownLayerError(name, modules, argument="masks")
        for tensor_name, mask in by_tensor.items():
            if mask is None or tensor_name.startswith((INPUT_PREFIX, OUTPUT_PREFIX)):
                continue  # NNI names biases that are not there
            ref = TensorRef(modules[name], tensor_name)
            values = getattr(*ref.target, None)
            if not isinstance(values, Tensor) or mask.shape != values.shape:
                shape = values.shape if isinstance(values, Tensor) else ()
                raise InvalidMaskError(f"{name}.{tensor_name}", f"shape {tuple(mask.shape)}", shape)
            found.append((ref, mask.detach() != 0))
    with transaction(list(model.modules()), optimizer):
        for ref, kept in found:
            ref.add_mask(kept.to(ref.parameter.device))
        whole = {name for name in masks if _is_of_channels(modules[name], masks[name].get("weight"))}
        _remove_channels(model, whole)
        return cut_masked_channels(model, example_input, optimizer=optimizer)


def _is_of_channels(module: nn.Module, mask: Tensor | None) -> bool:
    """Whether a mask keeps or drops every output channel of a layer whole."""
    if mask is None or not isinstance(module, (_ConvNd, nn.Linear)):
        return False
    return not bool((outputs_left(module, mask != 0) & outputs_left(module, mask == 0)).any())


def _found(wrapper: Any) -> Iterator[_Found]:
    for name, space in wrapper.pruning_target_spaces.items():
        if space.type is not TargetType.PARAMETER or space.mask is None:
            continue
        factor = getattr(wrapper, SLIM_SCALING_FACTOR_PNAME.format(name), None)
        if factor is not None:
            factor = factor.detach()
            if space._scaler is not None:
                factor = space._scaler.expand(factor, space.shape, keepdim=True)
        yield _Found(wrapper, name, space.mask.detach() != 0, space.granularity is not None, factor)


def _check_optimizer(optimizer: Optimizer | None, model: nn.Module, wrappers: list[Any]) -> None:
    if optimizer is None:
        return
    known = {id(p) for p in model.parameters()}
    for wrapper in wrappers:
        known |= {id(p) for p in (*wrapper.parameters(), *vars(wrapper).get("originals", {}).values())}
    if not any(id(p) in known for group in optimizer.param_groups for p in group["params"]):
        raise OptimizerMismatchError(f"a {type(optimizer).__name__} with other parameters only")


def _unwrap(pruner: Any, wrappers: list[Any]) -> None:
    evaluator = pruner.evaluator
    if evaluator is not None and getattr(evaluator, "model", None) is not None:
        evaluator.unbind_model()  # a training run that broke off has left its hooks
    if pruner._is_wrapped:
        pruner.unwrap_model()
    for wrapper in wrappers:
        if wrapper.module._modules.get(WRAPPER) is wrapper:
            wrapper.unwrap()


def _hand_over(optimizer: Optimizer, heirs: dict[nn.Parameter, nn.Parameter | None]) -> None:
    """Let an optimizer go on with other Parameters; those without an heir leave it."""
    present = {p for group in optimizer.param_groups for p in group["params"]}
    for group in optimizer.param_groups:
        names = group.get("param_names", [""] * len(group["params"]))
        left: list[tuple[nn.Parameter, str]] = []
        for parameter, name in zip(group["params"], names, strict=True):
            heir = heirs.get(parameter, parameter)
            if heir is not parameter:
                state = optimizer.state.pop(parameter, None)
                if heir is None or heir in present:
                    continue
                if state is not None:
                    optimizer.state[heir] = state
            left.append((heir, name.replace(WRAPPER + ".", "")))
        group["params"] = [parameter for parameter, _ in left]
        if "param_names" in group:
            group["param_names"] = [name for _, name in left]


def _remove_channels(model: nn.Module, layers: set[str]) -> None:
    """Mask what else makes an output channel of which no weight is left: its bias, and its place in a BatchNorm."""
    left: dict[str, Tensor] = {}
    for name in layers:
        module = model.get_submodule(name)
        parametrization = TensorRef(module).parametrization if isinstance(module, (_ConvNd, nn.Linear)) else None
        if parametrization is not None and parametrization.mask is not None:
            channels = outputs_left(module, parametrization.mask)
            if not bool(channels.all()):
                left[name] = channels
    for name, channels in left.items():
        module = model.get_submodule(name)
        if module.bias is not None:
            TensorRef(module, "bias").add_mask(channels)
    if not left or not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    norms = following(model, left)
    if norms is None:
        warnings.warn(
            "the model's forward cannot be traced, so that the BatchNorms behind pruned channels were left as they "
            f"are and may turn them into constants: layers {', '.join(sorted(left))}",
            stacklevel=3,
        )
        return
    for layer, norm in norms.items():
        module = model.get_submodule(norm)
        assert isinstance(module, _BatchNorm)
        if module.num_features != len(left[layer]):
            continue
        if module.affine:
            TensorRef(module, "weight").add_mask(left[layer])
            TensorRef(module, "bias").add_mask(left[layer])
        elif module.running_mean is not None:
            module.running_mean.mul_(left[layer])
