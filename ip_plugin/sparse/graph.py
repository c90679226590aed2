"""What a network computes, as `torch.fx` sees it, with what follows a convolution drawn into the convolution."""

from __future__ import annotations

import copy
import math
import operator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.prune import BasePruningMethod

from ..core.convert import bake
from ..core.tensor_ref import TensorRef, prunable_tensors
from ..errors import SparseExecutionError
from .layout import Floats
from .places import Window
from .plan import Entries

#: Names of functions that change an argument, besides those that end with an underscore.
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod", "iand", "ior", "ixor", "setitem")
#: Functions that change the shape of an argument, where the buffer that it lies in does not change.
_RESHAPE_IN_PLACE = (
    "as_strided_", "resize_", "resize_as_", "set_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_",
    "unsqueeze_",
)  # fmt: skip


@dataclass
class Convolution:
    """A convolution and what is done to its result at once.

    Attributes:
        name: of the module.
        source: what it reads.
        window, groups: as torch names them.
        entries, bias: coefficients and bias, the norm that follows folded in.
        inputs: how many channels it reads.
        residual: what is added to the result.
        limits: what that is clamped to.
        done: the nodes that it stands for, in order; the last one's value is what it makes.
    """

    name: str
    source: fx.Node
    window: Window
    groups: int
    entries: Entries
    bias: Floats
    inputs: int
    residual: fx.Node | None = None
    limits: tuple[float, float] = (-math.inf, math.inf)
    done: list[fx.Node] = field(default_factory=list)

    def weight(self) -> Tensor:
        """Composed, for a dense run."""
        kernels = self.entries.kernels(self.inputs, self.groups, math.prod(self.window.kernel))
        return torch.from_numpy(kernels.reshape(*kernels.shape[:2], *self.window.kernel))

    @property
    def density(self) -> float:
        """Share of the coefficients that are not zero."""
        size = self.entries.channels * (self.inputs // self.groups) * math.prod(self.window.kernel)
        return len(self.entries.values) / max(1, size)


class UntraceableError(Exception):
    """A forward that `torch.fx` cannot follow, and why."""


@dataclass
class Network:
    """A traced network.

    Attributes:
        module: the plain network, in evaluation mode.
        convolutions: by the node whose value each makes.
        drawn_in: nodes that belong to a convolution and make no value of their own.
        poolings: windows of max poolings.
        means: nodes that average all pixels of each channel.
    """

    module: fx.GraphModule
    convolutions: dict[fx.Node, Convolution]
    drawn_in: set[fx.Node]
    poolings: dict[fx.Node, Window] = field(default_factory=dict)
    means: set[fx.Node] = field(default_factory=set)

    def shapes(self, inputs: tuple[Tensor, ...]) -> dict[fx.Node, torch.Size]:
        """Shapes of all values that are tensors, for inputs of these shapes."""
        return {node: value.shape for node, value in _Values(self).of(inputs).items() if isinstance(value, Tensor)}


def trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> Network:
    """The graph of a model, which is not changed; inputs tell what is of one shape.

    Raises:
        UntraceableError: `torch.fx` cannot follow the forward.
    """
    sparse = {layer.module_name: _values(layer) for layer in prunable_tensors(model) if takes(layer.module)}
    plain = bake(copy.deepcopy(model)).eval().requires_grad_(False)
    try:
        traced = _without_copies(fx.symbolic_trace(plain))
        shapes = Network(traced, {}, set()).shapes(inputs)
    except Exception as error:  # whatever a forward raises that is given a stand-in
        raise UntraceableError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    for node in traced.graph.nodes:
        if node.op.startswith("call_") and node.op != "call_module" and _name(node) in _RESHAPE_IN_PLACE:
            raise UntraceableError(f"{_name(node)} changes a shape in place")
    found = _drawn(traced, sparse, shapes)
    ours = found.drawn_in | set(found.convolutions)
    left = {node.target for node in traced.graph.nodes if node.op == "call_module" and node not in ours}
    for target in {str(node.target) for node in ours if node.op == "call_module"} - left:
        traced.set_submodule(target, nn.Identity())  # lets dense weights go
    return found


def _without_copies(traced: fx.GraphModule) -> fx.GraphModule:
    """Without the nodes whose value is what they are given."""
    for node in traced.graph.nodes:
        if node.op != "call_module" or len(node.args) != 1:
            continue
        module = traced.get_submodule(str(node.target))
        if type(module) in (nn.Identity, nn.Dropout, nn.Dropout2d) and not _hooked(module):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    traced.recompile()
    return traced


class _Values(fx.Interpreter):
    """Every value of a network; those of convolutions have the right shape only."""

    def __init__(self, network: Network) -> None:
        super().__init__(network.module, garbage_collect_values=False)
        self.network = network

    @torch.no_grad()
    def of(self, inputs: tuple[Tensor, ...]) -> dict[fx.Node, Any]:
        self.run(*inputs)
        return self.env

    def run_node(self, n: fx.Node) -> Any:
        convolution = self.network.convolutions.get(n)
        if n in self.network.drawn_in:
            return None
        if convolution is None:
            return super().run_node(n)
        shape = self.env[convolution.source].shape
        if len(shape) != 4 or 0 in shape:
            raise SparseExecutionError(
                "A sparse network must be given batches of images.",
                f"shape {tuple(shape)}",
                "pass tensors of shape (images, channels, height, width)",
            )
        images, _, height, width = shape
        return torch.zeros(images, convolution.entries.channels, *convolution.window.outputs(height, width))


def takes(module: nn.Module) -> bool:
    """Whether a module is a convolution that can be run sparse."""
    if not isinstance(module, nn.Conv2d) or any(
        getattr(type(module), name) is not getattr(nn.Conv2d, name) for name in ("forward", "_conv_forward")
    ):
        return False
    if module._forward_hooks or not all(isinstance(h, BasePruningMethod) for h in module._forward_pre_hooks.values()):
        return False
    spans = ((size - 1) * step for size, step in zip(module.kernel_size, module.dilation, strict=True))
    even = not isinstance(module.padding, str) or not any(span % 2 for span in spans)
    narrow = (
        math.prod(module.kernel_size) <= 256 and max(module.in_channels, module.out_channels) < 1 << 16
    )  # as plans are
    return module.padding_mode == "zeros" and module.weight.dtype == torch.float32 and even and narrow


def _values(layer: TensorRef) -> tuple[Tensor, Tensor | None]:
    """Masked coefficients ``(outputs, inputs / groups, taps)``, and the basis."""
    values = layer.parameter.detach()
    if layer.mask is not None:
        values = values * layer.mask
    interspace = layer.interspace
    basis = None if interspace is None else interspace.effective_basis.detach()
    return values.flatten(2), basis


def _drawn(
    traced: fx.GraphModule, sparse: dict[str, tuple[Tensor, Tensor | None]], shapes: dict[fx.Node, torch.Size]
) -> Network:
    modules = dict(traced.named_modules())
    found: dict[fx.Node, Convolution] = {}
    drawn_in: set[fx.Node] = set()
    for node in traced.graph.nodes:
        if node.op != "call_module" or node.target not in sparse or len(node.args) != 1 or node.kwargs:
            continue
        if len(shapes[node]) != 4 or 0 in shapes[node]:
            continue
        module = modules[node.target]
        assert isinstance(module, nn.Conv2d)
        made = _convolution(node, module, *sparse[node.target], norm=_norm_after(node, modules))
        last = made.done[-1]
        user, other = _addend(last)
        free = other is not None and other not in drawn_in and user not in drawn_in and user not in found
        of_one_shape = other is not None and shapes.get(other) == shapes[last]
        if user is not None and free and of_one_shape and _may_wait(last, user, modules):
            made.residual = other
            made.done.append(user)
        user = _only_user(made.done[-1])
        limits = None if user is None else _clamp(user, modules)
        if user is not None and limits is not None and _may_wait(made.done[-1], user, modules):
            made.limits = limits
            made.done.append(user)
        found[made.done[-1]] = made
        drawn_in.update(made.done[:-1])
    poolings = {node: window for node in traced.graph.nodes if (window := _pooling(node, modules)) is not None}
    means = {node for node in traced.graph.nodes if _is_mean(node, modules)}
    return Network(traced, found, drawn_in, poolings, means)


def _hooked(module: nn.Module) -> bool:
    """Whether calling it does more than its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _pooling(node: fx.Node, modules: dict[str, nn.Module]) -> Window | None:
    """The window of a max pooling."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    module = modules[str(node.target)]
    if type(module) is not nn.MaxPool2d or module.ceil_mode or module.return_indices or _hooked(module):
        return None
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    return Window(*((each, each) if isinstance(each, int) else (each[0], each[1]) for each in sizes))


def _is_mean(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether it is an average pooling to one pixel."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        plain = type(module) is nn.AdaptiveAvgPool2d and not _hooked(module)
        return plain and len(node.args) == 1 and not node.kwargs and module.output_size in (1, (1, 1))
    size = node.args[1] if len(node.args) == 2 else node.kwargs.get("output_size")
    return node.target is F.adaptive_avg_pool2d and size in (1, (1, 1), [1, 1])


def _may_wait(node: fx.Node, user: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node can as well be computed where its user is: nothing between them changes a value in place."""
    between = node.next
    while between is not user:
        if changes_a_value(between, modules):
            return False
        between = between.next
    return True


def changes_a_value(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node may change what it is given, in place."""
    if node.op in ("placeholder", "get_attr"):
        return False
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    changes = _name(node).endswith("_") or _name(node) in _IN_PLACE or "out" in node.kwargs
    return changes or bool(node.kwargs.get("inplace")) or any(each is True for each in node.args)


def _name(node: fx.Node) -> str:
    """Of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _norm_after(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, nn.BatchNorm2d] | None:
    user = _only_user(node)
    if user is None or user.op != "call_module":
        return None
    norm = modules[str(user.target)]
    return (user, norm) if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None else None


def _convolution(
    node: fx.Node, module: nn.Conv2d, values: Tensor, basis: Tensor | None, norm: tuple[fx.Node, nn.BatchNorm2d] | None
) -> Convolution:
    bias = torch.zeros(module.out_channels) if module.bias is None else module.bias.detach()
    done = [node]
    if norm is not None:
        done.append(norm[0])
        batch_norm = norm[1]
        assert batch_norm.running_mean is not None
        assert batch_norm.running_var is not None
        scale = (batch_norm.running_var + batch_norm.eps).rsqrt()
        if batch_norm.affine:
            scale = scale * batch_norm.weight.detach()
        shift = batch_norm.bias.detach() if batch_norm.affine else torch.zeros_like(scale)
        bias = (bias - batch_norm.running_mean) * scale + shift
        values = values * scale[:, None, None]
    (kh, kw), (dh, dw), padding = module.kernel_size, module.dilation, module.padding
    if isinstance(padding, str):
        padding = (dh * (kh - 1) // 2, dw * (kw - 1) // 2) if padding == "same" else (0, 0)
    (sh, sw), (ph, pw) = module.stride, padding
    window = Window((kh, kw), (sh, sw), (ph, pw), (dh, dw))
    filters = None if basis is None else np.array(basis.numpy(), np.float32)
    entries = Entries.of(np.ascontiguousarray(values.numpy()), module.groups, filters)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return Convolution(
        str(node.target), source, window, module.groups, entries, bias.float().numpy(), module.in_channels, done=done
    )


def _addend(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The sum that a value is used in, and for nothing else, and what is added to it."""
    user = _only_user(node)
    if user is None or user.kwargs or len(user.args) != 2:
        return None, None
    sums = (operator.add, torch.add) if user.op == "call_function" else ("add",)
    in_place = (operator.iadd,) if user.op == "call_function" else ("add_",)
    others = [each for each in user.args if each is not node]
    if user.op not in ("call_function", "call_method") or len(others) != 1 or not isinstance(others[0], fx.Node):
        return None, None
    if user.target in sums or (user.target in in_place and user.args[0] is node):  # else it changes the other value
        return user, others[0]
    return None, None


def _clamp(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[float, float] | None:
    """The bounds of an activation that is a clamp."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, nn.ReLU):
            return 0.0, math.inf
        if isinstance(module, nn.Hardtanh):  # ReLU6 is one
            return module.min_val, module.max_val
        return None
    if len(node.args) != 1 or set(node.kwargs) - {"inplace"}:
        return None
    if node.target in (F.relu, torch.relu, "relu", "relu_"):
        return 0.0, math.inf
    return (0.0, 6.0) if node.target is F.relu6 else None
