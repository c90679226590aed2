"""Masks of whole models: read them, set them, adopt those of `torch.nn.utils.prune`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..errors import LayerCollapseWarning, MaskError
from . import torch_masks
from .tensor_ref import Model, TensorRef, check_not_sharded, parametrized_by_another, prunable_tensors, unknown_layer

#: A layer is thin if its density is below this fraction of the density of all layers together.
THIN = 0.1


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The mask of every pruned layer: ours, that of `torch.nn.utils.prune`, or what both keep.

    Args:
        model: not changed.

    Returns:
        {layer name: bool tensor of the shape of its coefficients}, True = kept; copies. Only of layers of
        which something is pruned. Inverse: `set_masks`.

    >>> from torch.nn.utils import prune
    >>> model = prune.l1_unstructured(nn.Linear(2, 2, bias=False), "weight", amount=3)
    >>> int(masks(model)[""].sum())
    1
    """
    by_layer = {layer.module_name: layer.mask for layer in prunable_tensors(model)}
    return {name: mask for name, mask in by_layer.items() if mask is not None}


def set_masks(model: Model, masks: Mapping[str, Tensor]) -> Model:
    """Set masks of layers, in either space; they replace the masks that these layers have.

    A masked entry contributes nothing and gets no gradient; its value stays in the Parameter. Masks are bool buffers of
    the layer's parametrization: they move, copy and save with the model.

    Args:
        model: changed in place.
        masks: {layer name: tensor of the shape of its coefficients, of bools or of zeros and ones}, True = kept.
            Other layers keep their masks.

    Returns:
        The model.

    Raises:
        SelectionError: a name that is not a prunable layer of the model.
        MaskError: a mask of the wrong shape or with other values.
        ConversionError: the weight is parametrized by someone else, or the model is sharded. In all cases the model
            is unchanged.

    >>> import torch
    >>> model = set_masks(nn.Linear(2, 1), {"": torch.tensor([[True, False]])})
    >>> masks(model)
    {'': tensor([[ True, False]])}
    """
    check_not_sharded(model)
    known = {layer.module_name: layer for layer in prunable_tensors(model)}
    others = dict(model.named_modules())
    checked: list[tuple[TensorRef, Tensor]] = []
    for name, mask in masks.items():
        if name not in known:
            if name in others and hasattr(others[name], "parametrizations"):
                raise parametrized_by_another(name, "another package")
            raise unknown_layer(name, known, argument="masks")
        checked.append((known[name], _checked(name, mask, known[name].parameter)))
    for layer, mask in checked:
        layer.set_mask(mask)
    return model


def _checked(name: str, mask: object, coefficients: Tensor) -> Tensor:
    """A mask as bools."""
    if not isinstance(mask, Tensor):
        wrong = f"a {type(mask).__name__}"
    elif mask.shape != coefficients.shape:
        wrong = f"shape {tuple(mask.shape)}"
    elif bool((mask == (mask != 0).to(mask.dtype)).all()):
        return mask.detach() != 0
    else:
        wrong = "values other than 0 and 1"
    raise MaskError(
        f"The mask of layer {name!r} must be a tensor of shape {tuple(coefficients.shape)} of bools or zeros and ones.",
        wrong,
        "make it like the tensor that `ip_plugin.prunable(model)` names; True keeps an entry",
    )


def adopt_masks(model: Model) -> Model:
    """Replace the masks of `torch.nn.utils.prune` on prunable tensors by masks of ours, and remove its hooks.

    Afterwards the model can be copied with ``copy.deepcopy``, its weights can be assigned, and its Parameters have
    their plain names again, with the unmasked values (of ``weight_orig``).

    Args:
        model: changed in place; masks of tensors that `prunable` does not list (biases) stay as they are.

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
    """Warn about layers whose density is less than a tenth of that of all layers that were pruned together.

    Args:
        masks: (name or description of the layer, mask) of all layers that were pruned together.
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
