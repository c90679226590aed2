"""Verbs on whole models: `interspace`, `bake`, `prunable`."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from ..basis import bases
from ..basis.bases import CONSTRAINTS, BasisSpec, Constraint
from ..basis.fitting import Kernels, fit, kernel_rows, largest
from ..errors import (
    AlreadyInterspaceError,
    AlreadyParametrizedError,
    AlreadyPrunedError,
    InvalidBasisError,
    LayerSelectionError,
    NoLayerMatchedError,
    NotConvertibleError,
    SharingError,
    TiedWeightError,
    UnknownLayerError,
    UnsupportedDtypeError,
    WrappedModelError,
)
from ..utils.validation import check_fraction
from . import torch_masks
from .optimizer import check_trains, join_optimizer, note_conversion, watch
from .parametrization import Interspace, enter, leave, parametrizations
from .tensor_ref import Model, Target, TensorRef, check_finite, check_no_other, parametrized_tensors, prunable_tensors

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

    The network computes what it computed before, bit for bit with the standard basis. The Parameter that was a layer's
    ``weight`` holds the coefficients from now on (same object, same shape), so pruners act on them and an optimizer
    goes on training them; the bases must join that optimizer, which `optimizer` does. Inverse: `bake`.

    After Wimmer, Mehnert and Condurache, "Interspace Pruning: Using Adaptive Filter Representations to Improve
    Training of Sparse CNNs", CVPR 2022, arXiv 2203.07808; an independent implementation.

    Args:
        model: changed in place. Conv1d/2d/3d and ConvTranspose1d/2d/3d and their subclasses are converted, except
            where the kernel has one element (1x1), whose basis would be one number.
        basis: ``"standard"`` (coefficients equal the weights), ``"orthonormal"`` (random), ``"dct"`` (DCT-II),
            ``"fitted"`` (orthonormal, made for the present kernels: few large coefficients), or a tensor ``(N, N)`` or
            ``(N, *kernel)`` whose rows are filters, ``N = prod(kernel)``.
        sharing: which layers share one basis: ``"layer"`` (none do), ``"model"`` (all of one kernel shape), or a
            callable (name, module) -> hashable; layers with equal values share.
        layers: names of the layers to convert, or a predicate (name, module) -> bool that is asked for each of the
            convolutions that can be converted; None converts them all.
        constraint: what holds of the filters however they are trained: ``"unit"`` norm, ``"orthonormal"``, or
            ``"none"``. Without one, a free scale between coefficients and filters moves as they are trained, and
            magnitudes of coefficients cannot be compared with those of weights, nor with each other.
        train_basis: whether bases require gradients; the basis of frozen coefficients never does.
        seed: seed of ``"orthonormal"``, and of the sample that ``"fitted"`` looks at first.
        sparsity: what ``"fitted"`` is fitted for; nothing is pruned (`ip_plugin.methods.prune_fitted` does both).
        optimizer: one that was built before and trains the model: the bases join it at once, as by `join_optimizer`.

    Returns:
        The model.

    Raises:
        InterspaceError: one of its subclasses says what is wrong; the model is as it was.

    Warns:
        UserWarning: later, once, if an optimizer steps the coefficients and none has the bases that should be trained.

    Note:
        The weight of a layer is computed, and can be written all the same: ``conv.weight = value``,
        ``nn.init.zeros_(conv.weight)``, ``conv.weight.data[0] *= 2`` and ``conv.reset_parameters()`` give the layer
        coefficients of what was written. What numpy writes into its memory is lost.

    Note:
        ``load_state_dict`` copies into a shared basis and keeps it shared, with ``assign=True`` too. Only on the meta
        device does ``assign=True`` give every layer a basis of its own.

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
        raise InvalidBasisError(
            'basis="fitted" and `sparsity` belong together.',
            f"{basis!r} and sparsity {sparsity}",
            "give both, or neither",
        )
    if sparsity is not None:
        check_fraction(sparsity)
    if constraint not in CONSTRAINTS:
        raise InvalidBasisError(
            '`constraint` must be "unit", "orthonormal" or "none".', f"{constraint!r}", 'leave it out: "unit"'
        )
    groups = groups_of(model, sharing, layers)
    if optimizer is not None:
        check_trains(optimizer, [layer for members in groups for layer in members])
    generator = torch.Generator("cpu").manual_seed(seed)
    plans = []
    for members in groups:
        values = bases.normalized(_basis(members, basis, sparsity, generator), constraint).to(
            members[0].parameter.dtype
        )
        filters = bases.constrained(values, constraint)
        plans.append((members, values, filters, None if bases.is_standard(filters) else bases.inverse(filters)))
    # Everything that can be wrong has been refused; from here on the model changes.
    for members, values, filters, inverse in plans:
        weights = [layer.parameter for layer in members]
        trained = train_basis and any(weight.requires_grad for weight in weights)
        parameter = nn.Parameter(values.to(weights[0].device, copy=True), requires_grad=trained)
        for layer, weight in zip(members, weights, strict=True):
            space = Interspace(parameter, _kernel(layer), constraint)
            enter(layer.module, "weight", space)
            if inverse is not None:
                bases.transform_(weight.detach(), inverse)
                if weight.grad is not None:
                    bases.transform_(weight.grad, filters.mT)
            note_conversion(weight, changed=inverse is not None)
    watch(model)
    return model if optimizer is None else join_optimizer(model, optimizer)


def groups_of(model: nn.Module, sharing: Sharing, selection: Selection = None) -> list[list[TensorRef]]:
    """The layers that `interspace` would convert, those together that would share a basis; raises what it raises."""
    chosen = _select(model, selection)
    _check(model, chosen)
    return _grouped(chosen, sharing)


def _basis(
    members: list[TensorRef], basis: BasisSpec | Literal["fitted"], sparsity: float | None, generator: torch.Generator
) -> Tensor:
    """The basis that some layers share, float64."""
    if not isinstance(basis, str) or basis != "fitted":
        return bases.make(basis, _kernel(members[0]), generator)
    assert sparsity is not None
    if any(layer.parameter.is_meta for layer in members):
        raise InvalidBasisError(
            "A basis must have kernels to be fitted to.", "weights on the meta device", "load the weights before"
        )
    kernels = [Kernels(kernel_rows(layer.parameter), 0, _kernel(layer)) for layer in members]
    return fit(kernels, largest(1 - sparsity), seed=generator.initial_seed()).bases[0]


def _kernel(layer: TensorRef) -> tuple[int, ...]:
    return tuple(layer.parameter.shape[2:])


def _select(model: nn.Module, selection: Selection) -> list[TensorRef]:
    """The layers to convert, in model order."""
    modules = dict(model.named_modules())
    candidates = [TensorRef(module, "weight", name) for name, module in modules.items() if _obstacle(module) is None]
    if selection is None:
        chosen = candidates
    elif isinstance(selection, str) or not (callable(selection) or isinstance(selection, Iterable)):
        raise LayerSelectionError(selection)
    elif callable(selection):
        chosen = [layer for layer in candidates if selection(layer.module_name, layer.module)]
    else:
        names = dict.fromkeys(selection)
        for name in names:
            if not isinstance(name, str) or name not in modules:
                raise UnknownLayerError(str(name), modules)
            obstacle = _obstacle(modules[name])
            if obstacle is not None:
                raise NotConvertibleError(name, obstacle)
        chosen = [layer for layer in candidates if layer.module_name in names]
    if not chosen:
        raise NoLayerMatchedError(len(candidates), selection is not None)
    return chosen


def _obstacle(module: nn.Module) -> str | None:
    """Why a module cannot be in the interspace; None if it can."""
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
    """The weight if it is stored as such; None if it is computed. Asking a parametrization could change its state."""
    if parametrize.is_parametrized(module, "weight"):
        return None
    found = getattr(module, "weight", None)
    return found if isinstance(found, Tensor) else None


def _check(model: nn.Module, chosen: list[TensorRef]) -> None:
    """Refuse what cannot be converted, before anything has changed."""
    for module in model.modules():
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise WrappedModelError(type(module).__name__)
    converted = [layer.module_name for layer in chosen if layer.interspace is not None]
    if converted:
        raise AlreadyInterspaceError(converted)
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    for layer in chosen:
        if layer.parametrization is not None:
            raise AlreadyPrunedError(layer.module_name, "by a mask of ip_plugin")
        if "weight" in torch_masks.pruned_names(layer.module):
            raise AlreadyPrunedError(layer.module_name, "by torch.nn.utils.prune")
        if parametrize.is_parametrized(layer.module, "weight"):
            found = parametrizations(layer.module).weight
            raise AlreadyParametrizedError(layer.module_name, ", ".join(type(p).__name__ for p in found))
        weight = layer.parameter
        if not isinstance(weight, nn.Parameter):
            raise AlreadyParametrizedError(layer.module_name, "a hook: it is a plain tensor, not a Parameter")
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise NotConvertibleError(layer.module_name, "its weight is not initialised yet; run the model once")
        if len(owners[id(weight)]) > 1:
            raise TiedWeightError(owners[id(weight)])
        if not weight.is_floating_point():
            raise UnsupportedDtypeError(layer.module_name, weight.dtype)
        if not weight.is_meta:
            check_finite(layer.module_name, weight)


def _grouped(chosen: list[TensorRef], sharing: Sharing) -> list[list[TensorRef]]:
    """Layers that share a basis, together; every group has one kernel shape, dtype and device."""
    if sharing != "layer" and sharing != "model" and not callable(sharing):
        raise SharingError.unknown(repr(sharing))
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
            raise SharingError.unknown(
                f"it returned {key!r} for layer {layer.module_name!r}, which is not hashable"
            ) from None
        if members:
            first = members[0].parameter
            for what, its, other in (
                ("kernel shape", _kernel(members[0]), _kernel(layer)),
                ("dtype", first.dtype, weight.dtype),
                ("device", first.device, weight.device),
            ):
                if its != other:
                    raise SharingError.mismatch(what, members[0].module_name, its, layer.module_name, other)
        members.append(layer)
    return list(groups.values())


def bake(model: Model) -> Model:
    """Make a model ordinary again: compose its weights, apply every mask, remove what was added.

    Classes, Parameter objects and the order of parameters are those from before `interspace`; a plain model without
    masks stays as it is. Masks of `torch.nn.utils.prune` are applied and removed too. Kernels that were sparse in the
    interspace are dense afterwards: measure with `report` and save compactly before. Gradients of coefficients are
    dropped, and optimizer state of them belongs to the coefficients, not to the weights. Inverse: `interspace`.

    Args:
        model: changed in place.

    Returns:
        The model.

    Raises:
        AlreadyParametrizedError: someone else's parametrization sits on top of ours; the model is as it was.

    >>> conv = nn.Conv2d(3, 16, 3)
    >>> weight = conv.weight
    >>> bake(interspace(conv)).weight is weight
    True
    """
    refs = parametrized_tensors(model)
    check_no_other(refs)
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


def prunable(model: nn.Module) -> list[Target]:
    """What a pruner should act on: every target of a model, in either space.

    Args:
        model: not changed.

    Returns:
        (module, tensor name) pairs as `torch.nn.utils.prune` takes them: the coefficients of interspace layers, the
        ``weight`` of other convolutions and linear layers, in the order of ``named_modules``. A weight that several
        layers share is listed once. Biases, norms and embeddings are no targets.

    >>> from torch.nn.utils import prune
    >>> model = interspace(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16, 10)))
    >>> [tensor_name for _, tensor_name in prunable(model)]
    ['original', 'weight']
    >>> prune.global_unstructured(prunable(model), prune.L1Unstructured, amount=0.9)
    """
    return [ref.target for ref in prunable_tensors(model)]
