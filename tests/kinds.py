"""The layer kinds, bases and sharings that shared behaviours are tested over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ip_plugin import interspace


class StandardizedConv2d(nn.Conv2d):
    """A user's subclass with a forward of its own: weights standardized per output channel."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@dataclass(frozen=True)
class Kind:
    """Two layers of one kind with a non-linearity between, and the shape of an input."""

    layers: Callable[[], tuple[nn.Module, nn.Module]]
    shape: tuple[int, ...]

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        torch.manual_seed(0)
        first, second = self.layers()
        return nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.LazyLinear(3)).to(dtype)

    def ready(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Tensor]:
        """The model, initialised, and an input."""
        model = self.model(dtype)
        x = torch.randn(self.shape, dtype=dtype)
        model(x)
        return model, x


def pair(cls: type[nn.Module], a: int, b: int, c: int, **options: Any) -> Callable[[], tuple[nn.Module, nn.Module]]:
    return lambda: (cls(a, b, **options), cls(b, c, **options))


KINDS = {
    "conv1d": Kind(pair(nn.Conv1d, 3, 4, 5, kernel_size=3), (2, 3, 9)),
    "conv2d": Kind(pair(nn.Conv2d, 3, 4, 5, kernel_size=3), (2, 3, 7, 7)),
    "conv3d": Kind(pair(nn.Conv3d, 2, 3, 4, kernel_size=(3, 2, 2)), (2, 2, 6, 5, 5)),
    "transposed1d": Kind(pair(nn.ConvTranspose1d, 3, 4, 5, kernel_size=3, stride=2), (2, 3, 5)),
    "transposed2d": Kind(pair(nn.ConvTranspose2d, 3, 4, 5, kernel_size=3, padding=1), (2, 3, 5, 5)),
    "transposed3d": Kind(pair(nn.ConvTranspose3d, 2, 3, 4, kernel_size=2), (2, 2, 3, 3, 3)),
    "transposed2d_grouped": Kind(pair(nn.ConvTranspose2d, 4, 6, 4, kernel_size=3, groups=2), (2, 4, 4, 4)),
    "grouped": Kind(pair(nn.Conv2d, 4, 6, 8, kernel_size=3, groups=2), (2, 4, 7, 7)),
    "depthwise": Kind(pair(nn.Conv2d, 6, 6, 6, kernel_size=3, groups=6), (2, 6, 7, 7)),
    "dilated": Kind(pair(nn.Conv2d, 3, 4, 5, kernel_size=3, dilation=2), (2, 3, 11, 11)),
    "strided": Kind(pair(nn.Conv2d, 3, 4, 5, kernel_size=3, stride=2), (2, 3, 11, 11)),
    "1x3": Kind(pair(nn.Conv2d, 3, 4, 5, kernel_size=(1, 3)), (2, 3, 7, 7)),
    "3x1": Kind(pair(nn.Conv2d, 3, 4, 5, kernel_size=(3, 1)), (2, 3, 7, 7)),
    "7x7": Kind(pair(nn.Conv2d, 3, 4, 5, kernel_size=7, padding=3), (2, 3, 7, 7)),
    "circular": Kind(pair(nn.Conv2d, 3, 4, 5, kernel_size=3, padding=1, padding_mode="circular"), (2, 3, 6, 6)),
    "reflect_same": Kind(pair(nn.Conv2d, 3, 4, 5, kernel_size=3, padding="same", padding_mode="reflect"), (2, 3, 6, 6)),
    "no_bias": Kind(pair(nn.Conv2d, 3, 4, 5, kernel_size=3, bias=False), (2, 3, 7, 7)),
    "subclass": Kind(pair(StandardizedConv2d, 3, 4, 5, kernel_size=3), (2, 3, 7, 7)),
}
BASES = ("standard", "orthonormal", "dct", "tensor")
SHARINGS: dict[str, Any] = {"layer": "layer", "model": "model", "callable": lambda name, module: type(module).__name__}


def basis_for(name: str, model: nn.Sequential) -> Any:
    """A basis by name; "tensor" is neither orthonormal nor of unit norms."""
    if name != "tensor":
        return name
    n = model[0].weight.shape[2:].numel()
    generator = torch.Generator().manual_seed(1)
    return torch.eye(n) * 1.5 + 0.3 * torch.rand(n, n, generator=generator)


@dataclass(frozen=True)
class Case:
    """A layer kind with a basis and a sharing."""

    kind: str
    basis: str
    sharing: str

    def plain(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Tensor]:
        return KINDS[self.kind].ready(dtype)

    def convert(self, model: nn.Sequential, **options: Any) -> nn.Sequential:
        return interspace(model, basis=basis_for(self.basis, model), sharing=SHARINGS[self.sharing], **options)

    def interspace(self, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Sequential, Tensor]:
        model, x = self.plain(dtype)
        return self.convert(model, **options), x


#: Every kind with every basis, and the sharings dealt out so that every two of the three meet.
CASES = [
    Case(kind, basis, list(SHARINGS)[(i + j) % len(SHARINGS)])
    for i, kind in enumerate(KINDS)
    for j, basis in enumerate(BASES)
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.basis}-{case.sharing}")
every_kind = pytest.mark.parametrize("kind", KINDS)


def train(model: nn.Module, x: Tensor, steps: int = 3, **options: Any) -> None:
    """A few steps of SGD with momentum and weight decay on targets of the model's own output size."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01, **options)
    target = torch.arange(x.shape[0]) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()


def backward(model: nn.Module, x: Tensor) -> Tensor:
    """Output of a forward and backward pass with fresh gradients."""
    model.zero_grad()
    output: Tensor = model(x)
    F.cross_entropy(output, torch.arange(x.shape[0]) % 3).backward()
    return output.detach()
