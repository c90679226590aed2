"""Torch-Pruning in either space: one call makes any of its pruners one that works on coefficients.

::

    from ip_plugin.adapters.torch_pruning import pruner

    cutter = pruner(tp.pruner.GroupNormPruner, model, example_inputs, importance=..., pruning_ratio=0.5)
    cutter.step()

The object is the host's pruner, and everything that its documentation says can be done with it. While one of its
methods runs, or one of its groups is pruned, the host sees plain layers whose ``weight`` is the coefficients: masked,
with magnitudes in unit gauge, gradients with them. Channels are really cut, from coefficients, masks and the state of
the optimizer; bases stay whole and shared. A call that fails leaves model, pruner and optimizer as they were.

On a plain model the pruner does what the host does, and keeps the optimizer, training modes and ``requires_grad``.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import GeneratorType
from typing import Any, TypeVar

import torch
import torch_pruning as tp
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from ip_plugin.core.tensor_ref import TensorRef
from ip_plugin.errors import (
    AlreadyParametrizedError,
    CompiledModelError,
    ExampleInputError,
    ForeignModuleError,
    InterspaceError,
    InvalidPrunerError,
    InvalidRatioError,
    OptimizerMismatchError,
)
from ip_plugin.utils.example_input import run
from ip_plugin.utils.validation import is_fraction

from ..shared.plain_view import Loan, PlainView, plain_layers
from ..shared.transaction import transaction
from .removal import follow
from .variety import VariedImportance

Pruner = TypeVar("Pruner")

#: Arguments of the host's pruners that are ratios, or dicts of ratios.
_RATIOS = ("pruning_ratio", "max_pruning_ratio", "head_pruning_ratio", "ch_sparsity")
_RATIO_DICTS = ("pruning_ratio_dict", "head_pruning_ratio_dict", "ch_sparsity_dict")
#: Arguments whose keys, or items, are modules of the model.
_MODULES = (*_RATIO_DICTS, "in_channel_groups", "out_channel_groups", "num_heads", "channel_groups", "ignored_layers")


def pruner(
    cls: type[Pruner] | functools.partial[Pruner],
    model: nn.Module,
    example_inputs: Any,
    *,
    optimizer: Optimizer | None = None,
    **host_arguments: Any,
) -> Pruner:
    """Make a pruner of Torch-Pruning that works in either space.

    Args:
        cls: a pruner class of Torch-Pruning, a subclass of one's own, or a `functools.partial` of either.
        model: in the interspace, plain, or partly one and partly the other; in training or evaluation mode, which it
            keeps.
        example_inputs: as the host takes them: a tensor, a tuple or list of arguments, or a dict of keyword arguments.
        optimizer: one that trains the model. Parameters that are cut are replaced in it, and their state is cut with
            them. Without it, build a new optimizer after every ``step()``: the old one holds Parameters that the model
            has no more.
        **host_arguments: all others that `cls` takes. ``ignored_layers`` may hold types, and ``unwrapped_parameters``
            may be a dict, as the host's documentation has it.

    Returns:
        An instance of (a subclass of) `cls`.

    Raises:
        InvalidPrunerError: `cls` is no pruner of Torch-Pruning.
        InvalidRatioError: a ratio is not in [0, 1].
        ForeignModuleError: an argument names a module that the model does not have.
        ExampleInputError: the model does not run on the example inputs.
        CompiledModelError: the model is compiled or scripted.
        AlreadyParametrizedError: the weight of a layer is parametrized by someone else.
        OptimizerMismatchError: the optimizer trains nothing of the model.

    Note:
        Frozen Parameters stay frozen; the host makes every Parameter that it cuts trainable.

    >>> import torch_pruning as tp
    >>> from ip_plugin import bake, interspace
    >>> model = interspace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    >>> importance = tp.importance.GroupMagnitudeImportance(p=2)
    >>> cutter = pruner(tp.pruner.BasePruner, model, torch.zeros(1, 3, 8, 8), importance=importance,
    ...                 pruning_ratio=0.5, ignored_layers=[model[2]])
    >>> cutter.step()
    >>> [tuple(layer.weight.shape) for layer in bake(model) if isinstance(layer, nn.Conv2d)]
    [(4, 3, 3, 3), (4, 4, 3, 3)]
    """
    asked: Any = cls
    if isinstance(asked, functools.partial) and not asked.args:
        asked, host_arguments = asked.func, {**asked.keywords, **host_arguments}
    if not (isinstance(asked, type) and issubclass(asked, tp.pruner.BasePruner)):
        raise InvalidPrunerError(cls)
    _check_model(model, optimizer)
    arguments = _arguments(asked, model, host_arguments)
    subclass = _subclass(asked)
    found: Pruner = subclass.__new__(subclass)
    view = PlainView(model, lambda: not _keeps_its_own_gradients(vars(found).get("importance")))
    vars(found).update(_ip_view=view, _ip_optimizer=optimizer)
    try:
        with lent(found, _reads_magnitudes(asked)):
            modes = [(module, module.training) for module in model.modules()]
            try:
                subclass.__init__(found, model, example_inputs, **arguments)
            finally:
                for module, mode in modes:
                    module.training = mode
    except InterspaceError:
        raise
    except Exception as error:
        if arguments.get("forward_fn") is None:  # if the model does not run on the example inputs, say that instead
            try:
                run(model, tuple(example_inputs) if isinstance(example_inputs, list) else example_inputs)
            except ExampleInputError as reason:
                raise reason from error
        raise
    return found


def count_ops_and_params(model: nn.Module, example_inputs: Any, **host_arguments: Any) -> Any:
    """The host's ``tp.utils.count_ops_and_params``, which by itself overlooks layers in the interspace.

    Counts what the baked model has: bases are not in it. With ``layer_wise=True`` every module of the model is a key of
    the host's dicts; those that make a layer's weight have zeros, and the layer has what it costs.

    >>> from ip_plugin import interspace
    >>> model = interspace(nn.Sequential(nn.Conv2d(1, 2, 3, bias=False)))
    >>> count_ops_and_params(model, torch.zeros(1, 1, 5, 5))
    (162.0, 18)
    """
    with plain_layers(model):
        found = tp.utils.count_ops_and_params(model, example_inputs, **host_arguments)
    for by_layer in found[2:]:
        for module in model.modules():
            by_layer.setdefault(module, 0)
    return found


# The host's classes, in either space -----------------------------------------------------------------------------


@contextmanager
def lent(
    found: Any,
    magnitudes: bool = True,
    *,
    modules: Collection[nn.Module] | None = None,
    nodes: Iterable[object] = (),
    again: Collection[Loan] | None = None,
) -> Iterator[None]:
    """A call of the host: the model is lent, and a call that fails has not happened.

    Args:
        found: the pruner.
        magnitudes: whether the call may read them; a call within another one may, if one of the two may.
        modules: the only ones that the call reads or changes; None if it may be any.
        nodes: of the dependency graph, that belong to `modules`.
        again: what was lent to an earlier call; then this one continues it, and changes no module.
    """
    view: PlainView = found._ip_view
    if view.depth:
        if magnitudes:
            view.show()
        yield
        return
    graph = vars(found).get("DG")
    objects: list[object] = [found, vars(found).get("importance"), graph]
    if modules is not None:
        objects += [*modules, *nodes]
    elif again is None:
        objects += view.model.modules()
        objects += () if graph is None else (*graph.module2node, *graph.module2node.values())
    with transaction(objects, found._ip_optimizer), view.lend(modules, again):
        if magnitudes:
            view.show()
        yield


def _wrapped(method: Callable[..., Any], owner: Callable[[Any], Any], magnitudes: bool) -> Callable[..., Any]:
    """A method that runs while the model is lent; a generator that it returns goes on while the model is lent."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        view = self._ip_view
        nested = view.depth > 0
        if nested and (view.shown or not magnitudes):  # most calls, which are many
            return method(self, *args, **kwargs)
        found = owner(self)
        with lent(found, magnitudes):
            result = method(self, *args, **kwargs)
        return _advanced(found, magnitudes, result) if isinstance(result, GeneratorType) and not nested else result

    return call


def _advanced(found: Any, magnitudes: bool, steps: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """The host's generator, with the model lent while it runs."""
    again: list[Loan] | None = None
    while True:
        with lent(found, magnitudes and again is None, again=again):
            try:
                item = next(steps)
            except StopIteration as end:
                return end.value
            if _is_the_hosts(type(found)):  # all that it changes is its own, and it asks for magnitudes by its methods
                again = list(found._ip_view.loans.values())
        yield item


def _public_methods(cls: type) -> dict[str, Callable[..., Any]]:
    methods = {name: inspect.getattr_static(cls, name) for name in dir(cls) if not name.startswith("_")}
    return {name: method for name, method in methods.items() if inspect.isfunction(method)}


@functools.cache
def _subclass(cls: Any) -> Any:
    """A pruner class whose public methods see plain layers."""

    def graph(self: Any) -> Any:
        return vars(self)["DG"]

    def join(self: Any, found: Any) -> None:
        found._ip_pruner, found._ip_view = self, self._ip_view
        found.__class__ = _graph_class(found.__class__)
        vars(self)["DG"] = found

    methods = {name: _wrapped(method, lambda self: self, True) for name, method in _public_methods(cls).items()}
    return type(cls.__name__, (cls,), {**methods, "DG": property(graph, join), "__module__": cls.__module__})


@functools.cache
def _graph_class(cls: Any) -> Any:
    """A dependency graph class whose groups cut what belongs to coefficients, too."""
    methods = {
        name: _wrapped(method, lambda self: self._ip_pruner, False)
        for name, method in _public_methods(cls).items()
        if name != "build_dependency"
    }
    make = methods["get_pruning_group"]

    def get_pruning_group(self: Any, *args: Any, **kwargs: Any) -> Any:
        group = make(self, *args, **kwargs)
        group.__class__ = _group_class(group.__class__)
        return group

    return type(cls.__name__, (cls,), {**methods, "get_pruning_group": get_pruning_group, "__module__": cls.__module__})


@functools.cache
def _group_class(cls: Any) -> Any:
    """A group class whose `prune` is followed into masks and the optimizer."""
    host_prune = cls.prune

    def prune(self: Any, idxs: Any = None, *args: Any, **kwargs: Any) -> None:
        found, graph = self._DG._ip_pruner, self._DG
        if idxs is not None:  # the host makes another group of it, and prunes that
            with lent(found, False):
                host_prune(self, idxs, *args, **kwargs)
            return
        owners = _owners(found._ip_view.model, [dep.target.module for dep, _ in self.items])
        # What a user's own pruning function changes is not known.
        modules = None if graph.CUSTOMIZED_PRUNERS else owners
        arranged = vars(self).get("arranged")
        with lent(found, False, modules=modules, nodes=[dep.target for dep, _ in self.items]):
            cut = functools.partial(host_prune, self, None, *args, **kwargs)
            follow(cut, owners, found._ip_view, found._ip_optimizer, arranged)

    return type(cls.__name__, (cls,), {"prune": functools.wraps(host_prune)(prune), "__module__": cls.__module__})


def _owners(model: nn.Module, involved: Iterable[Any]) -> list[nn.Module]:
    """The modules that hold the Parameters of a group: layers and their children, owners of bare Parameters."""
    bare = {id(each) for each in involved if isinstance(each, nn.Parameter)}
    owners = [module for each in involved if isinstance(each, nn.Module) for module in each.modules()]
    if bare:
        owners += [m for m in model.modules() if any(id(p) in bare for p in m._parameters.values())]
    return list(dict.fromkeys(owners))


def _reads_magnitudes(cls: type) -> bool:
    """Whether the constructor may read magnitudes: a user's own may, the host's do not."""
    return any("__init__" in vars(each) and not _is_the_hosts(each) for each in cls.__mro__[:-1])


def _is_the_hosts(cls: type) -> bool:
    """Whether a class is the host's, without anything of a user's."""
    return all(each.__module__.startswith("torch_pruning.") for each in cls.__mro__[:-1])


def _keeps_its_own_gradients(importance: object) -> bool:
    """Whether an importance has gathered gradients itself: those are in the gauge that the coefficients are in."""
    inner = importance.importance if isinstance(importance, VariedImportance) else importance
    return isinstance(inner, tp.importance.GroupHessianImportance)


# What a user can get wrong -------------------------------------------------------------------------------------


def _check_model(model: nn.Module, optimizer: Optimizer | None) -> None:
    dynamo = sys.modules.get("torch._dynamo")
    for name, module in model.named_modules():
        compiled = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
        if compiled or isinstance(module, torch.jit.ScriptModule) or module._compiled_call_impl is not None:
            raise CompiledModelError(name, type(module).__name__)
        prunable = not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) or TensorRef(module).is_prunable
        if not prunable and parametrize.is_parametrized(module, "weight"):
            raise AlreadyParametrizedError(name, "another package")
    if optimizer is not None:
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in trained for p in model.parameters()):
            raise OptimizerMismatchError("none of the model's parameters is in its parameter groups")


def _arguments(cls: type, model: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """The host's arguments, checked, and with dicts of this pruner's own where the host would share its defaults."""
    arguments = dict(given)
    ignored = arguments.get("ignored_layers")
    if ignored is not None:
        arguments["ignored_layers"] = [
            found
            for each in ignored
            for found in ([m for m in model.modules() if isinstance(m, each)] if isinstance(each, type) else [each])
        ]
    if isinstance(arguments.get("unwrapped_parameters"), Mapping):
        arguments["unwrapped_parameters"] = list(arguments["unwrapped_parameters"].items())
    for name in _RATIOS:
        if arguments.get(name) is not None:
            _check_ratio(name, arguments[name])
    for name in _RATIO_DICTS:
        for ratio in (arguments.get(name) or {}).values():
            _check_ratio(name, ratio)
    known = {id(each) for each in (*model.modules(), *model.parameters())}
    for name in _MODULES:
        for key in arguments.get(name) or ():
            for module in key if isinstance(key, tuple) else (key,):
                if id(module) not in known:
                    raise ForeignModuleError(name, module)
    for name, parameter in _parameters(cls).items():
        if isinstance(parameter.default, dict):
            arguments.setdefault(name, {})
    return arguments


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Named arguments of a class, those included that it hands on to its base as keyword arguments."""
    found: dict[str, inspect.Parameter] = {}
    for each in cls.__mro__:
        if "__init__" in vars(each):
            own = inspect.signature(vars(each)["__init__"]).parameters
            found = {**own, **found}
            if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
                break
    return found


def _check_ratio(name: str, ratio: object) -> None:
    if not is_fraction(ratio):
        raise InvalidRatioError(name, ratio)
