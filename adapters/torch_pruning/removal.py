"""Cuts: what a host takes out of Parameters, followed into all that belongs to them.

A host that cuts channels replaces Parameters by smaller ones. While it works it sees, instead of values, the position
of each entry; what it leaves tells which entries of the mask and of the optimizer's state stay, without any knowledge
of how the host cuts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ip_plugin.core.optimizer import inherit_conversion
from ip_plugin.errors import UnfollowedCutError

from ..shared.plain_view import Loan, PlainView


class Slot(NamedTuple):
    """A place in a model that holds a Parameter."""

    module: nn.Module
    name: str


@torch.no_grad()
def follow(
    cut: Callable[[], None],
    modules: Iterable[nn.Module],
    view: PlainView,
    optimizer: Optimizer | None,
    arranged: Mapping[tuple[nn.Module, str], Tensor] | None = None,
) -> None:
    """Let a host cut Parameters, and cut what belongs to them in the same way.

    New Parameters keep ``requires_grad``; in `optimizer` they take the place and the state of the old ones. Where a
    Parameter has neither mask nor state, the host's own cut of its values and its gradient stands.

    Args:
        cut: the host's work.
        modules: those whose Parameters it may replace.
        view: entered; the modules are plain.
        optimizer: one that trains the model.
        arranged: {(module, name of a Parameter): index of each of its entries, in its shape}: the order in which the
            host is shown them, which then is their order. Others are in the order that they have.

    Raises:
        UnfollowedCutError: the host did more to a Parameter than to select from it. The caller undoes everything.
    """
    slots = {
        Slot(module, name): parameter
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    with view.exact(slots) as loans:
        masks = {id(loan.lent): loan for loan in loans if loan.parametrization.mask is not None}
        marked: dict[nn.Parameter, tuple[Tensor, Tensor | None]] = {}
        for slot, parameter in slots.items():
            order = (arranged or {}).get(slot)
            has_state = optimizer is not None and bool(optimizer.state.get(parameter))
            if parameter not in marked and (order is not None or id(parameter) in masks or has_state):
                marked[parameter] = parameter.data, parameter.grad
                parameter.grad = None
                positions = _positions(parameter)
                parameter.data = positions if order is None else positions.flatten()[order.to(positions.device)]
        try:
            cut()
        finally:
            for parameter, (data, grad) in marked.items():
                parameter.data, parameter.grad = data, grad
        heirs: dict[nn.Parameter, list[tuple[nn.Parameter, Tensor | None]]] = {}
        for slot, old in slots.items():
            new = slot.module._parameters.get(slot.name)
            if new is None or new is old:
                continue
            kept = None
            if old in marked:
                kept = _read(new, old, slot)
                new.data = _select(old.data, kept)
                new.grad = None if old.grad is None else _select(old.grad, kept)
            new.requires_grad_(old.requires_grad)
            heirs.setdefault(old, []).append((new, kept))
            loan = view.loans.get((slot.module, slot.name))
            if loan is not None:
                _inherit(loan, new, kept)
        if optimizer is not None:
            live = {id(parameter) for module in view.model.modules() for parameter in module._parameters.values()}
            for old, new_ones in heirs.items():
                _replace(optimizer, old, new_ones, stays=id(old) in live)


def _positions(parameter: Tensor) -> Tensor:
    """The index of every entry, in the smallest floating point type that can count so far."""
    count = parameter.numel()
    dtype = torch.float32 if count <= 2**24 else torch.float64
    return torch.arange(count, device=parameter.device, dtype=dtype).reshape(parameter.shape)


def _read(new: Tensor, old: Tensor, slot: Slot) -> Tensor:
    """Which entries of `old` the host kept, in the shape of what it left."""
    positions = new.data.long()
    selected = torch.zeros(old.numel(), dtype=torch.bool, device=old.device)
    inside = bool(((positions >= 0) & (positions < old.numel()) & (positions == new.data)).all())
    if inside:
        selected[positions.flatten()] = True
    if not inside or int(selected.sum()) != positions.numel():
        raise UnfollowedCutError(f"{type(slot.module).__name__}.{slot.name}")
    return positions


def _select(values: Tensor, kept: Tensor) -> Tensor:
    found = values.reshape(-1)[kept]
    if values.dim() == 4 and not values.is_contiguous() and values.is_contiguous(memory_format=torch.channels_last):
        return found.contiguous(memory_format=torch.channels_last)
    return found


def _inherit(loan: Loan, new: nn.Parameter, kept: Tensor | None) -> None:
    """Put a new Parameter under the parametrization that held the old one."""
    parametrization = loan.parametrization
    if parametrization.mask is not None:
        assert kept is not None
        parametrization.mask = _select(parametrization.mask, kept)
    inherit_conversion(loan.lent, new)
    loan.lent = new


def _replace(
    optimizer: Optimizer, old: nn.Parameter, heirs: list[tuple[nn.Parameter, Tensor | None]], stays: bool
) -> None:
    """Give new Parameters the place and the state of an old one; a tied one may have several heirs, and stay itself."""
    members = [old] * stays + [new for new, _ in heirs]
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            if parameter is old:
                group["params"][index : index + 1] = members
                if "param_names" in group:
                    group["param_names"][index : index + 1] = [group["param_names"][index]] * len(members)
                break
    state = optimizer.state.get(old)
    if not stays:
        optimizer.state.pop(old, None)
    if not state:
        return
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.numel() > 1}
    unknown = [name for name, value in tensors.items() if value.shape != old.shape]
    if unknown:
        warnings.warn(
            f"optimizer state {', '.join(unknown)} has not the shape of its parameter and was reset", stacklevel=2
        )
        return
    for new, kept in heirs:
        assert kept is not None
        optimizer.state[new] = {
            name: _select(value, kept) if name in tensors else _copy(value) for name, value in state.items()
        }


def _copy(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value
