"""Networks for the tests of Torch-Pruning, with plain reference models, and what is compared of the two."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from ip_plugin import bake, interspace


class Net(nn.Module):
    """A residual sum, a concatenation, grouped and depthwise convolutions, 5x5 and 1x1 kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.left = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.branch = nn.Conv2d(8, 6, 5, padding=2)
        self.joined = nn.BatchNorm2d(14)
        self.depthwise = nn.Conv2d(14, 14, 3, padding=1, groups=14)
        self.grouped = nn.Conv2d(14, 12, 3, padding=1, groups=2)
        self.wide = nn.Conv2d(12, 10, 3, stride=2)
        self.narrow = nn.Conv2d(10, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.norm(self.left(x)))
        x = self.joined(torch.cat([x, F.relu(self.branch(x))], dim=1))
        x = F.relu(self.grouped(F.relu(self.depthwise(x))))
        x = F.relu(self.narrow(self.wide(x)))
        return self.head(x.mean((2, 3)))


class Marked(nn.Conv2d):
    """A class of a user's own, which a customized pruner can be for."""


class Residual(nn.Module):
    """What the host's regularizers can take: every group has a norm, and there are no channel groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.left = Marked(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 10, (3, 1))
        self.last = nn.BatchNorm2d(10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.norm(self.left(x)))
        return self.head(F.relu(self.last(self.wide(x))).mean((2, 3)))


X = (2, 3, 8, 8)


def both_spaces(basis: Any = "standard", cls: Callable[[], Any] = Net) -> tuple[Any, Any, Tensor]:
    """A network in the interspace, its plain reference model, and an input, in float64."""
    torch.manual_seed(0)
    plain = cls().double()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    x = torch.randn(X, dtype=torch.float64)
    return interspace(copy.deepcopy(plain), basis=basis, sharing="model"), plain, x


def same(model: nn.Module, plain: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    """A model of the interspace, baked, is the plain one."""
    baked = bake(copy.deepcopy(model)).eval()
    ours, theirs = baked.state_dict(), plain.state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    for (name, module), other in zip(baked.named_modules(), plain.modules(), strict=True):
        for attribute in ("in_channels", "out_channels", "groups", "num_features", "in_features", "out_features"):
            assert getattr(module, attribute, None) == getattr(other, attribute, None), (name, attribute)
    with torch.no_grad():
        expected = plain.eval()(x)
        assert (baked(x) - expected).norm() <= tolerance * expected.norm()
        assert (model.eval()(x) - expected).norm() <= tolerance * expected.norm()


def magnitude(**options: Any) -> Any:
    return tp.importance.GroupMagnitudeImportance(p=2, **options)


def heads(model: nn.Module) -> list[nn.Module]:
    return [[module for module in model.modules() if isinstance(module, nn.Linear)][-1]]


def scored(model: nn.Module, importance: Any, x: Tensor) -> None:
    """Give an importance the gradients that it asks for."""
    target = torch.arange(len(x)) % 4
    if isinstance(importance, tp.importance.GroupHessianImportance):
        for loss in F.cross_entropy(model(x), target, reduction="none"):
            model.zero_grad()
            loss.backward(retain_graph=True)
            importance.accumulate_grad(model)
    else:
        F.cross_entropy(model(x), target).backward()


class Widest(tp.importance.Importance):
    """A user's own: the largest entry of a filter of the first layer, in magnitude."""

    def __call__(self, group: Any) -> Tensor:
        weight = group[0].dep.layer.weight
        dim = 1 if getattr(group[0].dep.layer, "transposed", False) else 0
        return weight.detach().movedim(dim, 0).flatten(1).abs().amax(1)[group[0].idxs]


IMPORTANCES: dict[str, Callable[[], Any]] = {
    **{f"l{p}": lambda p=p: tp.importance.GroupMagnitudeImportance(p=p) for p in (1, 2)},
    **{
        f"normalizer_{normalizer}": lambda normalizer=normalizer: magnitude(normalizer=normalizer)
        for normalizer in (None, "sum", "standarization", "max", "gaussian", "sentinel_0.5", "lamp")
    },
    **{
        f"reduction_{reduction}": lambda reduction=reduction: magnitude(group_reduction=reduction)
        for reduction in ("sum", "max", "prod", "first", "gate")
    },
    "bias": lambda: magnitude(bias=True),
    "bn_scale": tp.importance.BNScaleImportance,
    "lamp": tp.importance.LAMPImportance,
    "fpgm": tp.importance.FPGMImportance,
    "random": tp.importance.RandomImportance,
    "taylor": tp.importance.GroupTaylorImportance,
    "taylor_multivariable": lambda: tp.importance.GroupTaylorImportance(multivariable=True),
    "hessian": tp.importance.GroupHessianImportance,
    "users_own": Widest,
    "function": lambda: lambda group: Widest()(group),
}
