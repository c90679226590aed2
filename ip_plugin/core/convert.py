"""Conversion of whole models: `interspace`, `bake`, and `prunable`, which lists what to prune."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from ..basis import bases
from ..basis.bases import CONSTRAINTS, BasisSpec, Constraint
from ..basis.fitting import Kernels, fit, kernel_rows, largest
from ..errors import ArgumentError, BasisError, ConversionError, SelectionError, listed
from ..utils.validation import check_fraction
from . import torch_masks
from .optimizer import check_trains, join_optimizer, note_conversion, watch
from .parametrization import Interspace, enter, leave, parametrizations
from .tensor_ref import (
    Model,
    Target,
    TensorRef,
    add_masks,
    check_finite,
    check_no_other,
    check_not_sharded,
    parametrized_by_another,
    parametrized_tensors,
    prunable_tensors,
    unknown_layer,
)

Selection: TypeAlias = Iterable[str] | Callable[[str, nn.Module], bool] | None
Sharing: TypeAlias = Literal["layer", "model"] | Callable[[str, nn.Module], Hashable]


def interspace(
    model: Model,
    *,
    basis: BasisSpec | Literal["fitted"] = "standard",
    sharing: Sharing = "layer",
    layers: Selection = None,
    constraint: Constraint = "unit",
    train_basis: bool = True,
    seed: int = 0,
    sparsity: float | None = None,
    optimizer: Optimizer | None = None,
) -> Model:
    """Move convolutions to the interspace: write their kernels as linear combinations of a trainable filter basis.

    The outputs of the network do not change, bit for bit with the standard basis. The Parameter that was a layer's
    ``weight`` holds the coefficients from now on (same object, same shape), so pruners act on them and an optimizer
    goes on training them. The bases must join that optimizer: pass it as `optimizer`. Inverse: `bake`.

    After Wimmer, Mehnert and Condurache, "Interspace Pruning: Using Adaptive Filter Representations to Improve
    Training of Sparse CNNs", CVPR 2022, arXiv 2203.07808; an independent implementation.

    Args:
        model: changed in place. Conv1d/2d/3d and ConvTranspose1d/2d/3d and their subclasses are converted, except
            where the kernel has one element (1x1), whose basis would be one number.
        basis: ``"standard"`` (coefficients equal the weights), ``"orthonormal"`` (random), ``"dct"`` (DCT-II),
            ``"fitted"`` (orthonormal, fitted to the present kernels so that few coefficients are large), or a tensor
            ``(N, N)`` or ``(N, *kernel)`` whose rows are filters, ``N = prod(kernel)``.
        sharing: which layers share one basis: ``"layer"`` (none do), ``"model"`` (all of one kernel shape), or a
            callable (name, module) -> hashable; layers with equal values share.
        layers: names of the layers to convert, or a predicate (name, module) -> bool, called for each convolution that
            can be converted. None converts them all, except those whose weight someone else computes (weight norm,
            spectral norm), and kernels of more than 49 elements whose basis would have at least as many numbers as its
            coefficients.
        constraint: of the filters during training: ``"unit"`` norm, ``"orthonormal"``, or ``"none"``. With ``"none"``
            the filter scale (see `normalize`) drifts, so magnitudes of coefficients are not comparable.
        train_basis: whether bases require gradients; the basis of frozen coefficients never does.
        seed: of ``"orthonormal"``, and of the sample of kernels that ``"fitted"`` uses first.
        sparsity: what ``"fitted"`` is fitted for; nothing is pruned (`ip_plugin.methods.prune_fitted` does both).
        optimizer: an existing optimizer of the model; the bases join it, as by `join_optimizer`.

    Returns:
        The model.

    Raises:
        SelectionError: `layers` matches nothing, or names a layer that cannot be converted.
        ConversionError: a layer is converted, parametrized, pruned, tied, wrapped, sharded, not initialised or not
            finite.
        BasisError: a basis that cannot represent every kernel, or layers that cannot share one.
        ArgumentError, AmountError, OptimizerError: another argument is invalid. In all cases the model is unchanged.

    Warns:
        UserWarning: once for each of these two exceptions, with the names of the layers; and later, once, if an
            optimizer steps coefficients whose trainable bases are in no optimizer.

    Note:
        The weight of a layer is computed, but can be written: ``conv.weight = value``, ``nn.init.zeros_(conv.weight)``,
        ``conv.weight.data[0] *= 2`` and ``conv.reset_parameters()`` set the coefficients that give these weights.
        Writes through numpy are lost.

    Note:
        A state dict has a basis once, under the key of the first of the layers that share it. ``load_state_dict``
        takes it from the key of any of them, and keeps it shared, with ``assign=True`` too.

    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    >>> x = torch.randn(1, 3, 8, 8)
    >>> before = model(x)
    >>> torch.equal(interspace(model)(x), before)
    True
    >>> model[0].parametrizations.weight
    ParametrizationList(
      (0): Interspace(kernel=3x3, basis=9 filters, constraint=unit)
    )
    """
    if (isinstance(basis, str) and basis == "fitted") != (sparsity is not None):
        raise ArgumentError(
            'basis="fitted" and `sparsity` belong together.',
            f"{basis!r} and sparsity {sparsity}",
            "give both, or neither",
        )
    if sparsity is not None:
        check_fraction(sparsity)
    if constraint not in CONSTRAINTS:
        rule = '`constraint` must be "unit", "orthonormal" or "none".'
        raise ArgumentError(rule, f"{constraint!r}", 'leave it out: "unit"')
    groups = groups_of(model, sharing, layers)
    if optimizer is not None:
        check_trains(optimizer, [layer for members in groups for layer in members])
    generator = torch.Generator("cpu").manual_seed(seed)
    plans = []
    for members in groups:
        values = bases.normalized(_basis(members, basis, sparsity, generator), constraint)
        values = values.to(members[0].parameter.dtype)
        filters = bases.constrained(values, constraint)
        plans.append((members, values, filters, None if bases.is_standard(filters) else bases.inverse(filters)))
    # All arguments have been checked; from here on the model changes.
    for members, values, filters, inverse in plans:
        weights = [layer.parameter for layer in members]
        trained = train_basis and any(weight.requires_grad for weight in weights)
        parameter = nn.Parameter(values.to(weights[0].device, copy=True), requires_grad=trained)
        for layer, weight in zip(members, weights, strict=True):
            if layer.chain is not None:  # a mask that keeps everything
                leave(layer.module, "weight", weight.detach())
            enter(layer.module, "weight", Interspace(parameter, _kernel(layer), constraint))
            if inverse is not None:
                bases.transform_(weight.detach(), inverse)
                if weight.grad is not None:
                    bases.transform_(weight.grad, filters.mT)
            note_conversion(weight, changed=inverse is not None)
    add_masks(model)
    watch(model)
    return model if optimizer is None else join_optimizer(model, optimizer)


def groups_of(model: nn.Module, sharing: Sharing, selection: Selection = None) -> list[list[TensorRef]]:
    """The layers that `interspace` would convert, grouped by shared basis. Raises and warns as `interspace` does."""
    chosen = _select(model, selection)
    computed: list[TensorRef] = []
    if selection is None and not all(map(_computed_by, chosen)):
        computed = [layer for layer in chosen if _computed_by(layer)]
        chosen = [layer for layer in chosen if layer not in computed]
    _check(model, chosen)
    groups = _grouped(chosen, sharing)
    costly = [members for members in groups if selection is None and is_costly(members)]
    if len(costly) == len(groups):
        raise SelectionError(
            "A basis should have fewer numbers than the coefficients that it serves.",
            f"kernels of {_kernel(costly[0][0])}, and no other convolution larger than 1x1",
            "name the layers in `layers=` to convert them all the same",
        )
    if computed:
        warnings.warn(
            f"layers {listed(layer.module_name for layer in computed)} stay spatial: their weights are computed by "
            f"someone else ({', '.join(sorted({str(_computed_by(layer)) for layer in computed}))}). Remove that first "
            "to convert them",
            stacklevel=3,
        )
    if costly:
        warnings.warn(
            f"layers {listed(layer.module_name for members in costly for layer in members)} stay spatial: their "
            "kernels are so large that a basis would have at least as many numbers as their coefficients. They can be "
            "pruned all the same; name them in `layers=` to convert them",
            stacklevel=3,
        )
    return [members for members in groups if members not in costly]


def is_costly(members: list[TensorRef]) -> bool:
    """Whether layers that would share a basis stay spatial by default: kernels above 7x7 whose basis does not pay."""
    return math.prod(_kernel(members[0])) > 49 and not basis_pays(members)


def basis_pays(members: list[TensorRef], share: float = 1.0) -> bool:
    """Whether the basis of layers that share it has less numbers than this share of their coefficients."""
    return math.prod(_kernel(members[0])) ** 2 < share * sum(layer.parameter.numel() for layer in members)


def _basis(
    members: list[TensorRef], basis: BasisSpec | Literal["fitted"], sparsity: float | None, generator: torch.Generator
) -> Tensor:
    """The initial basis of layers that share one, float64."""
    if not isinstance(basis, str) or basis != "fitted":
        return bases.make(basis, _kernel(members[0]), generator)
    assert sparsity is not None
    if any(layer.parameter.is_meta for layer in members):
        raise BasisError(
            "A basis must have kernels to be fitted to.", "weights on the meta device", "load the weights before"
        )
    kernels = [Kernels(kernel_rows(layer.parameter), 0, _kernel(layer)) for layer in members]
    return fit(kernels, largest(1 - sparsity), seed=generator.initial_seed()).bases[0]


def _kernel(layer: TensorRef) -> tuple[int, ...]:
    return tuple(layer.parameter.shape[2:])


def _select(model: nn.Module, selection: Selection) -> list[TensorRef]:
    """The layers to convert, in model order."""
    modules = dict(model.named_modules())
    candidates = [TensorRef(module, "weight", name) for name, module in modules.items() if obstacle(module) is None]
    if selection is None:
        chosen = candidates
    elif isinstance(selection, str) or not (callable(selection) or isinstance(selection, Iterable)):
        raise SelectionError(
            "`layers` must be None, an iterable of module names, or a predicate (name, module) -> bool.",
            f"{type(selection).__name__} {selection!r}",
            f"write layers=[{selection!r}]" if isinstance(selection, str) else "pass a list of names",
        )
    elif callable(selection):
        chosen = [layer for layer in candidates if selection(layer.module_name, layer.module)]
    else:
        names = dict.fromkeys(selection)
        for name in names:
            if not isinstance(name, str) or name not in modules:
                raise unknown_layer(str(name), modules)
            reason = obstacle(modules[name])
            if reason is not None:
                raise SelectionError(
                    "Only convolutions whose kernel has more than one element have a filter basis.",
                    f"layer {name!r}: {reason}",
                    f"leave {name!r} out of `layers`; it stays spatial and can be pruned all the same",
                )
        chosen = [layer for layer in candidates if layer.module_name in names]
    if not chosen:
        raise SelectionError(
            "At least one convolution whose kernel has more than one element must be selected.",
            f"{len(candidates)} such convolutions in the model, none of them "
            f"{'there to convert' if selection is None else 'selected by `layers`'}",
            "pass a model with convolutions larger than 1x1, or widen `layers`",
        )
    return chosen


def obstacle(module: nn.Module) -> str | None:
    """The reason why a module cannot be in the interspace; None if it can."""
    if not isinstance(module, _ConvNd):
        return f"a {type(module).__name__}, not a convolution"
    weight = _raw_weight(module)
    if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
        kernel = module.kernel_size
    else:
        kernel = tuple(weight.shape[2:])
    if math.prod(kernel) == 1:
        return "its kernel has one element, so its basis would be one number"
    return None


def _raw_weight(module: nn.Module) -> Tensor | None:
    """The weight, or None if a parametrization computes it: computing it could change the parametrization's state."""
    weight = None if parametrize.is_parametrized(module, "weight") else getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _computed_by(layer: TensorRef) -> str | None:
    """What someone else's code computes the weight; None if it is a Parameter, or masked."""
    if layer.chain is not None or "weight" in torch_masks.pruned_names(layer.module):
        return None
    if parametrize.is_parametrized(layer.module, "weight"):
        return ", ".join(type(other).__name__ for other in parametrizations(layer.module).weight)
    return None if isinstance(layer.parameter, nn.Parameter) else "a hook: it is a plain tensor, not a Parameter"


def _check(model: nn.Module, chosen: list[TensorRef]) -> None:
    """Raise unless every chosen layer can be converted."""
    check_not_sharded(model)
    for module in model.modules():
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            wrapper = type(module).__name__
            raise ConversionError(
                "A model must be converted before it is wrapped: the wrapper would not see the new bases.",
                f"the model is or contains a {wrapper}",
                f"call interspace(model) first, then {wrapper}(model)",
            )
    converted = [layer.module_name for layer in chosen if layer.interspace is not None]
    if converted:
        raise ConversionError(
            "A layer can be moved to the interspace once.",
            f"already there: {listed(converted)}",
            "select the other layers with `layers=`, or call `ip_plugin.bake(model)` first",
        )
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    for layer in chosen:
        _check_layer(layer, owners)


def _check_layer(layer: TensorRef, owners: Mapping[int, list[str]]) -> None:
    """Raise unless a layer can be converted.

    Args:
        layer: with a kernel of more than one element.
        owners: {id of a Parameter: names of the modules that have it}.
    """
    name, pruned_by_host = layer.module_name, "weight" in torch_masks.pruned_names(layer.module)
    if layer.mask is not None or pruned_by_host:
        how = "by torch.nn.utils.prune" if pruned_by_host else "by a mask of ip_plugin"
        raise ConversionError(
            "A weight that moves to the interspace must not be pruned: its mask is one of weights, not coefficients.",
            f"layer {name!r}: pruned {how}",
            "convert first and prune then, or make the zeros permanent with ip_plugin.bake(model) before",
        )
    computed_by = _computed_by(layer)
    if computed_by is not None:
        raise parametrized_by_another(name, computed_by)
    weight = layer.parameter
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ConversionError(
            "A layer must be initialised before it is converted.",
            f"layer {name!r}: its weight is not initialised yet",
            "run the model once, or leave the layer out with `layers=`",
        )
    if len(owners[id(weight)]) > 1:
        raise ConversionError(
            "The weight of a layer that moves to the interspace must belong to that layer alone.",
            f"one Parameter is the weight of {listed(owners[id(weight)])}",
            "untie the weights, or leave these layers out with `layers=`",
        )
    if not weight.is_floating_point():
        raise ConversionError(
            "Weights must be real floating point tensors (float16, bfloat16, float32, float64).",
            f"layer {name!r}: {weight.dtype}",
            f"convert the layer with .float(), or leave {name!r} out of `layers`",
        )
    if not weight.is_meta:
        check_finite(name, weight)


def _grouped(chosen: list[TensorRef], sharing: Sharing) -> list[list[TensorRef]]:
    """The layers grouped by shared basis; every group has one kernel shape, dtype and device."""
    rule = '`sharing` must be "layer", "model" or a callable (name, module) -> hashable.'
    remedy = 'pass one of these; "layer" gives every layer a basis of its own'
    if sharing != "layer" and sharing != "model" and not callable(sharing):
        raise ArgumentError(rule, repr(sharing), remedy)
    groups: dict[Hashable, list[TensorRef]] = {}
    for layer in chosen:
        weight = layer.parameter
        key: Hashable
        if callable(sharing):
            key = sharing(layer.module_name, layer.module)
        elif sharing == "model":
            key = (_kernel(layer), weight.dtype, weight.device)
        else:
            key = layer.module_name
        try:
            members = groups.setdefault(key, [])
        except TypeError:
            unhashable = f"it returned {key!r} for layer {layer.module_name!r}, which is not hashable"
            raise ArgumentError(rule, unhashable, remedy) from None
        if members:
            first = members[0].parameter
            for what, its, other in (
                ("kernel shape", _kernel(members[0]), _kernel(layer)),
                ("dtype", first.dtype, weight.dtype),
                ("device", first.device, weight.device),
            ):
                if its != other:
                    raise BasisError(
                        f"Layers that share a basis must have the same {what}.",
                        f"layer {members[0].module_name!r} has {what} {its}, "
                        f"layer {layer.module_name!r} has {what} {other}",
                        f"let `sharing` return different keys for them, for example (key, {what})",
                    )
        members.append(layer)
    return list(groups.values())


def bake(model: Model) -> Model:
    """Make a model ordinary again: compose its weights, apply every mask, remove all parametrizations of ours.

    Classes, Parameter objects and the order of parameters are those from before `interspace`; a plain model without
    masks stays as it is. Masks of `torch.nn.utils.prune` are applied and removed, too. Kernels that were sparse in the
    interspace become dense: call `report` and `save` before. Gradients of coefficients are dropped; optimizer state
    that was gathered for coefficients does not fit the weights. Inverse: `interspace`.

    Args:
        model: changed in place.

    Returns:
        The model.

    Raises:
        ConversionError: someone else's parametrization sits on top of ours, or the model is sharded; it is unchanged.

    >>> conv = nn.Conv2d(3, 16, 3)
    >>> weight = conv.weight
    >>> bake(interspace(conv)).weight is weight
    True
    """
    check_not_sharded(model)
    refs = parametrized_tensors(model)
    check_no_other(refs)
    _warn_of_tied_masks(model, refs)
    with torch.no_grad():
        for module in model.modules():
            for tensor_name in torch_masks.pruned_names(module):
                kept = torch_masks.take_off(module, tensor_name)
                assert kept is not None
                module.get_parameter(tensor_name).mul_(kept)
        for ref in refs:
            if ref.interspace is not None:
                ref.parameter.grad = None
            leave(ref.module, ref.tensor_name, ref.composed)
    return model


def _warn_of_tied_masks(model: nn.Module, refs: Iterable[TensorRef]) -> None:
    """Warn if a mask has zeros and other modules use the same Parameter without it."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter_name, parameter in module._parameters.items():
            users.setdefault(id(parameter), []).append(f"{name}.{parameter_name}")
    for ref in refs:
        others = [name for name in users[id(ref.parameter)] if ".parametrizations." not in f".{name}"]
        if others and ref.mask is not None and not bool(ref.mask.all()):
            warnings.warn(
                f"the zeros of {ref.name!r} are written into a Parameter that {listed(others)} uses without a mask: "
                "outputs change. To keep them, give the pruned layer a Parameter of its own before it is pruned",
                stacklevel=3,
            )


def prunable(model: nn.Module) -> list[Target]:
    """List what a pruner should act on, in either space.

    Args:
        model: not changed.

    Returns:
        (module, tensor name) pairs as `torch.nn.utils.prune` takes them, in the order of ``named_modules``: the
        coefficients of layers in the interspace, the weights of other convolutions and linear layers. In a converted
        model both are the ``original`` behind a parametrization, which holds the mask; in other models it is the
        ``weight`` of the layer. A weight that several layers share is listed once. Biases, norms and embeddings are not
        listed.

    >>> from torch.nn.utils import prune
    >>> model = interspace(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16, 10)))
    >>> [tensor_name for _, tensor_name in prunable(model)]
    ['original', 'original']
    >>> prune.global_unstructured(prunable(model), prune.L1Unstructured, amount=0.9)
    """
    return [ref.target for ref in prunable_tensors(model)]
