"""The composed weight of a layer outside of a forward pass: in-place writes to it reach the coefficients."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves


class _RelatedToAnyTensor(torch._C._TensorMeta):
    """Relates the class to every Tensor: `torch.testing.assert_close` compares only tensors of related classes."""

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, Tensor)


class ComposedWeight(Tensor, metaclass=_RelatedToAnyTensor):
    """A weight that was composed by a parametrization of this package, or a view of one.

    Without this class, ``nn.init.zeros_(conv.weight)`` and ``conv.weight.data[:4] *= 0`` would write into a temporary
    tensor. Here every operation that may write is followed by a comparison, and kernels that have changed get new
    coefficients. All other kernels keep their coefficients bit for bit, and pruned entries stay pruned. Results of
    operations, copies and saved tensors are ordinary tensors.

    Writes by numpy and other libraries are not noticed.

    >>> from ip_plugin import interspace
    >>> conv = interspace(nn.Conv2d(3, 8, 3), basis="dct")
    >>> conv.weight.data[[1, 5]] *= 0
    >>> conv.parametrizations.weight.original.flatten(1).any(dim=1).tolist()
    [True, False, True, True, True, False, True, True]
    """

    _chain: parametrize.ParametrizationList
    _whole: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation on the ordinary tensors, pass writes on to the coefficients, and return views as views."""
        kwargs = kwargs or {}
        if func in _COUNTS_ZEROS:
            _warn_of_counted_zeros(func, args)
        weights = [leaf for leaf in tree_leaves((args, kwargs)) if type(leaf) is cls]
        with torch._C.DisableTorchFunctionSubclass():
            before = [weight._whole.clone() for weight in weights] if _may_write(func, kwargs) else []
            result = func(*args, **kwargs)
            if func == Tensor.data.__set__ and type(args[0]) is cls:  # type: ignore[attr-defined]
                everything = torch.ones_like(weights[0]._whole, dtype=torch.bool)
                _warn_of_lost_values(weights[0]._chain, _write(weights[0]._chain, everything, _plain(args[1])))
                return result
            for weight, values in zip(weights, before, strict=False):
                written = weight._whole != values
                if bool(written.any()):
                    goal = _write(weight._chain, written, weight._whole)
                    if func.__name__ in _SETS_VALUES:
                        _warn_of_lost_values(weight._chain, goal)
            if type(result) in (tuple, list):
                return type(result)(_linked(leaf, weights) for leaf in result)
            return _linked(result, weights)

    @property
    def _is_param(self) -> bool:
        """Read and set by torch: makes ``nn.Parameter(conv.weight)`` an ordinary Parameter."""
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:  # noqa: ARG002
        del self._chain, self._whole
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(_plain(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = _plain(self).__deepcopy__(memo)
        return copied


_COUNTS_ZEROS = (
    Tensor.eq,
    Tensor.__eq__,
    Tensor.ne,
    Tensor.__ne__,
    torch.eq,
    torch.ne,
    torch.count_nonzero,
    Tensor.count_nonzero,
)
_warned_of_zeros = False


def _warn_of_counted_zeros(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Warn once if zeros are looked for in a kernel that is composed of pruned coefficients: there are none."""
    global _warned_of_zeros
    counts = "count_nonzero" in func.__name__ or (len(args) > 1 and isinstance(args[1], (int, float)) and args[1] == 0)
    chain = getattr(args[0], "_chain", None)
    pruned = chain is not None and hasattr(chain[0], "basis") and chain[0].mask is not None
    if counts and pruned and not _warned_of_zeros:
        _warned_of_zeros = True
        warnings.warn(
            "zeros are counted in the weight of a layer in the interspace: they are in its coefficients, and kernels "
            "composed of them have hardly any. ip_plugin.report(model) counts them",
            stacklevel=3,
        )


#: Writes of values that are meant. An initialisation of a pruned layer goes on to leave pruned entries at zero.
_SETS_VALUES = ("add_", "__iadd__", "sub_", "__isub__", "copy_", "__setitem__", "_foreach_add_", "_foreach_copy_")


@torch.no_grad()
def _warn_of_lost_values(chain: parametrize.ParametrizationList, goal: Tensor, stacklevel: int = 4) -> None:
    """Warn if a pruned layer cannot have the weight that was written, as when an adapter (LoRA) is merged into it."""
    mask = getattr(chain[0], "mask", None)
    if mask is None or mask.shape != goal.shape:
        return
    if bool((chain() - goal).norm() > max(1e-3, 100 * torch.finfo(goal.dtype).eps) * goal.norm()):
        warnings.warn(
            "values were written into the weight of a pruned layer, and its pruned entries stay zero, so its weight is "
            "another one. To merge an adapter, as of LoRA, call ip_plugin.bake(model) before",
            stacklevel=stacklevel,
        )


def _may_write(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function may write: by its name (``mul_``, ``__setitem__``, ``__imul__``), ``out=`` or ``inplace=``."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__index__", "__int__", "__invert__"))
    return name.endswith("_") or kwargs.get("out") is not None or kwargs.get("inplace") is True


def _plain(leaf: Any) -> Any:
    if type(leaf) is not ComposedWeight:
        return leaf
    with torch._C.DisableTorchFunctionSubclass():
        return leaf.as_subclass(Tensor)


def _linked(leaf: Any, weights: list[ComposedWeight]) -> Any:
    """A result as a composed weight, if it shares memory with one."""
    if type(leaf) is Tensor:
        for weight in weights:
            if leaf.untyped_storage()._cdata == weight._whole.untyped_storage()._cdata:
                return _as_composed(leaf, weight._chain, weight._whole)
    return leaf


def _as_composed(tensor: Tensor, chain: parametrize.ParametrizationList, whole: Tensor) -> ComposedWeight:
    linked = tensor.as_subclass(ComposedWeight)
    linked._chain, linked._whole = chain, whole
    return linked


@torch.no_grad()
def _write(chain: parametrize.ParametrizationList, written: Tensor, values: Tensor) -> Tensor:
    """Set the coefficients of kernels that were written; returns the weight that was asked for.

    Args:
        chain: torch's list of the parametrizations of the weight.
        written: bool, the entries that were written.
        values: the weight with the new values.
    """
    goal = torch.where(written, values, chain())
    if len(chain) > 1:
        chain.right_inverse(goal)
        return goal
    if written.dim() > 2:
        written = written.flatten(2).any(2).reshape(*written.shape[:2], *[1] * (written.dim() - 2))
    original, parametrization = chain.original, chain[0]
    assert isinstance(original, Tensor)
    original.copy_(torch.where(written, parametrization.right_inverse(goal), original))  # type: ignore[operator]
    return goal


def make_writable(module: nn.Module, tensor_name: str) -> None:
    """Let a parametrized tensor of `module` be written and assigned like a Parameter.

    Args:
        module: its class is the one that torch's `register_parametrization` has created for it.
        tensor_name: name of the parametrized tensor.
    """
    cls: Any = type(module)
    base, composed = cls.__bases__[0], vars(cls)[tensor_name]
    compute = composed.fget

    def get(self: nn.Module) -> Tensor:
        """The tensor: an ordinary one in a forward pass, else a `ComposedWeight`."""
        value: Tensor = compute(self)
        if torch.compiler.is_compiling() or type(value) is not Tensor or _in_forward(sys._getframe(1)):
            return value
        chain: Any = self.parametrizations
        return _as_composed(value, chain[tensor_name], value.detach())

    def assign(self: nn.Module, name: str, value: Any) -> None:
        """Let ``conv.weight = nn.Parameter(...)`` assign the values; torch refuses to replace a parametrized tensor."""
        if isinstance(value, nn.Parameter) and parametrize.is_parametrized(self, name):
            value = value.detach()
        base.__setattr__(self, name, value)

    def set_values(self: Any, value: Tensor) -> None:
        composed.fset(self, value)
        _warn_of_lost_values(self.parametrizations[tensor_name], value, stacklevel=6)

    setattr(cls, tensor_name, property(get, set_values))
    cls.__setattr__ = assign


def _in_forward(caller: FrameType) -> bool:
    """Whether the caller is the `forward` of a layer, or a part of it."""
    name = caller.f_code.co_name
    return name.startswith(("forward", "_forward", "_conv_forward")) or torch._C._get_tracing_state() is not None
