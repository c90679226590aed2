"""Trace a model, and find the shapes of all values of its graph."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..core.convert import bake
from ..core.tensor_ref import prunable_tensors
from .convolution import Convolution, can_run_sparse
from .fusion import fuse
from .nodes import called_plainly, function_name, module_of

#: Methods that change the shape of an argument, but not the buffer that it lies in.
_RESHAPE_IN_PLACE = (
    "as_strided_", "resize_", "resize_as_", "set_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_",
    "unsqueeze_",
)  # fmt: skip


class UntraceableError(Exception):
    """A forward that `torch.fx` cannot follow, and why."""


def trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """Trace a model in evaluation mode, and replace convolutions by `Convolution`.

    Args:
        model: pruned, in either space; not changed.
        inputs: show which values have equal shapes.

    Raises:
        UntraceableError: `torch.fx` cannot follow the forward.
    """
    sparse = {ref.module_name: ref for ref in prunable_tensors(model) if can_run_sparse(ref.module)}
    plain = bake(copy.deepcopy(model)).eval().requires_grad_(False)
    try:
        traced = fx.symbolic_trace(plain)
        _remove_identities(traced)
        shapes = value_shapes(traced, inputs)
    except Exception as error:  # a forward that is given a stand-in may raise anything
        raise UntraceableError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    for node in traced.graph.nodes:
        if function_name(node) in _RESHAPE_IN_PLACE:
            raise UntraceableError(f"{function_name(node)} changes a shape in place")
    fuse(traced, sparse, shapes)
    return traced


def value_shapes(traced: fx.GraphModule, inputs: tuple[Tensor, ...]) -> dict[fx.Node, torch.Size]:
    """Shapes of all values that are tensors, for these inputs.

    Raises:
        SparseExecutionError: a convolution is given something else than a batch of images.
    """
    interpreter = _Shapes(traced, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(*inputs)
    return {node: value.shape for node, value in interpreter.env.items() if isinstance(value, Tensor)}


class _Shapes(fx.Interpreter):
    """Runs a graph, but instead of a convolution only makes a tensor of the right shape."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, Convolution):
            return torch.zeros(module.output_shape(args[0].shape))
        return super().call_module(target, args, kwargs)


def _remove_identities(traced: fx.GraphModule) -> None:
    """Remove nodes whose value is their argument."""
    for node in traced.graph.nodes:
        if type(module_of(node)) in (nn.Identity, nn.Dropout, nn.Dropout2d) and called_plainly(node):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    traced.recompile()
