"""Torch-Pruning in either space: `pruner` makes a pruner of that library (the host) that prunes coefficients.

::

    from ip_plugin.adapters.torch_pruning import pruner

    channel_pruner = pruner(tp.pruner.GroupNormPruner, model, example_inputs, importance=..., pruning_ratio=0.5)
    channel_pruner.step()

The object is an instance of the host's class and has all of its methods. During each of them, and while one of its
groups is pruned, every layer looks like an ordinary module whose ``weight`` holds the masked coefficients, at unit norm
of the basis filters, with the gradients that belong to them. Channels are removed from coefficients, masks and the
optimizer's state; bases stay whole and shared. A call that fails leaves model, pruner and optimizer as they were.

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
from torch_pruning.pruner import BasePruner
from torch_pruning.utils import count_ops_and_params as host_count

from ip_plugin.core.tensor_ref import TensorRef, parametrized_by_another
from ip_plugin.errors import BatchError, ConversionError, HostError, InterspaceError, SelectionError
from ip_plugin.utils.example_input import run
from ip_plugin.utils.preserved_state import preserved_state
from ip_plugin.utils.validation import check_fraction

from ..shared.plain_view import ExposedTensor, PlainView, plain_layers
from ..shared.transaction import check_trained, transaction
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
        model: in the interspace, plain, or with layers of both kinds; in training or evaluation mode, which it keeps.
        example_inputs: a tensor, a tuple or list of arguments, or a dict of keyword arguments.
        optimizer: one that trains the model. Pruned Parameters are replaced in it, and their state is pruned with them.
            Without it, build a new one after every ``step()``: the old one holds Parameters that were replaced.
        **host_arguments: all others that `cls` takes. ``ignored_layers`` may hold types, and ``unwrapped_parameters``
            may be a dict, as Torch-Pruning's documentation has it.

    Returns:
        An instance of (a subclass of) `cls`.

    Raises:
        HostError: `cls` is no pruner of Torch-Pruning.
        AmountError: a ratio is not in [0, 1].
        SelectionError: an argument names a module that the model does not have.
        BatchError: the model does not run on the example inputs.
        ConversionError: the model is compiled or scripted, or the weight of a layer is parametrized by someone else.
        OptimizerError: the optimizer trains nothing of the model.

    Note:
        Frozen Parameters stay frozen; Torch-Pruning itself makes every Parameter that it prunes trainable.

    >>> import torch_pruning as tp
    >>> from ip_plugin import bake, interspace
    >>> model = interspace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    >>> importance = tp.importance.GroupMagnitudeImportance(p=2)
    >>> channel_pruner = pruner(tp.pruner.BasePruner, model, torch.zeros(1, 3, 8, 8), importance=importance,
    ...                         pruning_ratio=0.5, ignored_layers=[model[2]])
    >>> channel_pruner.step()
    >>> [tuple(layer.weight.shape) for layer in bake(model) if isinstance(layer, nn.Conv2d)]
    [(4, 3, 3, 3), (4, 4, 3, 3)]
    """
    host_class: Any = cls
    if isinstance(host_class, functools.partial) and not host_class.args:
        host_class, host_arguments = host_class.func, {**host_class.keywords, **host_arguments}
    if not (isinstance(host_class, type) and issubclass(host_class, BasePruner)):
        raise HostError(
            "A pruner class of torch_pruning (or a subclass, or a partial of one with named arguments) must be given.",
            f"{cls!r}",
            "pass for example tp.pruner.BasePruner, and its arguments by name",
        )
    _check_model(model)
    check_trained(optimizer, model.parameters())
    arguments = _arguments(host_class, model, host_arguments)
    subclass = _pruner_class(host_class)
    made: Pruner = subclass.__new__(subclass)
    view = PlainView(model, lambda: not _gathers_gradients(vars(made).get("importance")))
    vars(made).update(_ip_view=view, _ip_optimizer=optimizer)
    try:
        with preserved_state(model), exposed(made, _reads_magnitudes(host_class)):
            subclass.__init__(made, model, example_inputs, **arguments)
    except InterspaceError:
        raise
    except Exception as error:
        if arguments.get("forward_fn") is None:  # if the model does not run on the example inputs, say that instead
            try:
                run(model, tuple(example_inputs) if isinstance(example_inputs, list) else example_inputs)
            except BatchError as reason:
                raise reason from error
        raise
    return made


def count_ops_and_params(model: nn.Module, example_inputs: Any, **host_arguments: Any) -> Any:
    """``tp.utils.count_ops_and_params`` in either space; the original overlooks layers in the interspace.

    Counts operations and parameters of the baked model, without bases. With ``layer_wise=True`` every module of the
    model is a key of the dicts; the modules that compose a layer's weight have zeros.

    >>> from ip_plugin import interspace
    >>> model = interspace(nn.Sequential(nn.Conv2d(1, 2, 3, bias=False)))
    >>> count_ops_and_params(model, torch.zeros(1, 1, 5, 5))
    (162.0, 18)
    """
    with plain_layers(model):
        counts = host_count(model, example_inputs, **host_arguments)
    for by_layer in counts[2:]:
        for module in model.modules():
            by_layer.setdefault(module, 0)
    return counts


# The host's classes, in either space -----------------------------------------------------------------------------


@contextmanager
def exposed(
    pruner: Any,
    magnitudes: bool = True,
    *,
    modules: Collection[nn.Module] | None = None,
    nodes: Iterable[object] = (),
    previous: Collection[ExposedTensor] | None = None,
) -> Iterator[None]:
    """Expose the model as plain layers during a call of the host; if the call fails, everything is undone.

    Args:
        pruner: made by the function `pruner`.
        magnitudes: whether the call may read them. A nested call may, if it or the outer call may.
        modules, nodes: the only modules that the call reads or changes, with their nodes in the graph; None: any.
        previous: what an earlier call exposed; then this one continues it, and changes no module.
    """
    view: PlainView = pruner._ip_view
    if view.depth:
        if magnitudes:
            view.show()
        yield
        return
    graph = vars(pruner).get("DG")
    objects: list[object] = [pruner, vars(pruner).get("importance"), graph]
    if modules is not None:
        objects += [*modules, *nodes]
    elif previous is None:
        objects += view.model.modules()
        objects += () if graph is None else (*graph.module2node, *graph.module2node.values())
    with transaction(objects, pruner._ip_optimizer), view.expose(modules, previous):
        if magnitudes:
            view.show()
        yield


def _wrapped(method: Callable[..., Any], pruner_of: Callable[[Any], Any], magnitudes: bool) -> Callable[..., Any]:
    """A method during which the model is exposed, and during the steps of a generator that it returns."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        nested = self._ip_view.depth > 0
        if nested and (self._ip_view.shown or not magnitudes):  # most calls, and there are many
            return method(self, *args, **kwargs)
        pruner = pruner_of(self)
        with exposed(pruner, magnitudes):
            result = method(self, *args, **kwargs)
        exposes = isinstance(result, GeneratorType) and not nested
        return _wrapped_steps(pruner, magnitudes, result) if exposes else result

    return call


def _wrapped_steps(pruner: Any, magnitudes: bool, steps: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """The host's generator, during whose steps the model is exposed."""
    previous: list[ExposedTensor] | None = None
    while True:
        with exposed(pruner, magnitudes and previous is None, previous=previous):
            try:
                item = next(steps)
            except StopIteration as end:
                return end.value
            if _is_the_hosts(type(pruner)):  # all that it changes is its own, and it asks for magnitudes by its methods
                previous = list(pruner._ip_view.tensors.values())
        yield item


def _public_methods(cls: type) -> dict[str, Callable[..., Any]]:
    methods = {name: inspect.getattr_static(cls, name) for name in dir(cls) if not name.startswith("_")}
    return {name: method for name, method in methods.items() if inspect.isfunction(method)}


@functools.cache
def _pruner_class(cls: Any) -> Any:
    """A subclass of a pruner class whose public methods see plain layers."""

    def get_graph(self: Any) -> Any:
        return vars(self)["DG"]

    def set_graph(self: Any, graph: Any) -> None:
        graph._ip_pruner, graph._ip_view = self, self._ip_view
        graph.__class__ = _graph_class(graph.__class__)
        vars(self)["DG"] = graph

    methods = {name: _wrapped(method, lambda self: self, True) for name, method in _public_methods(cls).items()}
    return type(cls.__name__, (cls,), {**methods, "DG": property(get_graph, set_graph), "__module__": cls.__module__})


@functools.cache
def _graph_class(cls: Any) -> Any:
    """A subclass of a dependency graph class, with groups of `_group_class`."""
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
    """A subclass of a group class whose `prune` also prunes masks and the optimizer's state."""
    host_prune = cls.prune

    def prune(self: Any, idxs: Any = None, *args: Any, **kwargs: Any) -> None:
        pruner, graph = self._DG._ip_pruner, self._DG
        if idxs is not None:  # the host makes a group of these channels, and prunes that
            with exposed(pruner, False):
                host_prune(self, idxs, *args, **kwargs)
            return
        owners = _owners(pruner._ip_view.model, [dep.target.module for dep, _ in self.items])
        # What a user's own pruning function changes is not known.
        modules = None if graph.CUSTOMIZED_PRUNERS else owners
        order = vars(self).get("entry_order")
        with exposed(pruner, False, modules=modules, nodes=[dep.target for dep, _ in self.items]):
            remove = functools.partial(host_prune, self, None, *args, **kwargs)
            follow(remove, owners, pruner._ip_view, pruner._ip_optimizer, order)

    return type(cls.__name__, (cls,), {"prune": functools.wraps(host_prune)(prune), "__module__": cls.__module__})


def _owners(model: nn.Module, targets: Iterable[Any]) -> list[nn.Module]:
    """The modules that hold the Parameters of a group: layers and their children, owners of bare Parameters."""
    bare = {id(target) for target in targets if isinstance(target, nn.Parameter)}
    owners = [module for target in targets if isinstance(target, nn.Module) for module in target.modules()]
    if bare:
        owners += [m for m in model.modules() if any(id(p) in bare for p in m._parameters.values())]
    return list(dict.fromkeys(owners))


def _reads_magnitudes(cls: type) -> bool:
    """Whether the constructor may read magnitudes: a user's own may, the host's do not."""
    return any("__init__" in vars(base) and not _is_the_hosts(base) for base in cls.__mro__[:-1])


def _is_the_hosts(cls: type) -> bool:
    """Whether a class and all of its bases are the host's."""
    return all(base.__module__.startswith("torch_pruning.") for base in cls.__mro__[:-1])


def _gathers_gradients(importance: object) -> bool:
    """Whether an importance gathers gradients itself: they belong to the coefficients without the filter scale."""
    inner = importance.importance if isinstance(importance, VariedImportance) else importance
    return isinstance(inner, tp.importance.GroupHessianImportance)


# What a user can get wrong -------------------------------------------------------------------------------------


def _check_model(model: nn.Module) -> None:
    dynamo = sys.modules.get("torch._dynamo")
    for name, module in model.named_modules():
        compiled = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
        if compiled or isinstance(module, torch.jit.ScriptModule) or module._compiled_call_impl is not None:
            raise ConversionError(
                "A model whose channels are removed must not be compiled: the graph holds the parameters as they were.",
                f"module {name!r} is compiled, a {type(module).__name__}",
                "prune first and compile then, or pass the model that was compiled (`compiled._orig_mod`)",
            )
        prunable = not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) or TensorRef(module).is_prunable
        if not prunable and parametrize.is_parametrized(module, "weight"):
            raise parametrized_by_another(name, "another package")


def _arguments(cls: type, model: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """The host's arguments, checked, and with new dicts where all pruners of the host would share a default."""
    arguments = dict(given)
    if arguments.get("ignored_layers") is not None:
        ignored = list(arguments["ignored_layers"])
        types = tuple(layer for layer in ignored if isinstance(layer, type))
        arguments["ignored_layers"] = [layer for layer in ignored if layer not in types]
        arguments["ignored_layers"] += [module for module in model.modules() if isinstance(module, types)]
    if isinstance(arguments.get("unwrapped_parameters"), Mapping):
        arguments["unwrapped_parameters"] = list(arguments["unwrapped_parameters"].items())
    for name in _RATIOS:
        if arguments.get(name) is not None:
            check_fraction(arguments[name], name)
    for name in _RATIO_DICTS:
        for ratio in (arguments.get(name) or {}).values():
            check_fraction(ratio, name)
    known = {id(member) for member in (*model.modules(), *model.parameters())}
    for name in _MODULES:
        for key in arguments.get(name) or ():
            for module in key if isinstance(key, tuple) else (key,):
                if id(module) not in known:
                    raise SelectionError(
                        f"Everything in `{name}` must be a module of the model.",
                        f"{module!r}, which is not in `model.modules()`",
                        "take modules from the model that is passed, after every copy of it has been made",
                    )
    for name, parameter in constructor_parameters(cls).items():
        if isinstance(parameter.default, dict):
            arguments.setdefault(name, {})
    return arguments


def constructor_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Parameters of a constructor, and of those of its bases to which it passes keyword arguments."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            own = inspect.signature(vars(base)["__init__"]).parameters
            parameters = {**own, **parameters}
            if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
                break
    return parameters
