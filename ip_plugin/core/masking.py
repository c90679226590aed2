"""Masks of whole models: reading them, setting them, taking them over from `torch.nn.utils.prune`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..errors import AlreadyParametrizedError, InvalidMaskError, LayerCollapseWarning, UnknownLayerError
from . import torch_masks
from .tensor_ref import Model, TensorRef, prunable_tensors

#: Of the share of its entries that a layer keeps, to the share that all layers keep together.
THIN = 0.1


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The mask of every pruned layer: ours, `torch.nn.utils.prune`'s, or what both keep.

    Args:
        model: not changed.

    Returns:
        {layer name: bool tensor of the shape of its coefficients}, True = kept; copies. Layers without a mask are
        left out. Inverse: `set_masks`.

    >>> from torch.nn.utils import prune
    >>> model = prune.l1_unstructured(nn.Linear(2, 2, bias=False), "weight", amount=3)
    >>> int(masks(model)[""].sum())
    1
    """
    found = {layer.module_name: layer.mask for layer in prunable_tensors(model)}
    return {name: mask.clone() for name, mask in found.items() if mask is not None}


def set_masks(model: Model, masks: Mapping[str, Tensor]) -> Model:
    """Set masks of layers, in either space, instead of the masks that these layers had.

    A masked entry contributes nothing and gets no gradient; the Parameter behind it keeps its value. Masks are bool
    buffers of the layer's parametrization: they move, copy and save with the model.

    Args:
        model: changed in place.
        masks: {layer name: tensor of the shape of its coefficients, of bools or of zeros and ones}, True = kept.
            Layers that are not named keep the masks that they have.

    Returns:
        The model.

    Raises:
        UnknownLayerError: a name that is not a prunable layer of the model; the model is as it was.
        InvalidMaskError: a mask of the wrong shape or with other values; the model is as it was.
        AlreadyParametrizedError: the weight is parametrized by someone else; the model is as it was.

    >>> import torch
    >>> model = set_masks(nn.Linear(2, 1), {"": torch.tensor([[True, False]])})
    >>> masks(model)
    {'': tensor([[ True, False]])}
    """
    known = {layer.module_name: layer for layer in prunable_tensors(model)}
    others = dict(model.named_modules())
    checked: list[tuple[TensorRef, Tensor]] = []
    for name, mask in masks.items():
        if name not in known:
            if name in others and hasattr(others[name], "parametrizations"):
                raise AlreadyParametrizedError(name, "another package")
            raise UnknownLayerError(name, known, argument="masks")
        checked.append((known[name], _checked(name, mask, known[name].parameter)))
    for layer, mask in checked:
        layer.set_mask(mask)
    return model


def _checked(name: str, mask: object, coefficients: Tensor) -> Tensor:
    shape = coefficients.shape
    if not isinstance(mask, Tensor):
        raise InvalidMaskError(name, f"a {type(mask).__name__}", shape)
    if mask.shape != shape:
        raise InvalidMaskError(name, f"shape {tuple(mask.shape)}", shape)
    kept = mask.detach() != 0
    if not bool((mask == kept.to(mask.dtype)).all()):
        raise InvalidMaskError(name, "values other than 0 and 1", shape)
    return kept


def adopt_masks(model: Model) -> Model:
    """Take over the masks that `torch.nn.utils.prune` has put on targets: its hooks go, our masks stay.

    Afterwards the model copies with ``copy.deepcopy``, its weights can be assigned, and its Parameters have their
    names back, with the values that they had (the host's ``weight_orig``).

    Args:
        model: changed in place; masks of tensors that are no targets (biases) stay with the host.

    Returns:
        The model.

    >>> from torch.nn.utils import prune
    >>> model = adopt_masks(prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5))
    >>> prune.is_pruned(model), int(masks(model)[""].sum())
    (False, 8)
    """
    for layer in prunable_tensors(model):
        if torch_masks.mask(*layer.target) is not None:
            mask = layer.mask
            assert mask is not None
            layer.set_mask(mask)
    return model


def warn_of_thin_layers(masks: Sequence[tuple[str, Tensor]], stacklevel: int = 3) -> None:
    """Warn once of layers that a common threshold leaves with less than a tenth of the share that all keep together.

    Args:
        masks: (name or description of a layer, what it keeps) of all that were pruned together.
        stacklevel: of the warning.

    >>> import torch
    >>> kept = [("conv", torch.ones(100, dtype=torch.bool)), ("fc", torch.arange(20) < 0)]
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warn_of_thin_layers(kept)
    >>> str(caught[0].message)[:76]
    'layers keep less than a tenth of the share of entries that all keep together'
    """
    kept, size = sum(int(mask.sum()) for _, mask in masks), sum(mask.numel() for _, mask in masks)
    thin = [name for name, mask in masks if int(mask.sum()) * size < THIN * kept * mask.numel()]
    if thin:
        listed = ", ".join(thin[:6]) + (f" and {len(thin) - 6} more" if len(thin) > 6 else "")
        warnings.warn(
            f"layers keep less than a tenth of the share of entries that all keep together: {listed}. Rank by LAMP "
            "(`ip_plugin.methods.prune(model, lamp, sparsity=...)`), keep a minimum in each (its `min_per_layer=`), or "
            "use one threshold for each layer",
            LayerCollapseWarning,
            stacklevel=stacklevel,
        )
