"""`MaskTensor`, a bool tensor that takes part in averages of buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: An average moves a changed entry further than rounding does.
ROUNDING = 4 * torch.finfo(torch.float32).eps


class MaskTensor(Tensor):
    """The mask of a layer, as a buffer: of dtype bool, with which averages of weights can compute.

    `torch.optim.swa_utils.AveragedModel` with ``use_buffers=True`` and the averages of other libraries treat masks like
    weights: they write ``average + share * (model - average)``. bool tensors have no such arithmetic; with integers it
    loses the masks. Here a mask computes as zeros and ones of float32, and a value that is written into it between the
    two says that this entry of the model's mask has changed. So the mask of an average is that of the model.

    Results of operations, copies in files and compiled code are ordinary tensors.

    >>> average, model = (torch.tensor(mask).as_subclass(MaskTensor) for mask in ([True, True], [True, False]))
    >>> average.copy_(0.99 * average + 0.01 * model).tolist()
    [True, False]
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation on ordinary tensors: bools where that works, else zeros and ones."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name == "detach":
                return func(*args, **kwargs).as_subclass(cls)
            if name in ("sub", "rsub", "__sub__", "__rsub__", "_foreach_sub"):
                return func(*(_numbers(argument) for argument in args), **kwargs)
            if name in ("_foreach_addcdiv_", "_foreach_lerp_", "lerp_"):
                masks = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
                values = _numbers(args[0])
                func(values, *(_numbers(argument) for argument in args[1:]), **kwargs)
                for mask, value in zip(masks, values if isinstance(values, list) else [values], strict=True):
                    _write(mask, value)
                return None if isinstance(args[0], (list, tuple)) else args[0]
            if name == "copy_" and type(args[0]) is cls and args[1].is_floating_point():
                _write(args[0], args[1])
                return args[0]
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskTensor:
        copied: Any = self.as_subclass(Tensor).clone()
        if type(copied) is Tensor:  # else torch is tracing with tensors of a class of its own
            copied = copied.as_subclass(MaskTensor)
        memo[id(self)] = copied
        return copied  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _numbers(argument: Any) -> Any:
    """Bools as zeros and ones; lists of them, too."""
    if isinstance(argument, (list, tuple)):
        return [_numbers(item) for item in argument]
    return argument.float() if isinstance(argument, Tensor) and argument.dtype is torch.bool else argument


def _write(mask: Tensor, average: Tensor) -> None:
    """Flip the entries that an average has moved."""
    moved = (average.to(mask.device) - mask.float()).abs() > ROUNDING
    mask.logical_xor_(moved)
