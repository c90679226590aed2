"""Infer layer attributes from tensor shapes, so that channel-pruned checkpoints load into the unpruned architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


def resized(module: nn.Module, shapes: Shapes, groups: int) -> dict[str, Any] | str:
    """The attributes that a layer must have for its tensors to have the given shapes.

    Args:
        module: not changed.
        shapes: {name: shape} of its Parameters and buffers: the present number of dimensions, each at most as large.
        groups: of a convolution.

    Returns:
        {attribute: value}, or a description of what is wrong.

    >>> resized(nn.Conv2d(8, 16, 3), {"weight": (12, 6, 3, 3), "bias": (12,)}, 1)
    {'out_channels': 12, 'in_channels': 6, 'groups': 1}
    >>> resized(nn.Conv2d(8, 16, 3), {"weight": (12, 6, 3, 3), "bias": (10,)}, 1)
    'bias has shape (10,) beside 12 channels'
    """
    if isinstance(module, _ConvNd):
        return _convolution(module, shapes, groups)
    for kind, attributes in _KINDS.items():
        if isinstance(module, kind):
            return attributes(module, shapes)
    return f"a {type(module).__name__}, whose attributes cannot be inferred from its shapes"


def _convolution(module: Any, shapes: Shapes, groups: int) -> dict[str, Any] | str:
    first, second, *kernel = shapes["weight"]
    if tuple(kernel) != tuple(module.kernel_size):
        return f"kernel {tuple(kernel)}, and the layer's is {tuple(module.kernel_size)}"
    out, inside = (second * groups, first) if isinstance(module, _ConvTransposeNd) else (first, second * groups)
    if out % groups or inside % groups or groups > module.groups:
        return f"{groups} groups of {inside} input and {out} output channels"
    return _others(shapes, out) or {"out_channels": out, "in_channels": inside, "groups": groups}


def _linear(_layer: Any, shapes: Shapes) -> dict[str, Any] | str:
    out, inside = shapes["weight"]
    return _others(shapes, out) or {"out_features": out, "in_features": inside}


def _norm(attribute: str) -> Callable[[Any, Shapes], dict[str, Any] | str]:
    def attributes(module: Any, shapes: Shapes) -> dict[str, Any] | str:
        (size,) = next(shape for shape in shapes.values() if shape)
        parts = getattr(module, "num_groups", 1)
        if size % parts:
            return f"{size} channels in {parts} groups"
        return _others(shapes, size) or {attribute: size}

    return attributes


def _layer_norm(_layer: Any, shapes: Shapes) -> dict[str, Any] | str:
    if len(set(shapes.values())) > 1:
        return f"weight and bias of shapes {', '.join(map(str, shapes.values()))}"
    return {"normalized_shape": next(iter(shapes.values()))}


def _embedding(module: Any, shapes: Shapes) -> dict[str, Any] | str:
    count, size = shapes["weight"]
    if module.padding_idx is not None and module.padding_idx >= count:
        return f"{count} embeddings, and the padding is number {module.padding_idx}"
    return {"num_embeddings": count, "embedding_dim": size}


def _others(shapes: Shapes, channels: int) -> str:
    """What is wrong with the vectors of a layer, which must have one entry for each channel; empty if nothing is."""
    for name, shape in shapes.items():
        if name != "weight" and shape not in ((channels,), ()):
            return f"{name} has shape {shape} beside {channels} channels"
    return ""


_KINDS: dict[type[nn.Module], Callable[[Any, Shapes], dict[str, Any] | str]] = {
    nn.Linear: _linear,
    _NormBase: _norm("num_features"),
    nn.GroupNorm: _norm("num_channels"),
    nn.LayerNorm: _layer_norm,
    nn.PReLU: _norm("num_parameters"),
    nn.Embedding: _embedding,
}
