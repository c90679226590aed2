"""Trace a model, check the trace against it, and find the shapes of all values of its graph."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..core.convert import bake
from ..core.tensor_ref import TensorRef, prunable_tensors
from ..errors import SparseExecutionError
from .convolution import Convolution, can_run_sparse
from .fusion import fuse
from .linear import DENSE, Linear, is_sparse_linear
from .nodes import called_plainly, function_name, is_of_torch, is_switched_off, module_of

#: Methods that change the shape of an argument, but not the buffer that it lies in.
_RESHAPE_IN_PLACE = (
    "as_strided_", "resize_", "resize_as_", "set_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_",
    "unsqueeze_",
)  # fmt: skip
#: Where the model lies in a traced graph: names of modules and parameters begin with it.
ROOT = "model"
#: Attributes of a parameter that are read while tracing; others become nodes.
_METADATA = (
    "device", "dim", "dtype", "element_size", "is_contiguous", "is_cuda", "is_floating_point", "itemsize", "layout",
    "ndim", "ndimension", "nelement", "numel", "requires_grad", "shape", "size", "stride",
)  # fmt: skip
#: Types of arguments that a network is specialized for.
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, slice)


class UntraceableError(Exception):
    """A forward that `torch.fx` cannot follow, and why."""


class Structure(NamedTuple):
    """The arguments of a call, without the values of tensors.

    Attributes:
        tree: how tuples, lists and dicts are nested.
        leaves: type and value of each; of a tensor only the type.
    """

    tree: TreeSpec
    leaves: tuple[tuple[type, Any], ...]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Structure, tuple[Tensor, ...]]:
        """The structure of a call, and its tensors in order."""
        if not kwargs and all(type(arg) is Tensor for arg in args):
            return _of_tensors(len(args)), tuple(args)
        leaves, tree = tree_flatten((tuple(args), dict(sorted(kwargs.items()))))
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        return cls(
            tree, tuple((Tensor, None) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves)
        ), tensors

    def call(self, function: Any, tensors: Sequence[Any]) -> Any:
        """Call a function with these arguments."""
        values = iter(tensors)
        args, kwargs = tree_unflatten(
            [next(values) if kind is Tensor else leaf for kind, leaf in self.leaves], self.tree
        )
        return function(*args, **kwargs)

    def __str__(self) -> str:
        """The arguments, tensors as ``Tensor``."""
        words = [_Word("Tensor" if kind is Tensor else repr(leaf)) for kind, leaf in self.leaves]
        args, kwargs = tree_unflatten(words, self.tree)
        return ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])


@functools.cache
def _of_tensors(count: int) -> Structure:
    """The structure of a call with so many tensors and nothing else."""
    return Structure(tree_flatten(((0,) * count, {}))[1], ((Tensor, None),) * count)


class _Word(str):
    """Is shown without quotes."""

    __repr__ = str.__str__


class Traced(NamedTuple):
    """A graph that computes what a model computes.

    Attributes:
        module: takes the tensors of a call, returns a list of the leaves of its outputs.
        structure: of the call.
        outputs: how the leaves are nested.
    """

    module: fx.GraphModule
    structure: Structure
    outputs: TreeSpec


class Outputs(NamedTuple):
    """What a model computes: leaves, and how they are nested."""

    leaves: list[Any]
    tree: TreeSpec

    def difference(self, other: Outputs, tolerance: float) -> str:
        """What `other` has different; empty if nothing is but rounding.

        Args:
            other: of the same model, run in another way.
            tolerance: for floating point numbers, relative to the largest one.
        """
        if self.tree != other.tree:
            return f"outputs {other.tree} instead of {self.tree}"
        for mine, its in zip(self.leaves, other.leaves, strict=True):
            if not isinstance(mine, Tensor):
                if type(mine) is not type(its) or (isinstance(mine, _CONSTANTS) and mine != its):
                    return f"an output is {its!r} instead of {mine!r}"
            elif not isinstance(its, Tensor) or (mine.shape, mine.dtype) != (its.shape, its.dtype):
                return f"an output is {_described(its)} instead of {_described(mine)}"
            elif mine.is_floating_point() and mine.numel():
                finite = mine.isfinite()
                if not torch.equal(finite, its.isfinite()):
                    return "other outputs are finite"
                error = float((its - mine)[finite].abs().max()) if finite.any() else 0.0
                scale = float(mine[finite].abs().max()) if finite.any() else 0.0
                if error > tolerance * scale + 1e-6:
                    return f"outputs differ by {error / max(scale, 1e-30):.0e} of the largest"
        return ""


def _described(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


@torch.no_grad()
def outputs_of(function: Any, structure: Structure, tensors: Sequence[Tensor]) -> Outputs:
    """What a function computes for copies of these tensors; the random state is left as it is."""
    with torch.random.fork_rng(devices=[]):
        return Outputs(*tree_flatten(structure.call(function, [tensor.clone() for tensor in tensors])))


def baked(model: nn.Module) -> tuple[nn.Module, dict[nn.Module, TensorRef]]:
    """A baked copy of a model in evaluation mode, and the tensors of `model` for those layers that can run sparse.

    Raises:
        SparseExecutionError: the model cannot be copied.
    """
    try:
        plain = copy.deepcopy(model)
    except Exception as error:
        raise SparseExecutionError(
            "A model that is prepared must be one that can be copied.",
            f"copy.deepcopy(model) raises {type(error).__name__}: {error}",
            "remove tensors that the model keeps from earlier calls, with their graphs, and wrappers around it",
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what baking changes is an error of `prepare`
        plain = bake(plain).eval().requires_grad_(False)
    refs = [ref for ref in prunable_tensors(model) if can_run_sparse(ref.module) or _is_pruned_linear(ref)]
    return plain, {plain.get_submodule(ref.module_name): ref for ref in refs}


def _is_pruned_linear(ref: TensorRef) -> bool:
    """Whether a tensor is the weight of a linear layer that is sparse enough for the loops."""
    if ref.tensor_name != "weight" or not is_sparse_linear(ref.module) or ref.interspace is not None:
        return False
    kept = ref.parameter != 0 if ref.mask is None else (ref.parameter != 0) & (ref.mask != 0)
    return int(kept.count_nonzero()) < DENSE * kept.numel()


def trace(
    plain: nn.Module,
    sparse: Mapping[nn.Module, TensorRef],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    expected: Outputs | None = None,
    opaque: bool = False,
    tolerance: float = 1e-3,
) -> Traced:
    """Trace a model, and replace convolutions by `Convolution`.

    Args:
        plain, sparse: as `baked` makes them; `plain` may be a part of what it made.
        args, kwargs: of a call; what is no tensor is fixed.
        expected: what `plain` computes for them, if that is known.
        opaque: do not look into modules that have parameters, but none of the layers in `sparse`.
        tolerance: as of `Outputs.difference`.

    Raises:
        UntraceableError: `torch.fx` cannot follow the forward, or the trace computes something else.
    """
    structure, tensors = Structure.of(args, kwargs or {})
    for kind, leaf in structure.leaves:
        if kind is not Tensor and not isinstance(leaf, _CONSTANTS):
            raise UntraceableError(f"an argument is a {kind.__name__}")
    expected = expected or outputs_of(plain, structure, tensors)
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        try:
            root = _Root(plain, structure)
            traced = fx.GraphModule(root, _Tracer(root, len(tensors), sparse, opaque).trace(root))
            drawn = not torch.equal(torch.get_rng_state(), before)
            for node in list(traced.graph.nodes):
                if node.op == "get_attr" and not node.users:
                    traced.graph.erase_node(node)
            _remove_identities(traced)
            leaves, values = _run(traced, tensors)
            shapes = {node: value.shape for node, value in values.items()}
        except UntraceableError:
            raise
        except Exception as error:  # a forward that is given a stand-in may raise anything
            raise UntraceableError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    if drawn:
        raise UntraceableError("it draws random numbers, which a trace would repeat")
    difference = expected.difference(Outputs(leaves, root.outputs), tolerance)
    if difference:
        raise UntraceableError(f"traced, it takes another branch, perhaps because it asks for types: {difference}")
    for node in traced.graph.nodes:
        if function_name(node) in _RESHAPE_IN_PLACE:
            raise UntraceableError(f"{function_name(node)} changes a shape in place")
    fuse(traced, sparse, shapes)
    try:  # convolutions now make zeros
        again = {node: value.shape for node, value in values_of(traced, tensors).items()}
    except Exception as error:
        raise UntraceableError("shapes depend on values") from error
    if any(shape != again.get(node, shape) for node, shape in shapes.items()):
        raise UntraceableError("shapes depend on values")
    return Traced(traced, structure, root.outputs)


class _Root(nn.Module):
    """A model as a function of tensors that returns a list."""

    outputs: TreeSpec

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        super().__init__()
        self.model, self.structure = model, structure

    def forward(self, *tensors: Any) -> list[Any]:
        leaves, self.outputs = tree_flatten(self.structure.call(self.model, tensors))
        return leaves


class _Tracer(fx.Tracer):
    """Knows dtype, shape and the like of parameters, and takes every convolution and linear layer as a whole."""

    def __init__(self, whole: nn.Module, inputs: int, sparse: Mapping[nn.Module, TensorRef], opaque: bool) -> None:
        super().__init__()
        self._inputs, self._sparse, self._opaque = inputs, sparse, opaque
        self._names = {parameter: name for name, parameter in whole.named_parameters()}

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:  # noqa: ARG002
        inputs = [self.create_proxy("placeholder", f"input{n}", (), {}) for n in range(self._inputs)]
        return root_fn, [self.root, *inputs]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (_ConvNd, nn.Linear)) or super().is_leaf_module(m, module_qualified_name):
            return True
        return self._opaque and any(True for _ in m.parameters()) and self._sparse.keys().isdisjoint(m.modules())

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:  # noqa: ARG002
        name = self._names.get(attr_val) if isinstance(attr_val, nn.Parameter) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = _Parameter(self.create_node("get_attr", name, (), {}), self, attr_val)
        return parameter_proxy_cache[name]


class _Parameter(fx.Proxy):
    """Stands for a parameter."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, parameter: nn.Parameter) -> None:
        super().__init__(node, tracer)
        self._parameter = parameter

    def __getattr__(self, k: str) -> Any:
        return getattr(self._parameter, k) if k in _METADATA else super().__getattr__(k)


def values_of(traced: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[fx.Node, Tensor]:
    """All values that are tensors, for these inputs, without their numbers: on the device meta.

    Raises:
        SparseExecutionError: a convolution is given something else than a batch of images.
    """
    return _run(traced, inputs)[1]


@torch.no_grad()
def _run(traced: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[Any, dict[fx.Node, Tensor]]:
    """What a graph computes for copies of these inputs, and all values on the device meta."""
    interpreter = _Shapes(traced, garbage_collect_values=False)
    with torch.random.fork_rng(devices=[]):
        outputs = interpreter.run(*(value.clone() for value in inputs))
    values = interpreter.env.items()
    return outputs, {node: torch.empty_like(v, device="meta") for node, v in values if isinstance(v, Tensor)}


class _Shapes(fx.Interpreter):
    """Runs a graph, but instead of a `Convolution` or `Linear` only makes a tensor of the right shape."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, (Convolution, Linear)):
            return torch.zeros(module.output_shape(args[0].shape))
        given = [
            leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor) and not leaf.is_inference()
        ]
        versions = [tensor._version for tensor in given]
        result = super().call_module(target, args, kwargs)
        if not is_of_torch(module) and versions != [tensor._version for tensor in given]:
            raise UntraceableError(f"a {type(module).__name__} changes its argument in place")
        return result


def _remove_identities(traced: fx.GraphModule) -> None:
    """Remove nodes whose value is their argument."""
    for node in traced.graph.nodes:
        module = type(module_of(node)) in (nn.Identity, nn.Dropout, nn.Dropout2d) and called_plainly(node)
        if module or is_switched_off(node):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    traced.recompile()
