"""What nodes of a traced graph call, and whether they change values in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

#: Names of functions that change an argument, besides those that end with an underscore.
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod", "iand", "ior", "ixor", "setitem")


def module_of(node: fx.Node) -> nn.Module | None:
    """The module that a node calls; None if it calls something else."""
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if owner is not None and node.op == "call_module" else None


def called_plainly(node: fx.Node) -> bool:
    """Whether a node calls a module with one positional argument, and no hook does more than its forward."""
    module = module_of(node)
    hooked = module is not None and (module._forward_hooks or module._forward_pre_hooks)
    return module is not None and not hooked and len(node.args) == 1 and not node.kwargs


def function_name(node: fx.Node) -> str:
    """Name of the function or method that a node calls; empty for other nodes."""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def bound(node: fx.Node, *names: str) -> dict[str, Any] | None:
    """The arguments of a node by these names; None if it has others."""
    if len(node.args) > len(names) or not set(node.kwargs) <= set(names[len(node.args) :]):
        return None
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def is_switched_off(node: fx.Node) -> bool:
    """Whether a node calls a dropout, or torchvision's stochastic depth, that does nothing outside of training."""
    names = {
        "dropout": ("input", "p", "training", "inplace"),
        "stochastic_depth": ("input", "p", "mode", "training"),
    }.get(function_name(node))
    arguments = (bound(node, *names) if names and node.op == "call_function" else None) or {}
    return arguments.get("training") is False and isinstance(arguments.get("input"), fx.Node)


def joined_channels(node: fx.Node) -> tuple[fx.Node, ...]:
    """The values whose channels a node concatenates; empty if it does something else."""
    if node.op != "call_function" or node.target not in (torch.cat, torch.concat):
        return ()
    arguments = bound(node, "tensors", "dim") or {}
    parts = arguments.get("tensors", ())
    listed = isinstance(parts, (list, tuple)) and all(isinstance(part, fx.Node) for part in parts)
    return tuple(parts) if listed and arguments.get("dim", 0) in (1, -3) else ()


def is_of_torch(module: nn.Module | None) -> bool:
    """Whether a module's class is one of torch's own."""
    return type(module).__module__.startswith("torch.nn")


def needs_contiguous(node: fx.Node) -> bool:
    """Whether what a node calls may fail for tensors that lie in memory in an unusual way."""
    if node.op == "call_module":
        module = module_of(node)
        return isinstance(module, nn.Unflatten) or not is_of_torch(module)
    return function_name(node) in ("view", "view_as", "unflatten")


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that uses a value; None if there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def changes_a_value(node: fx.Node) -> bool:
    """Whether a node may change an argument in place."""
    if node.op in ("placeholder", "get_attr"):
        return False
    if node.op == "call_module":
        return bool(getattr(module_of(node), "inplace", False))
    name = function_name(node)
    changes = name.endswith("_") or name in _IN_PLACE or "out" in node.kwargs
    return changes or bool(node.kwargs.get("inplace")) or any(argument is True for argument in node.args)


def can_be_delayed(node: fx.Node, user: fx.Node) -> bool:
    """Whether a node can be computed where its user is: nothing between them changes a value in place."""
    between = node.next
    while between is not user:
        if changes_a_value(between):
            return False
        between = between.next
    return True
