"""Second moments of layer inputs, by which errors of weights are weighed as errors of outputs.

A layer multiplies its weights ``W`` by patches of its input. With the second moments ``M`` of the patches, the energy
of its outputs is ``W M W^T``, and the squared error of outputs with other weights ``V`` is ``(W - V) M (W - V)^T``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ...core.tensor_ref import TensorRef
from ..derivatives import call, pure, sum_dtype

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FORWARDS = [cls.forward for cls in _LAYERS]


def multiplies(ref: TensorRef) -> bool:
    """Whether a layer's outputs are its weight times patches of its input: so for torch's own forward methods."""
    plain = ref.chain is None or len(ref.chain) == 1
    return plain and type(ref.module).forward in _FORWARDS


def patches(module: nn.Module, x: Tensor, size: Sequence[int]) -> Tensor:
    """The patch of the input that each output is computed from: ``(groups, samples, in / groups, prod(kernel))``.

    Outputs ``(groups, samples, out / groups)`` are ``einsum("gsin,goin->gso", patches, by_group(module, weight))``.

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
        # It is a convolution with the flipped kernel of the input with zeros between its values.
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
    parts: Tensor = x.unflatten(1, (module.groups, -1)).movedim((1, 2), (0, -len(kernel) - 1))
    return parts.reshape(module.groups, -1, parts.shape[-len(kernel) - 1], math.prod(kernel))


class Moments:
    """The second moments and the mean of a layer's patches.

    >>> moments = Moments()
    >>> moments.add(torch.tensor([[[[1.0]], [[3.0]]]]))  # two samples of one number
    >>> moments.second(central=False), moments.second(central=True), moments.mean
    (tensor([[[5.]]]), tensor([[[1.]]]), tensor([[2.]]))
    """

    def __init__(self) -> None:
        self.samples = 0
        self._sum = self._products = torch.empty(0)

    def add(self, seen: Tensor) -> None:
        """Add patches: ``(groups, samples, in / groups, prod(kernel))``."""
        seen = seen.flatten(2).to(sum_dtype(seen))
        if self.samples:
            self._sum += seen.sum(1)
            self._products.baddbmm_(seen.mT, seen)
        else:
            self._sum, self._products = seen.sum(1), seen.mT @ seen
        self.samples += seen.shape[1]

    @property
    def mean(self) -> Tensor:
        """``(groups, in / groups * prod(kernel))``."""
        return self._sum / self.samples

    def second(self, *, central: bool) -> Tensor:
        """``(groups, D, D)`` with ``D = in / groups * prod(kernel)``, about zero or about the mean."""
        moments = self._products / self.samples
        return moments.baddbmm_(self.mean[:, :, None], self.mean[:, None], alpha=-1) if central else moments


def observe(
    model: nn.Module,
    watchers: Mapping[TensorRef, Callable[[Tensor], object]],
    inputs: Iterable[Any],
    *,
    patches_at_once: int = 1 << 24,
) -> dict[str, list[str]]:
    """Run a model in evaluation mode and pass the input patches of layers to watchers, in parts.

    Args:
        model: not changed.
        watchers: {layer of the model: called with patches of its input}.
        inputs: of the model, one for each run.
        patches_at_once: how many numbers in patches are held in memory together.

    Returns:
        {layer name: names of the BatchNorms whose input is this layer's output in all of their calls}.
    """
    sources: dict[str, set[str | None]] = {}
    last: list[tuple[str, Tensor]] = []

    def of_layer(ref: TensorRef, watcher: Callable[[Tensor], object]) -> Callable[..., None]:
        def called(module: nn.Module, args: Any, kwargs: Mapping[str, Any], y: Tensor) -> None:
            last[:] = [(ref.module_name, y)]
            kernel = module.kernel_size if isinstance(module, _ConvNd) else ()
            x = args[0] if args else kwargs["input"]
            x = x.reshape(-1, *x.shape[-len(kernel) - 1 :])  # a single input may come without a batch
            size = y.shape[y.dim() - len(kernel) :]
            numbers = x.shape[1] * math.prod(kernel) * math.prod(size)
            for part in x.split(max(1, patches_at_once // max(1, numbers))):
                watcher(patches(module, part, size))

        return called

    def of_norm(name: str) -> Callable[..., None]:
        def called(module: nn.Module, args: Any) -> None:  # noqa: ARG001
            sources.setdefault(name, set()).add(last[0][0] if last and args and args[0] is last[0][1] else None)

        return called

    with ExitStack() as hooks:
        for ref, watcher in watchers.items():
            hooks.enter_context(ref.module.register_forward_hook(of_layer(ref, watcher), with_kwargs=True))
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                hooks.enter_context(module.register_forward_pre_hook(of_norm(name)))
        with pure(model), torch.no_grad():
            model.eval()
            for batch in inputs:
                call(model, {}, batch)
    norms: dict[str, list[str]] = {}
    for name, (layer, *others) in sources.items():
        if layer is not None and not others:
            norms.setdefault(layer, []).append(name)
    return norms
