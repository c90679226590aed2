"""A switched session: which models are converted, when, and what is printed of them."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..basis.bases import CONSTRAINTS, BasisSpec, Constraint, make
from ..core.convert import groups_of, interspace, is_costly, obstacle
from ..core.optimizer import join_optimizer
from ..core.parametrization import order
from ..core.tensor_ref import by_basis, own_tensors, prunable_tensors
from ..errors import ArgumentError, SelectionError, listed
from ..reporting import report


@dataclass(frozen=True)
class Options:
    """How a session converts; see `ip_plugin.switch_on`."""

    space: Literal["interspace", "spatial"] = "interspace"
    basis: BasisSpec = "standard"
    sharing: Literal["layer", "model"] = "layer"
    constraint: Constraint = "unit"
    convert_at: Literal["start", "pruning"] = "start"
    layers: tuple[str, ...] = ()
    quiet: bool = False

    def __post_init__(self) -> None:
        known = {
            "space": ("interspace", "spatial"),
            "sharing": ("layer", "model"),
            "constraint": CONSTRAINTS,
            "convert_at": ("start", "pruning"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ArgumentError(
                    f"`{name}` must be one of {', '.join(map(repr, values))}.",
                    repr(getattr(self, name)),
                    f"leave it out: {getattr(type(self), name)!r}",
                )
        if isinstance(self.basis, str):
            make(self.basis, (2, 2), torch.Generator())  # refuses a name that is not known


class Session:
    """What the patches of a switched session ask and tell.

    Attributes:
        options: how models are converted.
        models: those that were converted, or met in the control run, while they are alive; the last one is kept alive,
            so that it can be reported when the script has ended.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.models: WeakSet[nn.Module] = WeakSet()
        self.last: nn.Module | None = None
        self._refused: WeakSet[nn.Module] = WeakSet()
        self._complete: WeakKeyDictionary[Optimizer, tuple[int, int]] = WeakKeyDictionary()
        self._pruned_by: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # and not printed yet
        self._printed: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()

    def say(self, line: str) -> None:
        """Print a line to stderr; in a distributed run only the first process does."""
        if not self.options.quiet and os.environ.get("RANK", "0") == "0":
            print(f"[ip-plugin] {line}", file=sys.stderr, flush=True)

    # Conversion

    def convert(self, model: nn.Module) -> None:
        """Convert the layers of a model that can be and are not yet; their bases join every optimizer that has them."""
        model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
        if self.options.space == "spatial":
            self._remember(model)
            return
        chosen = [name for name, module in model.named_modules() if _can_convert(module) and self._is_selected(name)]
        costly: list[str] = []
        if chosen and not self.options.layers:
            groups = groups_of(model, self.options.sharing, chosen)
            costly = [layer.module_name for members in groups if is_costly(members) for layer in members]
            chosen = [name for name in chosen if name not in costly]
        if not chosen:
            if model not in self.models and model not in self._refused:
                self._refused.add(model)
                self.say(f"{_called(model)}: no layer to convert" + self._why_none(model))
            return
        before = {id(parameter) for parameter in model.parameters()}
        options = self.options
        interspace(model, basis=options.basis, sharing=options.sharing, constraint=options.constraint, layers=chosen)
        bases = [parameter for parameter in model.parameters() if id(parameter) not in before]
        self.say(
            f"{_called(model)}: {len(chosen)} layers converted ({options.basis} basis), {len(bases)} bases with "
            f"{sum(basis.numel() for basis in bases):,} numbers added"
            + (f"; {listed(costly)} stay spatial: a basis would have as many numbers as they" if costly else "")
        )
        self._remember(model)
        for optimizer in _living(Optimizer):
            if "param_groups" in vars(optimizer):  # else it is being built
                self.join(optimizer)

    def convert_owners(self, parameters: Sequence[Tensor]) -> None:
        """Convert the models that hold Parameters, if the weight of a layer that can be converted is among them."""
        ids = {id(parameter) for parameter in parameters}
        for model in _owners(ids):
            if any(id(module._parameters.get("weight")) in ids for module in model.modules() if _can_convert(module)):
                self.convert(model)

    def convert_modules(self, modules: Iterable[nn.Module]) -> None:
        """Convert the models that modules belong to; those of no model by themselves."""
        waiting = [module for module in dict.fromkeys(modules) if _can_convert(module) and module not in self._refused]
        if not waiting:
            return
        models = _owners({id(parameter) for module in waiting for parameter in module.parameters()})
        whole = [model for model in models if model not in waiting]
        for model in whole:
            self.convert(model)
        alone = [module for module in waiting if not any(module in set(model.modules()) for model in whole)]
        if len(alone) > 1 and self.options.sharing == "model" and self.options.space == "interspace":
            raise SelectionError(
                'With sharing="model" the model that layers belong to must be known.',
                f"{len(alone)} layers that belong to no module",
                "build the optimizer, or put the layers into a module, before they are pruned; or share by layer",
            )
        for module in alone:
            self.convert(module)

    def _is_selected(self, name: str) -> bool:
        patterns = self.options.layers
        return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)

    def _why_none(self, model: nn.Module) -> str:
        if self.options.layers and any(obstacle(module) is None for module in model.modules()):
            return f"; no convolution has a name like {', '.join(map(repr, self.options.layers))}"
        return "; only convolutions whose kernel has more than one element have a basis"

    def _remember(self, model: nn.Module) -> None:
        self.models.add(model)
        self.last = model

    def join(self, optimizer: Optimizer) -> None:
        """Let the bases of all models join an optimizer that has their coefficients."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for model in list(self.models):
            groups = by_basis(ref for ref in prunable_tensors(model) if id(ref.parameter) in held)
            if any(id(basis) not in held for basis in groups):
                join_optimizer(model, optimizer)

    def arrange(self, optimizer: Optimizer) -> None:
        """Put the parameters of a new optimizer in the order of the plain model, bases last.

        So saved state fits, whether an optimizer is built before its model is converted or after.
        """
        ranks = {id(parameter): rank for model in self.models for rank, parameter in enumerate(_plain_order(model))}
        for group in optimizer.param_groups:
            if any(id(parameter) in ranks for parameter in group["params"]):
                places = sorted(range(len(group["params"])), key=lambda i: ranks.get(id(group["params"][i]), -1))
                for key in ("params", "param_names"):
                    if key in group:
                        group[key] = [group[key][i] for i in places]

    def before_step(self, optimizer: Optimizer) -> None:
        """Before an optimizer steps: print what was pruned; an optimizer that has missed a basis gets it now."""
        self.flush()
        if self._complete.get(optimizer) == self._size_of(optimizer):
            return
        before = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self.join(optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in before:
                    parameter.grad = None  # it may not be unscaled or clipped like the others
        self._complete[optimizer] = self._size_of(optimizer)

    def _size_of(self, optimizer: Optimizer) -> tuple[int, int]:
        return sum(len(group["params"]) for group in optimizer.param_groups), len(self.models)

    # Pruning

    def note_pruning(self, what: str, modules: Iterable[nn.Module]) -> None:
        """Remember that something was pruned; it is printed once, at the next step of an optimizer or at the end."""
        pruned = set(modules)
        for model in self.models:
            if not pruned.isdisjoint(model.modules()):
                self._pruned_by[model] = what

    def flush(self) -> None:
        """Print what was pruned since the last time."""
        for model, what in list(self._pruned_by.items()):
            line = f"{_called(model)} pruned by {what}: {_totals(model)}"
            if self._printed.get(model) != line:
                self._printed[model] = line
                self.say(line)
        self._pruned_by.clear()

    def finish(self) -> None:
        """Print the sparsity and size of every model that still exists."""
        self.flush()
        if not self.models:
            self.say("no model was converted: no optimizer was built for a convolution, and none was pruned")
        elif not self._printed and self.options.space == "interspace":
            self.say("nothing was pruned")
        for model in self.models:
            self.say(f"{_called(model)} at the end: {_totals(model)}")


def _called(model: nn.Module) -> str:
    return type(model).__name__.removeprefix("Parametrized")


@torch.no_grad()
def _totals(model: nn.Module) -> str:
    totals = report(model)
    rows = totals.prunable
    return (
        f"{rows.sparsity:.2%} of {rows.parameters:,} prunable numbers are zero, {rows.nonzeros:,} are left; "
        f"{totals.everything.parameters:,} parameters, {totals.everything.bytes_sparse:,} bytes in a compact file"
    )


def _can_convert(module: nn.Module) -> bool:
    """Whether a module is a convolution that can be converted, and is neither converted nor pruned yet."""
    weight = module._parameters.get("weight")
    initialised = isinstance(weight, nn.Parameter) and not isinstance(weight, nn.parameter.UninitializedParameter)
    return initialised and obstacle(module) is None


def _plain_order(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model in the order that they have on the plain model, then its bases."""
    found: list[nn.Parameter] = []
    for module in model.modules():
        own = {ref.tensor_name: ref.parameter for ref in own_tensors(module) if not ref.is_buffer}
        found += [own[name] for name in dict.fromkeys([*order(module), *own]) if name in own]
    return [*found, *by_basis(prunable_tensors(model))]


def _living(cls: type) -> list[Any]:
    """All objects of a class; by their type, because `isinstance` asks proxies for what they stand for."""
    return [each for each in gc.get_objects() if issubclass(type(each), cls)]


def _owners(ids: set[int]) -> list[nn.Module]:
    """The outermost modules that hold Parameters, given by their ids."""
    holding = [
        module
        for module in _living(nn.Module)
        if "_modules" in vars(module) and any(id(parameter) in ids for parameter in nn.Module.parameters(module))
    ]
    inner = {id(child) for module in holding for child in module.modules() if child is not module}
    return [module for module in holding if id(module) not in inner]
