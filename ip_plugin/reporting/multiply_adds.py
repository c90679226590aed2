"""Count the multiply-adds of each weight while a model runs: in modules, and where a weight is used by a function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

_aten = torch.ops.aten
#: Matrix products, and the number of their first matrix among the arguments.
_PRODUCTS = {_aten.mm: 0, _aten.bmm: 0, _aten.mv: 0, _aten.addmm: 1, _aten.baddbmm: 1, _aten.addmv: 1}


class MultiplyAdds(TorchDispatchMode):
    """Counts multiply-adds; a context manager.

    Attributes:
        counts: by the names that `watch` and `add` are given; of all other products, by an empty name.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self._named: dict[int, tuple[str, Tensor]] = {}
        self._hooks: list[RemovableHandle] = []
        self._inside = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Count what functions do with a tensor, or with views of it, outside of watched modules."""
        self._named[_storage(tensor)] = name, tensor  # kept alive, so that no other takes its place

    def watch(self, name: str, module: nn.Module, weight: Tensor) -> None:
        """Count what a convolution or linear layer does with its weight, whatever its forward makes of it."""

        def count(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            applied = (*args, *kwargs.values())[0] if isinstance(module, _ConvTransposeNd) else output
            self.counts[name] += _of_weight(applied, weight)
            if "weight" in vars(module):  # `torch.nn.utils.prune` computes it anew before every call
                self.add(name, vars(module)["weight"])

        self._around(module, count)

    def watch_composed(self, name: str, composer: nn.Module) -> None:
        """Count what functions do with a tensor that a module composes, but not its composition."""
        self._around(composer, lambda _, __, composed: None if self._inside else self.add(name, composed))

    def _around(self, module: nn.Module, after: Callable[..., None]) -> None:
        def enter(*_: Any) -> None:
            self._inside += 1

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._inside -= 1
            after(args, kwargs, output)

        self._hooks.append(module.register_forward_pre_hook(enter))
        self._hooks.append(module.register_forward_hook(leave, with_kwargs=True))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count in the block; afterwards the hooks are gone."""
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it hides the products
        try:
            with self:
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for hook in self._hooks:
                hook.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if self._inside:
            return result
        if packet is _aten.convolution:
            name, _ = self._named.get(_storage(args[1]), ("", None))
            self.counts[name] += _of_weight(args[0] if args[6] else result, args[1])
        elif packet in _PRODUCTS:
            first, second = args[_PRODUCTS[packet] :][:2]
            name = next((self._named[key][0] for key in map(_storage, (second, first)) if key in self._named), "")
            self.counts[name] += result.numel() * first.shape[-1]
        return result


def _of_weight(applied: Any, weight: Tensor) -> int:
    """Multiply-adds of a weight; each of its rows makes a channel of `applied`."""
    if not isinstance(applied, Tensor) or not weight.numel():
        return 0
    return applied.numel() // weight.shape[0] * weight.numel()


def _storage(tensor: Tensor) -> int:
    """What tells apart the memory of tensors; 0 if that is of an unusual kind."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else 0
