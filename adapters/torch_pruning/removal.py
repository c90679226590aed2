"""Remove from masks and optimizer state what a pruning library removes from Parameters.

A library that removes channels replaces Parameters by smaller ones. While it does so, the Parameters hold the position
of each entry instead of its value; the positions that remain say which entries of the mask and of the optimizer's state
to keep, whatever the library's code does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ip_plugin.core.optimizer import inherit_conversion
from ip_plugin.core.tensor_ref import Target
from ip_plugin.errors import HostError

from ..shared.plain_view import PlainView


@torch.no_grad()
def follow(
    remove: Callable[[], None],
    modules: Iterable[nn.Module],
    view: PlainView,
    optimizer: Optimizer | None,
    entry_order: Mapping[Target, Tensor] | None = None,
) -> None:
    """Let a library remove channels of Parameters, and remove them from masks and optimizer state too.

    New Parameters keep ``requires_grad``; in `optimizer` they take the place and the state of the old ones. A Parameter
    with neither mask nor state keeps the values and the gradient that the library gives it.

    Args:
        remove: the library's work.
        modules: those whose Parameters it may replace.
        view: the model is exposed; the modules are plain.
        optimizer: one that trains the model.
        entry_order: {(module, name of a Parameter): index of each of its entries, in its shape}: another order in which
            the library sees the entries; they keep it.

    Raises:
        HostError: the library did more to a Parameter than to select entries. The caller undoes everything.
    """
    parameters: dict[Target, nn.Parameter] = {
        (module, name): parameter
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    orders = entry_order or {}
    with view.exact(parameters) as tensors:
        masked = {exposed.parameter for exposed in tensors if exposed.parametrization.mask is not None}
        marked = {
            parameter: orders.get(target)
            for target, parameter in parameters.items()
            if target in orders or parameter in masked or (optimizer and optimizer.state.get(parameter))
        }
        with _positions_instead_of_values(marked):
            remove()
        successors: dict[nn.Parameter, list[tuple[nn.Parameter, Tensor | None]]] = {}
        for (module, name), old in parameters.items():
            new = module._parameters.get(name)
            if new is None or new is old:
                continue
            kept = None
            if old in marked:
                kept = _read(new, old, f"{type(module).__name__}.{name}")
                new.data = _select(old.data, kept)
                new.grad = None if old.grad is None else _select(old.grad, kept)
            new.requires_grad_(old.requires_grad)
            successors.setdefault(old, []).append((new, kept))
            exposed = view.tensors.get((module, name))
            if exposed is not None:  # `new` takes the place of `old` under the parametrization
                if exposed.parametrization.mask is not None:
                    assert kept is not None
                    exposed.parametrization.mask = _select(exposed.parametrization.mask, kept)
                inherit_conversion(exposed.parameter, new)
                exposed.parameter = new
        if optimizer is not None:
            live = {parameter for module in view.model.modules() for parameter in module._parameters.values()}
            for old, new_ones in successors.items():
                _replace(optimizer, old, new_ones, stays=old in live)


@contextmanager
def _positions_instead_of_values(parameters: Mapping[nn.Parameter, Tensor | None]) -> Iterator[None]:
    """While the block runs, Parameters hold the position of each entry (in the given order, if any) and no gradient."""
    values = [(parameter, parameter.data, parameter.grad) for parameter in parameters]
    try:
        for parameter, order in parameters.items():
            parameter.grad = None
            # The smallest floating point type that can represent every position.
            dtype = torch.float32 if parameter.numel() <= 2**24 else torch.float64
            positions = torch.arange(parameter.numel(), device=parameter.device, dtype=dtype).reshape(parameter.shape)
            parameter.data = positions if order is None else positions.flatten()[order.to(positions.device)]
        yield
    finally:
        for parameter, data, grad in values:
            parameter.data, parameter.grad = data, grad


def _read(new: Tensor, old: Tensor, name: str) -> Tensor:
    """The indices of the entries of `old` that are in `new`, in the shape of `new`."""
    positions = new.data.long()
    selected = torch.zeros(old.numel(), dtype=torch.bool, device=old.device)
    inside = bool(((positions >= 0) & (positions < old.numel()) & (positions == new.data)).all())
    if inside:
        selected[positions.flatten()] = True
    if not inside or int(selected.sum()) != positions.numel():
        raise HostError(
            "Channels must be removed by selecting entries of Parameters, so that masks and optimizer state follow.",
            f"the parameter of {name!r} was replaced by something else",
            "let a customized pruning function index the Parameter",
        )
    return positions


def _select(values: Tensor, kept: Tensor) -> Tensor:
    selected = values.reshape(-1)[kept]
    if values.dim() == 4 and not values.is_contiguous() and values.is_contiguous(memory_format=torch.channels_last):
        return selected.contiguous(memory_format=torch.channels_last)
    return selected


def _replace(
    optimizer: Optimizer, old: nn.Parameter, successors: list[tuple[nn.Parameter, Tensor | None]], stays: bool
) -> None:
    """Give new Parameters the place and the state of an old one; of a tied one there may be several, and it `stays`."""
    members = [old] * stays + [new for new, _ in successors]
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            if parameter is old:
                group["params"][index : index + 1] = members
                if "param_names" in group:
                    group["param_names"][index : index + 1] = [group["param_names"][index]] * len(members)
                break
    state = optimizer.state.get(old) if stays else optimizer.state.pop(old, None)
    if not state:
        return
    scalars = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.numel() <= 1}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and name not in scalars}
    unknown = [name for name, value in tensors.items() if value.shape != old.shape]
    if unknown:
        warnings.warn(
            f"optimizer state {', '.join(unknown)} does not have the shape of its parameter and was reset", stacklevel=2
        )
        return
    for new, kept in successors:
        assert kept is not None
        copies = {name: value.clone() for name, value in scalars.items()}
        copies |= {name: _select(value, kept) for name, value in tensors.items()}
        optimizer.state[new] = {**state, **copies}
