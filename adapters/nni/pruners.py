"""NNI's pruners in either space: the classes of ``nni.compression.pruning``, and what gives the model back.

Change one import, and end with `finish`; the pipeline runs whether `interspace` was called or not::

    from ip_plugin.adapters.nni import L1NormPruner, finish  # was: from nni.compression.pruning import L1NormPruner

    pruner = L1NormPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    finish(pruner)

The pruners are subclasses of the host's and take its arguments; the host's code chooses what to prune. A config list
means what it means on the plain model: ``op_types: ["Conv2d"]`` with target ``weight`` reaches the coefficients of
convolutions in the interspace, and masks are keyed by the plain model's names. Magnitudes are read where every basis
filter has unit norm, masked entries as zeros; scores made of gradients do not depend on that. Bases train along: one
that a traced optimizer does not have joins the group of its coefficients. Write pruners of your own as subclasses of
these.

NNI's helpers that look at layers are here too (``auto_set_denpendency_group_ids``, ``count_flops_params``, the
dependencies of shapes): NNI's own find no convolutions in the interspace. For others there is `plain_layers`.

NNI 3.0 is archived. It needs ``filelock<3.12`` and ``typeguard<4.1.3``, and its Lightning is ``pytorch_lightning``,
not ``lightning.pytorch``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any, TypeAlias

import nni.compression.pruning as host
import torch
from nni.compression import LightningEvaluator as HostLightningEvaluator
from nni.compression.base.compressor import Pruner
from nni.compression.base.config import default_config_schema, select_modules_by_config, trans_legacy_config_list
from nni.compression.base.setting import INPUT_PREFIX, OUTPUT_PREFIX, PruningSetting
from torch import Tensor, nn

from ip_plugin.adapters.nni.wrappers import WRAPPER, plain_name, put_back, remember
from ip_plugin.core import torch_masks
from ip_plugin.core.gauge import unit_gauge
from ip_plugin.core.parametrization import Interspace, parametrizations
from ip_plugin.core.tensor_ref import TensorRef, parametrized_tensors
from ip_plugin.errors import AlreadyWrappedError, NoModuleMatchedError, UnadoptedMaskError

Entries: TypeAlias = Sequence[dict[str, Any]]
Masks: TypeAlias = dict[str, dict[str, Tensor]]


def config_list(model: nn.Module, config_list: Entries) -> Entries:
    """A config list for the host that reaches the coefficients of interspace layers, and the weights of the rest.

    The pruners of this module do this themselves; it is for NNI's own classes, and for looking. Everything that NNI
    accepts is accepted, legacy keys included, and means what it means on the plain model. What comes back names every
    tensor by itself: the coefficients of layer ``conv`` are target ``original`` of ``conv.parametrizations.weight``.

    Args:
        model: in either space; not changed.
        config_list: as for the plain model.

    Returns:
        The list itself for a plain model, else a new one. A list that this function has returned stays as it is.

    Raises:
        NoModuleMatchedError: an entry selects no module.
        UnadoptedMaskError: a module that is selected is pruned by `torch.nn.utils.prune`.
        SchemaError, AssertionError: NNI's own, for keys or module types that it does not know.

    >>> from ip_plugin import interspace
    >>> model = interspace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2)))
    >>> entries = [{"op_types": ["Conv2d", "Linear"], "target_names": ["weight"], "sparse_ratio": 0.5}]
    >>> sorted((entry["op_names"], entry["target_names"]) for entry in config_list(model, entries))
    [(['0.parametrizations.weight'], ['original']), (['2'], ['weight'])]
    """
    plain = not parametrized_tensors(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: list[dict[str, Any]] = []
    for entry, given in zip(trans_legacy_config_list(deepcopy(list(config_list))), config_list, strict=True):
        names, settings = _selected(model, entry, given)
        for name in names:
            _check_masks(name, modules[name])
        if plain:
            continue
        default_config_schema("pruning").validate(entry)
        for name in names:
            found += _reaching(name, modules, settings)
    return config_list if plain else found


class _AsPlain:
    """The modules of a model as NNI finds them on the plain model, by name and by the name of their class."""

    def __init__(self, model: nn.Module, named: Sequence[str]) -> None:
        self.model = model
        self.named = named

    def named_modules(self, remove_duplicate: bool = True) -> Iterator[tuple[str, object]]:
        hidden: list[str] = []
        for name, module in self.model.named_modules(remove_duplicate=remove_duplicate):
            if name not in self.named and any(name == at or name.startswith(at + ".") for at in hidden):
                continue
            prefix = f"{name}.parametrizations" if name else "parametrizations"
            chains = parametrizations(module) if nn.utils.parametrize.is_parametrized(module) else {}
            of_ours = [tensor for tensor in chains if TensorRef(module, tensor).chain is not None]
            alone = len(of_ours) == len(chains) > 0
            hidden += [prefix] if alone else [f"{prefix}.{tensor}" for tensor in of_ours]
            # NNI asks for the name of the class only.
            yield name, object.__new__(plain_class(module)) if alone else module


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has on the plain model."""
    return type(module).__bases__[0] if _has_ours(module) else type(module)


def _has_ours(module: nn.Module) -> bool:
    parametrized = nn.utils.parametrize.is_parametrized(module)
    return parametrized and any(TensorRef(module, tensor).chain is not None for tensor in parametrizations(module))


def _selected(model: nn.Module, entry: dict[str, Any], given: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The names of the modules that an entry selects, and what is left of it without its selectors.

    In NNI's own order (that of a set): what it prunes of a group depends on it.
    """
    view = _AsPlain(model, entry.get("op_names") or ())
    try:
        chosen, settings, _ = select_modules_by_config(view, entry)
    except KeyError as unknown:
        raise NoModuleMatchedError(given, f"no module {unknown.args[0]!r}") from None
    if not chosen and "exclude" not in given:
        raise NoModuleMatchedError(given, "no module of the model")
    return list(chosen), settings


def _check_masks(name: str, module: nn.Module) -> None:
    chains = parametrizations(module).values() if nn.utils.parametrize.is_parametrized(module) else ()
    if any(torch_masks.pruned_names(each) for each in (module, *chains)):
        raise UnadoptedMaskError(name)


def _place(name: str, tensor_name: str, module: nn.Module) -> tuple[str, str]:
    """Where NNI finds a tensor of the plain model; inverse: `plain_name`."""
    if TensorRef(module, tensor_name).chain in (None, module):
        return name, tensor_name
    return f"{name}.parametrizations.{tensor_name}".removeprefix("."), "original"


def _reaching(name: str, modules: dict[str, nn.Module], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries for one module: one for what it has itself, one for each tensor that is under a parametrization of ours.

    Every setting is spelled out, so that what NNI has registered for the classes that it will find does not matter.
    """
    module = modules[name]
    targets: dict[str, dict[str, dict[str, Any]]] = {}
    for tensor_name, setting in PruningSetting.get(plain_class(module).__name__, settings).items():
        given = {key: value for key, value in setting.items() if value is not None}
        if given.get("align") is not None:
            source = given["align"].get("module_name")
            source = name if source is None else source
            at = given["align"]["target_name"]
            source, at = _place(source, at, modules[source]) if source in modules else (source, at)
            given["align"] = {**given["align"], "module_name": source, "target_name": at}
        where, target_name = _place(name, tensor_name, module)
        targets.setdefault(where, {})[target_name] = given
    entries = []
    for where, spelled in targets.items():
        cls = type(modules[where]).__name__
        if cls not in PruningSetting.registry:
            PruningSetting.register(cls, {})
        names = list(spelled)
        for prefix in (INPUT_PREFIX, OUTPUT_PREFIX):  # NNI looks these up even if it does not need them
            first = next((spelled[each] for each in names if each.startswith(prefix)), None)
            if first is not None:
                spelled.setdefault(prefix, first)
        entries.append({"op_names": [where], "target_names": names, "target_settings": spelled})
    return entries


_translated = config_list  # where an argument has the name of the function


class _InEitherSpace(Pruner):  # type: ignore[misc]
    """What every pruner of this module adds to the host's: Parameters that return, and masks by the plain names."""

    def wrap_model(self) -> None:
        for wrapper in self._module_wrappers.values():
            remember(wrapper)
        super().wrap_model()

    def unwrap_model(self) -> None:
        """Take NNI's wrappers off; the model's own Parameters return with the trained values, and without masks."""
        super().unwrap_model()
        for wrapper in self._module_wrappers.values():
            put_back(wrapper, self.bound_model)

    def get_masks(self) -> Masks:
        """All masks: {name of the module on the plain model: {tensor name: float tensor of ones and zeros}}."""
        found: Masks = defaultdict(dict)
        for module_name, masks in super().get_masks().items():
            for tensor_name, mask in masks.items():
                module = self._module_wrappers[module_name].module
                layer, name = plain_name(module_name, tensor_name, module)
                found[layer][name] = mask
        return found

    def update_masks(self, masks: Masks) -> None:
        """Set masks; `masks` are keyed as those of `get_masks`."""
        places = {
            plain_name(name, target, wrapper.module): (name, target)
            for name, wrapper in self._module_wrappers.items()
            for target in wrapper.pruning_target_spaces
        }
        found: Masks = defaultdict(dict)
        for layer, given in masks.items():
            for name, mask in given.items():
                module_name, tensor_name = places.get((layer, name), (layer, name))
                found[module_name][tensor_name] = mask
        super().update_masks(found)

    def _let_bases_train(self) -> None:
        """Name every trainable basis to the evaluator, which builds its optimizers by names."""
        names = {id(parameter): name for name, parameter in self.bound_model.named_parameters()}
        groups = [
            group["params"]
            for helper in getattr(self.evaluator, "_optimizer_helpers", ())
            for group in (helper.kwargs["params"] if "params" in helper.kwargs else helper.args[0])
        ]
        for each in parametrized_tensors(self.bound_model):
            space = each.parametrization
            if not isinstance(space, Interspace) or not space.basis.requires_grad:
                continue
            basis, (chain, original) = names[id(space.basis)], _place(each.module_name, each.tensor_name, each.module)
            if not any(basis in group for group in groups):
                for group in groups:
                    if f"{chain}.{original}" in group:
                        group.append(basis)
                        break


class _Configured(_InEitherSpace):
    """A pruner that takes a model and a config list."""

    def __init__(self, model: nn.Module, config_list: Entries, *args: Any, **kwargs: Any) -> None:
        wrapped = [name for name, module in model.named_modules() if WRAPPER in module._modules]
        if wrapped:
            raise AlreadyWrappedError(wrapped)
        entries = _translated(model, config_list)
        try:
            super().__init__(model, entries, *args, **kwargs)
        except BaseException:
            for module in list(model.modules()):
                if WRAPPER in module._modules:
                    wrapper: Any = module._modules[WRAPPER]
                    wrapper.unwrap()
                    put_back(wrapper, model)
            raise
        self._let_bases_train()

    @classmethod
    def from_compressor(cls, compressor: Any, *args: Any, **kwargs: Any) -> Any:
        """Continue with the wrappers of another compressor; see the host's method."""
        wrapped = vars(compressor).get("_is_wrapped")
        try:
            return super().from_compressor(compressor, *args, **kwargs)
        except BaseException:
            if wrapped and not compressor._is_wrapped:
                compressor.wrap_model()
            raise


class _ByMagnitude(_Configured):
    """A pruner that ranks by the values themselves."""

    def _collect_data(self) -> Masks:
        data: Masks = super()._collect_data()
        return {
            name: {target: self._magnitudes(name, values) for target, values in tensors.items()}
            for name, tensors in data.items()
        }

    def _magnitudes(self, module_name: str, values: Tensor) -> Tensor:
        parametrization = TensorRef(self._module_wrappers[module_name].module, "original").parametrization
        if parametrization is None:
            return values
        if parametrization.mask is not None:
            # Masked entries before zeros, so that they are the first to be chosen again.
            values = torch.where(values == 0, torch.finfo(values.dtype).tiny, values) * parametrization.mask
        return unit_gauge(values, parametrization)


class LevelPruner(_ByMagnitude, host.LevelPruner):  # type: ignore[misc]
    """Prunes the entries of smallest magnitude; see the host's class.

    >>> pruner = LevelPruner(nn.Sequential(nn.Linear(4, 4)), [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    >>> _, masks = pruner.compress()
    >>> int(masks["0"]["weight"].sum())
    8
    """


class L1NormPruner(_ByMagnitude, host.L1NormPruner):  # type: ignore[misc]
    """Prunes the output channels of smallest L1 norm; see the host's class."""


class L2NormPruner(_ByMagnitude, host.L2NormPruner):  # type: ignore[misc]
    """Prunes the output channels of smallest L2 norm; see the host's class."""


class FPGMPruner(_ByMagnitude, host.FPGMPruner):  # type: ignore[misc]
    """Prunes the output channels nearest to the geometric median; see the host's class."""


class SlimPruner(_Configured, host.SlimPruner):  # type: ignore[misc]
    """Prunes the output channels whose trained factor is smallest; see the host's class."""


class TaylorPruner(_Configured, host.TaylorPruner):  # type: ignore[misc]
    """Prunes by squares of gradient times value; see the host's class."""


class MovementPruner(_Configured, host.MovementPruner):  # type: ignore[misc]
    """Prunes what training moves towards zero; see the host's class."""


class _Scheduled(_InEitherSpace):
    """A pruner that takes another pruner."""

    def __init__(self, pruner: Any, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(pruner, *args, **kwargs)
        except BaseException:
            # The host takes the wrappers off before it looks at its other arguments.
            if vars(self).get("_is_wrapped"):
                self.unwrap_model()
            if vars(pruner).get("_is_wrapped") is False:
                pruner.wrap_model()
            raise
        self._let_bases_train()


class LinearPruner(_Scheduled, host.LinearPruner):  # type: ignore[misc]
    """Lets another pruner of this module prune more and more, linearly in time; see the host's class."""


class AGPPruner(_Scheduled, host.AGPPruner):  # type: ignore[misc]
    """Lets another pruner of this module prune more and more, cubically in time; see the host's class."""


class LightningEvaluator(HostLightningEvaluator):  # type: ignore[misc]
    """The host's evaluator, where training may be counted in steps on ``pytorch_lightning`` 2 too (the host's fails).

    It takes a traced ``pytorch_lightning.Trainer`` and ``LightningDataModule``.
    """

    def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        """Train the bound model; the duration asked for goes into a new trainer's arguments."""
        arguments = self.trainer.trace_kwargs
        if max_steps:
            self.trainer.trace_kwargs = {**arguments, "max_steps": max_steps}
        try:
            super().train(None, max_epochs)
        finally:
            self.trainer.trace_kwargs = arguments
