"""The BatchNorm behind a layer: the one that normalises the layer's output channels, and has no other input.

The model is traced with `torch.fx`, in training and in evaluation mode. Where they differ, or in doubt, there is none.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules import pooling
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

#: Modules, functions and methods that treat every channel by itself. (ReLU6 is a Hardtanh.)
_ACTIVATIONS = (nn.ReLU, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh)
_POOLINGS = (pooling._MaxPoolNd, pooling._AvgPoolNd, pooling._AdaptiveMaxPoolNd, pooling._AdaptiveAvgPoolNd)
_MODULES = (nn.Identity, _DropoutNd, *_ACTIVATIONS, *_POOLINGS)
_FUNCTIONS = (torch.relu, F.relu, F.relu6, F.leaky_relu, F.gelu, F.silu, F.dropout, F.max_pool2d, F.avg_pool2d)
_METHODS = ("relu", "relu_", "contiguous")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (_ConvNd, nn.Linear, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)


def following(model: nn.Module, layers: Collection[str]) -> dict[str, str] | None:
    """The BatchNorms behind some layers of a model.

    Args:
        model: not changed; its forward runs on a copy that shares its tensors.
        layers: names of convolutions and linear layers.

    Returns:
        {layer name: name of its BatchNorm}. A layer has none if its output is used anywhere else too, if the layer or
        the BatchNorm is called more than once, or if there is anything but activations, dropout and pooling between
        them. None if the model's forward cannot be traced (it branches on values, for example).

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.ReLU())
    >>> following(model, ["0", "2"])
    {'0': '1'}
    """
    norms: dict[str, set[str | None]] = {}
    try:
        copied = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
        modules = dict(copied.named_modules())
        for training in (True, False):
            graph = _Tracer().trace(copied.train(training))
            calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
            for node in graph.nodes:
                if node.op == "call_module" and node.target in layers:
                    norm = _behind(node, modules)
                    alone = calls[node.target] == 1 and calls[norm] == 1
                    norms.setdefault(node.target, set()).add(norm if alone else None)
    except Exception:  # whatever a forward does that proxies do not support
        return None
    return {layer: norm for layer, (norm, *others) in norms.items() if norm is not None and not others}


def _behind(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """The name of the BatchNorm that a call of a layer leads to, or None."""
    while len(node.users) == 1:
        (node,) = node.users
        target: Any = node.target
        if node.op == "call_module" and isinstance(modules[target], _BatchNorm):
            return str(target)
        passes = (
            (node.op == "call_module" and isinstance(modules[target], _MODULES))
            or (node.op == "call_function" and target in _FUNCTIONS)
            or (node.op == "call_method" and target in _METHODS)
        )
        if not passes:
            return None
    return None
