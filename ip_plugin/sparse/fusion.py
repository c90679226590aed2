"""Fuse each layer of a traced graph with the BatchNorm, the addition and the activation that follow it."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..core.tensor_ref import TensorRef
from .activation import NONE, activation_of
from .addressing import Window
from .coefficients import Coefficients
from .convolution import Convolution
from .linear import Linear
from .nodes import called_plainly, can_be_delayed, changes_a_value, is_of_torch, module_of, only_user
from .pointwise import Pointwise

_SUMS = (operator.add, operator.iadd, torch.add, "add")
#: Functions whose result no other value shares memory with.
_FRESH = (operator.add, operator.mul, torch.add, torch.mul, torch.cat, "add", "mul")


def fuse(traced: fx.GraphModule, sparse: Mapping[nn.Module, TensorRef], shapes: dict[fx.Node, torch.Size]) -> None:
    """Replace layers, and what follows them, by calls of `Convolution`, `Linear` and `Pointwise`.

    Args:
        traced: changed in place; what it no longer calls loses its parameters, so that dense weights can be freed.
        sparse: tensors of the layers to replace.
        shapes: of all values; those of the calls are added.
    """
    replaced: set[str] = set()

    def replace(chain: list[fx.Node], arguments: tuple[fx.Node | None, ...], module: nn.Module) -> None:
        replaced.update(str(fused.target) for fused in chain if fused.op == "call_module")
        name = f"{type(module).__name__.lower()}{len(replaced)}_{len(shapes)}"
        traced.add_submodule(name, module)
        with traced.graph.inserting_before(chain[-1]):
            call = traced.graph.call_module(name, tuple(node for node in arguments if node is not None))
        shapes[call] = shapes[chain[-1]]
        chain[-1].replace_all_uses_with(call)
        for fused in reversed(chain):
            traced.graph.erase_node(fused)

    for node in list(traced.graph.nodes):
        module = module_of(node)
        tensor = None if module is None else sparse.get(module)
        if tensor is None or len(node.args) != 1 or node.kwargs or 0 in shapes[node]:
            continue
        if isinstance(module, nn.Linear):
            chain, linear = _linear(node, tensor)
            replace(chain, node.args, linear)
        elif len(shapes[node]) == 4:
            chain, residual, convolution = _fused(node, tensor, shapes)
            replace(chain, (node.args[0], residual), convolution)
    erased: set[fx.Node] = set()
    for node in list(traced.graph.nodes):
        if node not in erased and (fused := _pointwise(node, shapes)):
            chain, arguments, pointwise = fused
            erased.update(chain)
            replace(chain, arguments, pointwise)
    for node in traced.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            replaced -= {str(node.target), str(node.target).rpartition(".")[0]}
    for name in replaced:
        traced.set_submodule(name, nn.ModuleDict(dict(traced.get_submodule(name).named_children())))


def _linear(node: fx.Node, tensor: TensorRef) -> tuple[list[fx.Node], Linear]:
    """The nodes that one call can replace, in order, and the module to call."""
    module = module_of(node)
    assert isinstance(module, nn.Linear)
    values = tensor.parameter.detach()
    if tensor.mask is not None:
        values = values * tensor.mask
    bias = torch.zeros(module.out_features) if module.bias is None else module.bias.detach()
    chain, activation, user = [node], NONE, only_user(node)
    if user and (follows := activation_of(user)) and can_be_delayed(node, user):
        activation = follows
        chain.append(user)
    coefficients = Coefficients.of(np.ascontiguousarray(values[..., None].numpy()), 1, None)
    return chain, Linear(tensor.module_name, module.in_features, coefficients, bias.float().numpy(), activation)


def _pointwise(
    node: fx.Node, shapes: dict[fx.Node, torch.Size]
) -> tuple[list[fx.Node], tuple[fx.Node, ...], Pointwise] | None:
    """The nodes that one call can replace, in order; its arguments, and the module to call; None if there are none."""
    if len(shapes.get(node, ())) != 4 or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    value = node.args[0]
    if changes_a_value(node) and not (_is_fresh(value) and only_user(value) is node):
        return None
    if activation := activation_of(node):
        return [node], (value,), Pointwise(activation=activation)
    arguments: tuple[fx.Node, ...] = (value,)
    scale, shift = None, None
    if norm := _norm(node):
        scale, shift = _affine(norm)
    elif addends := _addends(node, shapes):
        arguments = addends
    else:
        return None
    chain, activation, user = [node], NONE, only_user(node)
    if user and (follows := activation_of(user)) and can_be_delayed(node, user):
        activation = follows
        chain.append(user)
    return chain, arguments, Pointwise(scale, shift, activation)


def _is_fresh(node: fx.Node) -> bool:
    """Whether no other value shares memory with that of a node."""
    owns = (Convolution, Linear, nn.BatchNorm2d, nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, Pointwise)
    return isinstance(module_of(node), owns) or (node.op.startswith("call") and node.target in _FRESH)


def _addends(node: fx.Node, shapes: dict[fx.Node, torch.Size]) -> tuple[fx.Node, ...]:
    """The two values of one shape that a node adds; empty if it does something else."""
    added = tuple(argument for argument in node.args if isinstance(argument, fx.Node))
    adds = node.op in ("call_function", "call_method") and node.target in (
        operator.add,
        operator.iadd,
        torch.add,
        "add",
    )
    same = len(added) == len(node.args) == 2 and shapes.get(added[0]) == shapes.get(added[1]) == shapes[node]
    return added if adds and same and not node.kwargs else ()


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
    chain, residual, activation = [node], None, NONE
    user = only_user(node)
    if user is not None and (norm := _norm(user)):
        scale, shift = _affine(norm)
        values, bias = values * scale[:, None, None, None], bias * scale + shift
        chain.append(user)
    user, addend = only_user(chain[-1]), _addend(chain[-1])
    if user and addend and shapes.get(addend) == shapes[chain[-1]] and can_be_delayed(chain[-1], user):
        residual = addend
        chain.append(user)
    user = only_user(chain[-1])
    if user and (follows := activation_of(user)) and can_be_delayed(chain[-1], user):
        activation = follows
        chain.append(user)
    coefficients = Coefficients.of(np.ascontiguousarray(values.flatten(2).numpy()), module.groups, basis)
    convolution = Convolution(
        tensor.module_name,
        _window(module),
        module.groups,
        module.in_channels,
        coefficients,
        bias.float().numpy(),
        activation,
    )
    return chain, residual, convolution


def _norm(node: fx.Node) -> nn.BatchNorm2d | None:
    """The BatchNorm that a node calls, if that only scales and shifts channels."""
    norm = module_of(node)
    if not isinstance(norm, nn.BatchNorm2d) or not is_of_torch(norm) or not called_plainly(node):
        return None
    return norm if norm.running_mean is not None else None


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of a BatchNorm in evaluation mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean * scale
    return scale, shift + norm.bias.detach() if norm.affine else shift


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
