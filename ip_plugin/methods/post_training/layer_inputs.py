"""What layers see: the second moments of their inputs, in which errors of weights are errors of outputs.

A layer multiplies its weights with patches of its input. With the moments ``M`` of the patches, ``W M W^T`` is the
energy of its outputs, and ``(W - V) M (W - V)^T`` that of the difference which other weights make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ...core.parametrization import parametrizations
from ...core.tensor_ref import TensorRef
from ..derivatives import call, pure, sum_dtype

#: Numbers in the patches that are held at once.
_AT_ONCE = 1 << 24

_FORWARDS = [
    cls.forward
    for cls in (
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    )
]  # fmt: skip


def multiplies(layer: TensorRef) -> bool:
    """Whether a layer's outputs are its weight times patches of its input, as those of torch's own classes are."""
    plain = layer.parametrization is None or len(parametrizations(layer.module).weight) == 1
    return plain and type(layer.module).forward in _FORWARDS


def rows(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight, or coefficients of its shape, as ``(groups, out / groups, in / groups, N)``; a view."""
    if isinstance(module, _ConvTransposeNd):  # (in, out / groups, *kernel)
        parts = weight.reshape(module.groups, -1, weight.shape[1], math.prod(weight.shape[2:]))
        return parts.transpose(1, 2)
    groups = module.groups if isinstance(module, _ConvNd) else 1
    return weight.reshape(groups, -1, weight.shape[1], math.prod(weight.shape[2:]))


def patches(module: nn.Module, x: Tensor, size: Sequence[int]) -> Tensor:
    """What each output is made of: ``(groups, samples, in / groups, N)``.

    The outputs, as ``(groups, samples, out / groups)``, are ``einsum("gsin,goin->gso", patches, rows(weight))``.

    Args:
        module: a linear layer or convolution.
        x: its input, in a batch.
        size: spatial shape of its output.

    >>> conv = nn.Conv1d(1, 1, 2)
    >>> patches(conv, torch.tensor([[[1.0, 2.0, 3.0]]]), (2,)).squeeze()
    tensor([[1., 2.],
            [2., 3.]])
    """
    if not isinstance(module, _ConvNd):
        return x.reshape(1, -1, x.shape[-1], 1)
    kernel = module.kernel_size
    spans = [d * (k - 1) for d, k in zip(module.dilation, kernel, strict=True)]
    stride: Sequence[int] = module.stride
    if isinstance(module, _ConvTransposeNd):
        # A convolution, by the flipped kernel, of the input with zeros between its values.
        spread = x.new_zeros((*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True))))
        places: list[Any] = [slice(None, None, step) for step in stride]
        spread[(..., *places)] = x
        ends: list[int] = []  # the last dimension first, as `pad` wants them
        for axis in reversed(range(len(kernel))):
            before = spans[axis] - int(module.padding[axis])
            ends += [before, size[axis] + spans[axis] - before - spread.shape[axis + 2]]
        x = F.pad(spread, ends)
        stride = [1] * len(kernel)
    else:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for axis, (span, step, dilation) in enumerate(zip(spans, stride, module.dilation, strict=True)):
        x = x.unfold(axis + 2, span + 1, step)[..., ::dilation]
    if isinstance(module, _ConvTransposeNd):
        x = x.flip(tuple(range(-len(kernel), 0)))
    parts = x.unflatten(1, (module.groups, -1)).movedim((1, 2), (0, -len(kernel) - 1))
    found: Tensor = parts.reshape(module.groups, -1, parts.shape[-len(kernel) - 1], math.prod(kernel))
    return found


class Moments:
    """The second moments of a layer's patches, and their mean.

    >>> moments = Moments()
    >>> moments.add(torch.tensor([[[[1.0]], [[3.0]]]]))  # two samples of one number
    >>> moments.second(central=False), moments.second(central=True), moments.mean
    (tensor([[[5.]]]), tensor([[[1.]]]), tensor([[2.]]))
    """

    def __init__(self) -> None:
        self.samples = 0
        self._sum = self._products = torch.empty(0)

    def add(self, seen: Tensor) -> None:
        """Take in ``(groups, samples, in / groups, N)``."""
        seen = seen.flatten(2).to(sum_dtype(seen))
        if self.samples:
            self._sum += seen.sum(1)
            self._products.baddbmm_(seen.mT, seen)
        else:
            self._sum, self._products = seen.sum(1), seen.mT @ seen
        self.samples += seen.shape[1]

    @property
    def mean(self) -> Tensor:
        """``(groups, in / groups * N)``."""
        return self._sum / self.samples

    def second(self, *, central: bool) -> Tensor:
        """``(groups, in / groups * N, in / groups * N)``, about zero or about the mean."""
        found = self._products / self.samples
        return found.baddbmm_(self.mean[:, :, None], self.mean[:, None], alpha=-1) if central else found


def observe(
    model: nn.Module, watchers: Mapping[TensorRef, Callable[[Tensor], object]], inputs: Iterable[Any]
) -> dict[str, list[str]]:
    """Run a model in evaluation mode, without a trace in it; watchers get the patches of their layers, in parts.

    Returns:
        {layer name: the BatchNorms which take its outputs, and nothing else, in all of their calls}.
    """
    sources: dict[str, set[str | None]] = {}
    last: list[tuple[str, Tensor]] = []

    def of_layer(layer: TensorRef, watcher: Callable[[Tensor], object]) -> Callable[..., None]:
        def called(module: nn.Module, args: Any, kwargs: Mapping[str, Any], y: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            last[:] = [(layer.module_name, y)]
            size: tuple[int, ...] = ()
            if not isinstance(module, _ConvNd):
                x, each = x.reshape(-1, x.shape[-1]), x.shape[-1]
            else:
                dimensions = len(module.kernel_size)
                x = x.reshape(-1, *x.shape[-dimensions - 1 :])  # a single input may come without a batch
                size = tuple(y.shape[-dimensions:])
                each = x.shape[1] * math.prod(module.kernel_size) * math.prod(size)
            for some in x.split(max(1, _AT_ONCE // max(1, each))):
                watcher(patches(module, some, size))

        return called

    def of_norm(name: str) -> Callable[..., None]:
        def called(module: nn.Module, args: Any) -> None:  # noqa: ARG001
            sources.setdefault(name, set()).add(last[0][0] if last and args and args[0] is last[0][1] else None)

        return called

    handles = [each.module.register_forward_hook(of_layer(each, w), with_kwargs=True) for each, w in watchers.items()]
    handles += [
        module.register_forward_pre_hook(of_norm(name))
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
    ]
    try:
        with pure(model), torch.no_grad():
            model.eval()
            for each in inputs:
                call(model, {}, each)
    finally:
        for handle in handles:
            handle.remove()
    takers: dict[str, list[str]] = {}
    for name, layers in sources.items():
        [layer, *others] = layers
        if layer is not None and not others:
            takers.setdefault(layer, []).append(name)
    return takers
