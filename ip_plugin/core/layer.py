"""A prunable layer: where its coefficients, its basis and its masks are, in either space."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from ..errors import NonFiniteWeightError
from . import torch_masks
from .parametrization import Interspace, Mask, enter, ours, ours_in, parametrizations

Model = TypeVar("Model", bound=nn.Module)


class Target(NamedTuple):
    """A (module, tensor name) pair, as `torch.nn.utils.prune` takes it."""

    module: nn.Module
    tensor_name: str


def target(module: nn.Module, tensor_name: str = "weight") -> Target:
    """Where a pruner must act to reach a tensor: at the tensor itself, or at what our parametrization makes it of."""
    if ours(module, tensor_name) is None:
        return Target(module, tensor_name)
    return Target(parametrizations(module)[tensor_name], "original")


def combined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """What two masks keep together; None stands for a mask that keeps everything."""
    if first is None or second is None:
        return second if first is None else first
    return first & second


def mask_of(where: Target) -> Tensor | None:
    """What our mask and the host's keep together of a target; None if there is neither."""
    found = ours_in(where.module)
    return combined(None if found is None else found.mask, torch_masks.mask(*where))


def described(where: tuple[nn.Module, str], like: Tensor) -> str:
    """A target for a person, where names of layers are not known: ``weight of shape (10, 32)``."""
    module, what = where
    if isinstance(module, parametrize.ParametrizationList):
        what = "coefficients" if isinstance(module[0], Interspace) else "weight"
    return f"{what} of shape {tuple(like.shape)}"


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer whose weight or coefficients can be pruned."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> nn.Parameter:
        """The weight of a layer that has no parametrization; use `coefficients` where it may have one."""
        found: nn.Parameter = self.module.weight  # type: ignore[assignment]
        return found

    @property
    def parametrization(self) -> Mask | None:
        """Our parametrization of the weight, or None."""
        return ours(self.module)

    @property
    def interspace(self) -> Interspace | None:
        """Our parametrization if the layer is in the interspace, or None if it is spatial."""
        found = self.parametrization
        return found if isinstance(found, Interspace) else None

    @property
    def target(self) -> Target:
        """What a pruner acts on."""
        return target(self.module)

    @property
    def coefficients(self) -> nn.Parameter:
        """The trained Parameter without any mask: coefficients, or the weight of a spatial layer."""
        return torch_masks.parameter(*self.target)

    @property
    def composed(self) -> Tensor:
        """The weight that the layer computes with: masked, and composed in the interspace; without a gradient."""
        found: Tensor = self.module.weight  # type: ignore[assignment]
        return found.detach()

    @property
    def mask(self) -> Tensor | None:
        """What `mask_of` finds."""
        return mask_of(self.target)

    def set_mask(self, mask: Tensor) -> None:
        """Make `mask` our mask of this layer, instead of every mask there was."""
        torch_masks.take_off(*self.target)
        mask_target(self.target, mask)


@torch.no_grad()
def mask_target(where: Target, mask: Tensor) -> None:
    """Set our mask on a target; a tensor without a parametrization of ours gets one."""
    if not isinstance(where.module, parametrize.ParametrizationList):
        enter(where.module, where.tensor_name, Mask())
        where = target(*where)
    held: Any = where.module
    original = held.original
    # In the original's memory format, so that masking needs no reordering.
    held[0].mask = torch.empty_like(original, dtype=torch.bool).copy_(mask)


def check_finite(name: str, weight: Tensor) -> None:
    """Raise NonFiniteWeightError if a weight of the layer `name` has NaN or infinite values."""
    bad = weight.numel() - int(weight.detach().isfinite().sum())
    if bad:
        raise NonFiniteWeightError(name, bad)


def output_filters(module: nn.Module, weight: Tensor) -> Tensor:
    """What makes each output channel of a layer, one row each: its weight, or coefficients of the weight's shape."""
    if isinstance(module, _ConvTransposeNd):  # (in, out / groups, *kernel)
        parts = weight.reshape(module.groups, module.in_channels // module.groups, *weight.shape[1:])
        weight = parts.transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def add_mask(where: Target, kept: Tensor) -> None:
    """Mask a target on top of our mask that it has; where nothing is pruned it stays without a mask."""
    parametrization = ours_in(where.module)
    before = None if parametrization is None else parametrization.mask
    both = combined(before, kept)
    assert both is not None
    if before is not None or not bool(kept.all()):
        mask_target(where, both)


def inner(model: nn.Module) -> nn.Module:
    """The model inside of torch's wrappers: DistributedDataParallel, DataParallel, torch.compile."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inside := getattr(model, "_orig_mod", None), nn.Module):
            model = inside
        else:
            return model


def is_prunable(module: nn.Module) -> bool:
    """Whether a module is a convolution or linear layer with a Parameter that can be pruned."""
    if not isinstance(module, (_ConvNd, nn.Linear)):
        return False
    if ours(module) is None and parametrize.is_parametrized(module, "weight"):
        return False  # someone else's
    where = target(module)
    if where.tensor_name in torch_masks.pruned_names(where.module):
        return True
    return isinstance(getattr(*where, None), nn.Parameter) and not isinstance(
        getattr(*where), nn.parameter.UninitializedParameter
    )


def layers(model: nn.Module) -> Iterator[Layer]:
    """The prunable layers of a model, in the order of `named_modules`, each tied weight once."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if is_prunable(module):
            layer = Layer(name, module)
            if id(layer.coefficients) not in seen:
                seen.add(id(layer.coefficients))
                yield layer


def by_basis(found: Iterable[Layer]) -> list[list[Layer]]:
    """Those in the interspace; together those that share a basis."""
    groups: dict[int, list[Layer]] = {}
    for layer in found:
        if layer.interspace is not None:
            groups.setdefault(id(layer.interspace.basis), []).append(layer)
    return list(groups.values())
