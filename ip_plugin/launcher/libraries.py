"""The pruning libraries while the interspace is switched on: each is replaced by its adapter, under its own names."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune as host

from .patches import Patches
from .session import Session


def patch(session: Session, patches: Patches) -> None:
    """Replace what is imported already, and what will be as soon as it is."""
    _torch_prune(session, patches)
    for name, change in (
        ("torch_pruning", _torch_pruning),
        ("nni.compression.pruning", _nni),
        ("lightning.pytorch", _lightning),
    ):
        patches.when_imported(name, functools.partial(change, session, patches))


class PruningHistory(host.PruningContainer):
    """What scripts look for in ``module._forward_pre_hooks``: the methods that have pruned a tensor."""

    def __call__(self, module: nn.Module, inputs: object) -> None:
        """Do nothing: the mask is in the layer's parametrization."""

    @classmethod
    def record(cls, layer: nn.Module, name: str, method: host.BasePruningMethod) -> None:
        """Add a method to the history of a layer's tensor."""
        if isinstance(layer, nn.utils.parametrize.ParametrizationList):
            return
        hooks = layer._forward_pre_hooks.values()
        history = next((hook for hook in hooks if isinstance(hook, cls) and hook._tensor_name == name), None)
        if history is None:
            history = cls()
            history._tensor_name = name
            layer.register_forward_pre_hook(history)
        entry = copy.copy(list(method)[-1] if isinstance(method, host.PruningContainer) else method)
        entry._tensor_name = name
        history.add_pruning_method(entry)

    @classmethod
    def forget(cls, layer: nn.Module, name: str | None = None) -> None:
        """Remove the history of a tensor, or of all tensors of a layer."""
        for key in cls.of(layer):
            if name in (None, layer._forward_pre_hooks[key]._tensor_name):  # type: ignore[attr-defined]
                del layer._forward_pre_hooks[key]

    @classmethod
    def of(cls, layer: nn.Module) -> list[int]:
        """Keys of the histories among the hooks of a layer."""
        return [key for key, hook in layer._forward_pre_hooks.items() if isinstance(hook, cls)]


def _torch_prune(session: Session, patches: Patches) -> None:
    """`torch.nn.utils.prune`: a module with the host's names, in which those of the adapter stand."""
    from ..adapters import torch_prune as adapter
    from ..adapters.torch_prune import pruning

    method = pruning.BasePruningMethod
    apply, prune_globally, take_off = vars(method)["apply"], pruning.global_unstructured, pruning.remove

    def apply_and_note(cls: Any, module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
        session.convert_modules([module])
        result = apply.__func__(cls, module, name, *args, **kwargs)
        PruningHistory.record(module, name, result)
        session.note_pruning(_described(cls.__name__, args, kwargs), [module])
        return result

    @functools.wraps(prune_globally)
    def global_unstructured(parameters: Iterable[Any], pruning_method: Any, *args: Any, **kwargs: Any) -> None:
        pairs = list(parameters)
        modules = [module for module, _ in pairs]
        session.convert_modules(modules)
        prune_globally(pairs, pruning_method, *args, **kwargs)
        for module, (_, name) in zip(modules, pairs, strict=True):
            PruningHistory.record(module, name, host.CustomFromMask(None))
        session.note_pruning(_described(pruning_method.__name__, (), kwargs), modules)

    @functools.wraps(take_off)
    def remove(module: nn.Module, name: str) -> nn.Module:
        take_off(module, name)
        PruningHistory.forget(module, name)
        return module

    patches.set(method, "apply", classmethod(apply_and_note))
    for owner in (pruning, adapter):
        patches.set(owner, "global_unstructured", global_unstructured)
        patches.set(owner, "remove", remove)
    module = ModuleType(host.__name__, host.__doc__)
    ours = {name: getattr(adapter, name) for name in adapter.__all__}
    module.__dict__.update({**vars(host), **ours})
    patches.set(torch.nn.utils, "prune", module)
    sys.modules[host.__name__] = module
    patches.defer(lambda: sys.modules.__setitem__(host.__name__, host))
    exchanged: dict[Any, object] = {getattr(host, name): ours[name] for name in ours}
    patches.replace({**exchanged, host: module}, skip=("torch", "lightning", "pytorch_lightning"))


def _described(name: str, args: Iterable[object], kwargs: dict[str, object]) -> str:
    """A call for the printed line: ``L1Unstructured(0.5)``; tensors are left out."""
    texts = [repr(value) for value in args if isinstance(value, (int, float, str))]
    texts += [f"{key}={value!r}" for key, value in kwargs.items() if isinstance(value, (int, float, str))]
    return f"{name}({', '.join(texts)})"


def _torch_pruning(session: Session, patches: Patches, library: ModuleType) -> None:
    """Every pruner class becomes a subclass of itself whose instances the adapter makes."""
    from torch_pruning.pruner import BasePruner

    from ..adapters.torch_pruning import wrapping

    class Switching(type):
        """Makes instances by the adapter, for these classes and for those that users derive from them."""

        def __call__(cls: Any, model: nn.Module, example_inputs: Any, *args: Any, **kwargs: Any) -> Any:
            session.convert(model)
            names = [
                name for name in wrapping.constructor_parameters(cls) if name not in ("self", "model", "example_inputs")
            ]
            return wrapping.pruner(cls, model, example_inputs, **dict(zip(names, args, strict=False)), **kwargs)

        def __instancecheck__(cls, instance: object) -> bool:
            return issubclass(type(instance), cls)

        def __subclasscheck__(cls, other: type) -> bool:
            host_class = vars(cls).get("host_class", cls)
            return type.__subclasscheck__(host_class, other)

    def switched(host_class: Any) -> type:
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = host_class.step(self, *args, **kwargs)
            session.note_pruning(f"{host_class.__name__}.step", [self.model])
            return result

        names = {"host_class": host_class, "step": step, "__module__": host_class.__module__}
        return Switching(host_class.__name__, (host_class,), {**names, "__doc__": host_class.__doc__})

    names: Any = vars(library.pruner).values()
    classes = {value for value in names if isinstance(value, type) and issubclass(value, BasePruner)}
    patches.replace({each: switched(each) for each in classes})
    counted = wrapping.count_ops_and_params
    patches.replace({library.utils.count_ops_and_params: counted})
    patches.set(library.utils.op_counter, "count_ops_and_params", counted)


def _nni(session: Session, patches: Patches, library: ModuleType) -> None:
    """NNI's pruners and helpers; a script's own ``unwrap_model()`` hands the masks over."""
    from ..adapters import nni as adapter

    def switched(cls: Any) -> type:
        def build(self: Any, first: Any, *args: Any, **kwargs: Any) -> None:
            if isinstance(first, nn.Module):
                session.convert(first)
            cls.__init__(self, first, *args, **kwargs)

        def unwrap_model(self: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith(("nni.", "ip_plugin.")):
                return cls.unwrap_model(self)
            model = adapter.finish(self)
            session.note_pruning(cls.__name__, [model])
            return model

        names = {"__init__": build, "unwrap_model": unwrap_model}
        return type(cls.__name__, (cls,), {**names, "__module__": cls.__module__, "__doc__": cls.__doc__})

    class ModelSpeedup:
        """The host's class of this name, by `ip_plugin.adapters.nni.speedup`."""

        def __init__(self, model: nn.Module, dummy_input: Any, masks_or_file: Any, *_: Any, **__: Any) -> None:
            masks = torch.load(masks_or_file) if isinstance(masks_or_file, str) else masks_or_file
            self.model, self.input, self.masks = model, dummy_input, masks

        def speedup_model(self) -> nn.Module:
            """Remove the channels that the masks have left empty."""
            model = adapter.speedup(self.model, self.masks, self.input)
            session.note_pruning("ModelSpeedup", [model])
            return model

    import nni.compression
    import nni.compression.speedup
    import nni.compression.utils

    exchanged: dict[Any, object] = {nni.compression.speedup.ModelSpeedup: ModelSpeedup}
    for name in adapter.__all__:
        ours = getattr(adapter, name)
        for module in (library, nni.compression, nni.compression.utils):
            theirs = vars(module).get(name)
            if theirs is not None and theirs is not ours:
                exchanged[theirs] = switched(ours) if name.endswith("Pruner") else ours
    patches.replace(exchanged)


def _lightning(session: Session, patches: Patches, library: ModuleType) -> None:
    """Lightning's callback; it may convert late, when it prunes first."""
    from ..adapters import lightning as adapter

    replaced = library.callbacks.ModelPruning

    class ModelPruning(adapter.ModelPruning):
        """The adapter's callback, which tells the session."""

        def apply_pruning(self, amount: float) -> None:
            """Prune, in the interspace."""
            modules = [module for module, _ in self._parameters_to_prune or ()]
            session.convert_modules(modules)
            super().apply_pruning(amount)
            session.note_pruning(f"ModelPruning({amount})", modules)

    ModelPruning.__doc__, ModelPruning.__module__ = replaced.__doc__, replaced.__module__
    patches.replace({replaced: ModelPruning})
