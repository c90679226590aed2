"""Fuse each convolution of a traced graph with the BatchNorm, the addition and the activation that follow it."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..core.tensor_ref import TensorRef
from .addressing import Window
from .coefficients import Coefficients
from .convolution import UNLIMITED, Convolution
from .nodes import called_plainly, can_be_delayed, is_of_torch, module_of, only_user


def fuse(traced: fx.GraphModule, sparse: Mapping[nn.Module, TensorRef], shapes: dict[fx.Node, torch.Size]) -> None:
    """Replace convolutions, and what follows them, by calls of `Convolution`.

    Args:
        traced: changed in place; what it no longer calls loses its parameters, so that dense weights can be freed.
        sparse: tensors of the layers to replace.
        shapes: of all values; those of the calls are added.
    """
    replaced: set[str] = set()
    for number, node in enumerate(list(traced.graph.nodes)):
        module = module_of(node)
        tensor = None if module is None else sparse.get(module)
        if tensor is None or len(node.args) != 1 or node.kwargs:
            continue
        if len(shapes[node]) != 4 or 0 in shapes[node]:
            continue
        chain, residual, convolution = _fused(node, tensor, shapes)
        replaced.update(str(fused.target) for fused in chain if fused.op == "call_module")
        name = f"convolution{number}"
        traced.add_submodule(name, convolution)
        with traced.graph.inserting_before(chain[-1]):
            call = traced.graph.call_module(name, node.args if residual is None else (*node.args, residual))
        shapes[call] = shapes[chain[-1]]
        chain[-1].replace_all_uses_with(call)
        for fused in reversed(chain):
            traced.graph.erase_node(fused)
    for node in traced.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            replaced -= {str(node.target), str(node.target).rpartition(".")[0]}
    for name in replaced:
        traced.set_submodule(name, nn.ModuleDict(dict(traced.get_submodule(name).named_children())))


def _fused(
    node: fx.Node, tensor: TensorRef, shapes: dict[fx.Node, torch.Size]
) -> tuple[list[fx.Node], fx.Node | None, Convolution]:
    """The nodes that one call can replace, in order; the value that they add; and the module to call."""
    module = module_of(node)
    assert isinstance(module, nn.Conv2d)
    values = tensor.parameter.detach()
    if tensor.mask is not None:
        values = values * tensor.mask
    space = tensor.interspace
    basis = None if space is None else space.effective_basis.detach().numpy().astype(np.float32)
    bias = torch.zeros(module.out_channels) if module.bias is None else module.bias.detach()
    chain, residual, limits = [node], None, UNLIMITED
    user = only_user(node)
    norm = None if user is None else module_of(user)
    if (
        user is not None
        and isinstance(norm, nn.BatchNorm2d)
        and is_of_torch(norm)
        and called_plainly(user)
        and norm.running_mean is not None
    ):
        values, bias = _folded(values, bias, norm)
        chain.append(user)
    user, addend = only_user(chain[-1]), _addend(chain[-1])
    equal = addend is not None and shapes.get(addend) == shapes[chain[-1]]
    if user is not None and equal and can_be_delayed(chain[-1], user):
        residual = addend
        chain.append(user)
    user = only_user(chain[-1])
    clamp = None if user is None else _clamp(user)
    if user is not None and clamp is not None and can_be_delayed(chain[-1], user):
        limits = clamp
        chain.append(user)
    coefficients = Coefficients.of(np.ascontiguousarray(values.flatten(2).numpy()), module.groups, basis)
    convolution = Convolution(
        tensor.module_name,
        _window(module),
        module.groups,
        module.in_channels,
        coefficients,
        bias.float().numpy(),
        limits,
    )
    return chain, residual, convolution


def _folded(values: Tensor, bias: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Coefficients and bias with a BatchNorm in evaluation mode folded in."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach()
    bias = (bias - norm.running_mean) * scale
    return values * scale[:, None, None, None], bias + norm.bias.detach() if norm.affine else bias


def _window(module: nn.Conv2d) -> Window:
    (kh, kw), (sh, sw), (dh, dw), padding = module.kernel_size, module.stride, module.dilation, module.padding
    if isinstance(padding, str):
        padding = (dh * (kh - 1) // 2, dw * (kw - 1) // 2) if padding == "same" else (0, 0)
    return Window((kh, kw), (sh, sw), (padding[0], padding[1]), (dh, dw))


def _addend(node: fx.Node) -> fx.Node | None:
    """What is added to a value where it is used for the only time; None if it is used for something else."""
    user = only_user(node)
    if user is None or user.op not in ("call_function", "call_method") or user.kwargs or len(user.args) != 2:
        return None
    others = [addend for addend in user.args if addend is not node]
    in_place = user.target in (operator.iadd, "add_") and user.args[0] is node  # else it changes the other value
    if len(others) != 1 or not (in_place or user.target in (operator.add, torch.add, "add")):
        return None
    return others[0] if isinstance(others[0], fx.Node) else None


def _clamp(node: fx.Node) -> tuple[float, float] | None:
    """The bounds of an activation that is a clamp."""
    if node.op == "call_module":
        module = module_of(node)
        if not called_plainly(node):
            return None
        if isinstance(module, nn.ReLU):
            return 0.0, math.inf
        return (module.min_val, module.max_val) if isinstance(module, nn.Hardtanh) else None  # ReLU6 is one
    if len(node.args) != 1 or set(node.kwargs) - {"inplace"}:
        return None
    if node.target in (F.relu, torch.relu, "relu", "relu_"):
        return 0.0, math.inf
    return (0.0, 6.0) if node.target is F.relu6 else None
