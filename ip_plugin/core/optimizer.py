"""Optimizers and bases: an existing one takes them in (`join_optimizer`), a new one gets groups (`param_groups`)."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ..basis import bases
from ..errors import OptimizerMismatchError
from .parametrization import Interspace
from .tensor_ref import Model, TensorRef, by_basis, prunable_tensors

#: Version of a layer's coefficients when `interspace` changed their values, until `join_optimizer` has been called.
_converted = WeakTensorKeyDictionary()
_watched: WeakSet[Any] = WeakSet()  # torch's ParametrizationLists, each with an Interspace
_checked: WeakSet[Optimizer] = WeakSet()
_hook: RemovableHandle | None = None


def join_optimizer(model: Model, optimizer: Optimizer) -> Model:
    """Let an optimizer that was built before `interspace` train the bases too.

    Every trainable basis joins the parameter group that holds its coefficients, with that group's settings, weight
    decay included. Where `interspace` changed the coefficients' values (a basis that is not standard), SGD momentum is
    carried over exactly; other state of these coefficients is reset with a warning. To be called once, before the next
    ``optimizer.step()``; a second call, or one for a plain model, changes nothing.

    Args:
        model: the model that `interspace` returned.
        optimizer: changed in place.

    Returns:
        The model.

    Raises:
        OptimizerMismatchError: the optimizer trains none of the model's coefficients.

    >>> import torch
    >>> from ip_plugin import interspace
    >>> model = nn.Conv2d(3, 16, 3)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> model = join_optimizer(interspace(model), optimizer)
    >>> [tuple(p.shape) for p in optimizer.param_groups[0]["params"]]
    [(16, 3, 3, 3), (16,), (9, 9)]
    """
    converted = [layer for layer in prunable_tensors(model) if layer.interspace is not None]
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    check_trains(optimizer, converted)
    mine = [layer for layer in converted if id(layer.parameter) in group_of]
    names = {id(p): name for name, p in model.named_parameters()}
    joined: dict[int, tuple[TensorRef, dict[str, Any]]] = {}
    for layer in mine:
        assert layer.interspace is not None
        basis = layer.interspace.basis
        group = group_of[id(layer.parameter)]
        if id(basis) in joined and joined[id(basis)][1] is not group:
            first = joined[id(basis)][0].module_name
            warnings.warn(
                f"layers {first!r} and {layer.module_name!r} share a basis and are in different parameter groups: "
                f"the basis joined the group of {first!r}",
                stacklevel=2,
            )
        elif id(basis) not in group_of and basis.requires_grad:
            group["params"].append(basis)
            if "param_names" in group:
                group["param_names"].append(names[id(basis)])
            group_of[id(basis)] = group
            joined[id(basis)] = layer, group
    outcomes = {layer.module_name: _carry_state(layer, optimizer) for layer in mine}
    for outcome in dict.fromkeys(outcomes.values()):
        if outcome is not None:
            names_of = ", ".join(repr(name) for name, what in outcomes.items() if what == outcome)
            warnings.warn(f"{outcome}: layers {names_of}", stacklevel=2)
    return model


def check_trains(optimizer: Optimizer, converted: Sequence[TensorRef]) -> None:
    """Raise OptimizerMismatchError if an optimizer trains none of some layers."""
    trained = _ids(optimizer)
    if converted and not any(id(layer.parameter) in trained for layer in converted):
        raise OptimizerMismatchError(
            f"{len(converted)} interspace layers, none of their coefficients in the optimizer's parameter groups"
        )


def note_conversion(coefficients: nn.Parameter, changed: bool = True) -> None:
    """Note whether a layer that enters a basis has got other values, which state of optimizers does not belong to."""
    _converted.pop(coefficients, None)
    if changed:
        _converted[coefficients] = coefficients._version


def inherit_conversion(old: nn.Parameter, new: nn.Parameter) -> None:
    """Treat a Parameter that was selected from coefficients as these: not trained since the conversion, or trained."""
    if _converted.get(old) == old._version:
        note_conversion(new)


def _carry_state(layer: TensorRef, optimizer: Optimizer) -> str | None:
    """Write state that was gathered for weights in the coefficients' basis; returns what could not be done."""
    space, coefficients = layer.interspace, layer.parameter
    assert space is not None
    converted_at = _converted.pop(coefficients, None)
    if converted_at is None or not optimizer.state.get(coefficients):
        return None
    if coefficients._version != converted_at:
        return "trained between interspace and join_optimizer, so optimizer state was kept as it is"
    if not isinstance(optimizer, SGD):
        del optimizer.state[coefficients]
        return f"state of {type(optimizer).__name__} cannot be carried into another basis and was reset"
    momentum = optimizer.state[coefficients].get("momentum_buffer")
    if momentum is not None:
        # Momentum is a sum of gradients, and d/dc = d/dh times the transposed basis.
        bases.transform_(momentum, space.effective_basis.detach().mT)
    return None


def param_groups(
    model: nn.Module, *, weight_decay: float, basis_weight_decay: float = 0.0, basis_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for a new optimizer: bases get no weight decay unless told otherwise.

    Args:
        model: in either space; of a plain model there is one group.
        weight_decay: of everything that is not a basis.
        basis_weight_decay: of the bases.
        basis_lr: learning rate of the bases; None is the optimizer's.

    Returns:
        A list that every ``torch.optim`` optimizer takes instead of parameters.

    >>> import torch
    >>> from ip_plugin import interspace
    >>> model = interspace(nn.Conv2d(3, 16, 3))
    >>> optimizer = torch.optim.SGD(param_groups(model, weight_decay=5e-4), lr=0.1)
    >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    [(2, 0.0005), (1, 0.0)]
    """
    basis = by_basis(prunable_tensors(model))
    rest = [p for p in model.parameters() if p not in basis]
    groups: list[dict[str, Any]] = [{"params": rest, "weight_decay": weight_decay}]
    if basis:
        groups.append({"params": list(basis), "weight_decay": basis_weight_decay})
        if basis_lr is not None:
            groups[1]["lr"] = basis_lr
    return groups


def watch(model: nn.Module) -> None:
    """Warn once if an optimizer steps coefficients of a model whose trained bases no optimizer has."""
    global _hook
    _watched.update(ref.chain for ref in prunable_tensors(model) if ref.interspace is not None)
    _checked.clear()
    if _hook is None and _watched:
        _hook = register_optimizer_step_post_hook(_warn_of_bases_left_out)


def _warn_of_bases_left_out(optimizer: Optimizer, *_: object) -> None:
    if torch.compiler.is_compiling() or optimizer in _checked:
        return
    _checked.add(optimizer)
    left_out = _left_out(optimizer)
    if not left_out:
        return
    for other in gc.get_objects():
        if issubclass(type(other), Optimizer):
            held = _ids(other)
            left_out = [chain for chain in left_out if id(chain[0].basis) not in held]
    if left_out:
        _watched.difference_update(left_out)
        warnings.warn(
            f"{type(optimizer).__name__} trains the coefficients of {len(left_out)} layers in the interspace, and no "
            "optimizer trains their filter bases, so they stay what they are: call "
            "`ip_plugin.join_optimizer(model, optimizer)`, or convert with `interspace(model, optimizer=optimizer)`; "
            "bases that are held on purpose need `interspace(model, train_basis=False)`",
            stacklevel=3,
        )


def _left_out(optimizer: Optimizer) -> list[Any]:
    """The watched layers of which an optimizer trains the coefficients, and not the basis that should be trained."""
    held = _ids(optimizer)
    return [
        chain
        for chain in _watched
        if isinstance(chain[0], Interspace)
        and chain[0].basis.requires_grad
        and id(chain.original) in held
        and id(chain[0].basis) not in held
    ]


def _ids(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
