"""NNI's pruners in either space: the classes of ``nni.compression.pruning``, with a way to get the model back.

Change one import, and end with `finish`; the pipeline runs whether `interspace` was called or not::

    from ip_plugin.adapters.nni import L1NormPruner, finish  # was: from nni.compression.pruning import L1NormPruner

    pruner = L1NormPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    finish(pruner)

The pruners are subclasses of NNI's (the host's) and take their arguments; NNI's code chooses what to prune. A config
list means what it means on the plain model: ``op_types: ["Conv2d"]`` with target ``weight`` selects the coefficients of
convolutions in the interspace, and masks are keyed by the plain model's names. Magnitudes are those of coefficients for
basis filters of unit norm, with zeros where they are masked; scores computed from gradients do not depend on the filter
scale. Bases that a traced optimizer does not have join the groups of their coefficients. Derive your own from these.

NNI's helpers that inspect layers are here too (``auto_set_denpendency_group_ids``, ``count_flops_params``, the
dependencies of shapes): NNI's own find no convolutions in the interspace. For others there is `plain_layers`.

NNI 3.0 is archived. It needs ``filelock<3.12``, ``typeguard<4.1.3`` and the package ``pytorch_lightning``.
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
from torch.nn.utils import parametrize

from ip_plugin.adapters.nni.wrappers import WRAPPER, check_unwrapped, plain_name, put_back, remember
from ip_plugin.core import torch_masks
from ip_plugin.core.gauge import unit_gauge
from ip_plugin.core.parametrization import parametrizations
from ip_plugin.core.tensor_ref import TensorRef, parametrized_tensors
from ip_plugin.errors import HostError, SelectionError

Entries: TypeAlias = Sequence[dict[str, Any]]
Masks: TypeAlias = dict[str, dict[str, Tensor]]


def config_list(model: nn.Module, config_list: Entries) -> Entries:
    """Translate a config list, so that it selects the coefficients of interspace layers, and the weights of the rest.

    The pruners of this module do this themselves; it is for NNI's own classes, and for inspection. Everything that NNI
    accepts is accepted, legacy keys included, and means what it means on the plain model. Returned entries name their
    tensors: the coefficients of layer ``conv`` are target ``original`` of ``conv.parametrizations.weight``.

    Args:
        model: in either space; not changed.
        config_list: as for the plain model.

    Returns:
        The list itself for a plain model, else a new one. A translated list is returned unchanged.

    Raises:
        SelectionError: an entry selects no module.
        HostError: a module that is selected is pruned by `torch.nn.utils.prune`.
        SchemaError, AssertionError: NNI's own, for keys or module types that it does not know.

    >>> from ip_plugin import interspace
    >>> model = interspace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2)))
    >>> entries = [{"op_types": ["Conv2d", "Linear"], "target_names": ["weight"], "sparse_ratio": 0.5}]
    >>> sorted((entry["op_names"], entry["target_names"]) for entry in config_list(model, entries))
    [(['0.parametrizations.weight'], ['original']), (['2'], ['weight'])]
    """
    plain = not parametrized_tensors(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    entries: list[dict[str, Any]] = []
    for entry, given in zip(trans_legacy_config_list(deepcopy(list(config_list))), config_list, strict=True):
        names, settings = _selected(model, entry, given)
        for name in names:
            _check_masks(name, modules[name])
        if plain:
            continue
        default_config_schema("pruning").validate(entry)
        for name in names:
            entries += _entries_for(name, modules, settings)
    return config_list if plain else entries


class _AsPlain:
    """The modules of the plain model by name, with their classes, for NNI's selection."""

    def __init__(self, model: nn.Module, named: Sequence[str]) -> None:
        self.model = model
        self.named = named

    def named_modules(self, remove_duplicate: bool = True) -> Iterator[tuple[str, object]]:
        hidden: list[str] = []
        for name, module in self.model.named_modules(remove_duplicate=remove_duplicate):
            if name not in self.named and any(name == at or name.startswith(at + ".") for at in hidden):
                continue
            prefix = f"{name}.parametrizations".removeprefix(".")
            ours = _of_ours(module)
            alone = bool(ours) and len(ours) == len(parametrizations(module))
            hidden += [prefix] if alone else [f"{prefix}.{tensor}" for tensor in ours]
            # NNI asks for the name of the class only.
            yield name, object.__new__(plain_class(module)) if alone else module


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has on the plain model."""
    return type(module).__bases__[0] if _of_ours(module) else type(module)


def _of_ours(module: nn.Module) -> list[str]:
    """The tensors of a module that are under a parametrization of this package."""
    tensors = parametrizations(module) if parametrize.is_parametrized(module) else ()
    return [tensor for tensor in tensors if TensorRef(module, tensor).chain is not None]


def _selected(model: nn.Module, entry: dict[str, Any], given: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The names of the modules that an entry selects, and the entry without its selectors.

    Names are in NNI's own order (that of a set), on which its choice within a group depends.
    """
    view = _AsPlain(model, entry.get("op_names") or ())
    missing = "of the model"
    try:
        chosen, settings, _ = select_modules_by_config(view, entry)
        if chosen or "exclude" in given:
            return list(chosen), settings
    except KeyError as unknown:
        missing = repr(unknown.args[0])
    raise SelectionError(
        "Every entry of the config list must select a module of the model.",
        f"no module {missing} for {given!r}",
        "use names and class names of the plain model's `named_modules()`, or remove the entry",
    )


def _check_masks(name: str, module: nn.Module) -> None:
    chains = parametrizations(module).values() if parametrize.is_parametrized(module) else ()
    if any(torch_masks.pruned_names(holder) for holder in (module, *chains)):
        raise HostError(
            "Masks of torch.nn.utils.prune must be taken over before NNI prunes, or NNI does not train what they mask.",
            f"module {name!r}: pruned by torch.nn.utils.prune",
            "call ip_plugin.adopt_masks(model) first (for biases: torch.nn.utils.prune.remove)",
        )


def _host_name(name: str, tensor_name: str, module: nn.Module) -> tuple[str, str]:
    """The name by which NNI finds a tensor of the plain model; inverse: `plain_name`."""
    if TensorRef(module, tensor_name).chain in (None, module):
        return name, tensor_name
    return f"{name}.parametrizations.{tensor_name}".removeprefix("."), "original"


def _entries_for(name: str, modules: dict[str, nn.Module], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries for one module: one for its own tensors, and one for each tensor under a parametrization of ours.

    Every setting is spelled out, because NNI's defaults are registered for the classes of plain modules.
    """
    module = modules[name]
    targets: dict[str, dict[str, dict[str, Any]]] = {}
    for tensor_name, setting in PruningSetting.get(plain_class(module).__name__, settings).items():
        given = {key: value for key, value in setting.items() if value is not None}
        align = given.get("align")
        if align is not None:
            source, at = align.get("module_name"), align["target_name"]
            source = name if source is None else source
            source, at = _host_name(source, at, modules[source]) if source in modules else (source, at)
            given["align"] = {**align, "module_name": source, "target_name": at}
        where, target_name = _host_name(name, tensor_name, module)
        targets.setdefault(where, {})[target_name] = given
    entries = []
    for where, spelled in targets.items():
        cls = type(modules[where]).__name__
        if cls not in PruningSetting.registry:
            PruningSetting.register(cls, {})
        names = list(spelled)
        for prefix in (INPUT_PREFIX, OUTPUT_PREFIX):  # NNI looks these up even if it does not need them
            first = next((spelled[target] for target in names if target.startswith(prefix)), None)
            if first is not None:
                spelled.setdefault(prefix, first)
        entries.append({"op_names": [where], "target_names": names, "target_settings": spelled})
    return entries


_translated = config_list  # where an argument has the name of the function


class _InEitherSpace(Pruner):  # type: ignore[misc]
    """Common to the pruners of this module: Parameters are restored, and masks have the plain model's names."""

    def wrap_model(self) -> None:
        for wrapper in self._module_wrappers.values():
            remember(wrapper)
        super().wrap_model()

    def unwrap_model(self) -> None:
        """Remove NNI's wrappers; the model's own Parameters return with the trained values, and without masks."""
        super().unwrap_model()
        for wrapper in self._module_wrappers.values():
            put_back(wrapper, self.bound_model)

    def get_masks(self) -> Masks:
        """All masks: {name of the module in the plain model: {tensor name: float tensor of ones and zeros}}."""
        plain: Masks = defaultdict(dict)
        for module_name, masks in super().get_masks().items():
            for tensor_name, mask in masks.items():
                layer, name = plain_name(module_name, tensor_name, self._module_wrappers[module_name].module)
                plain[layer][name] = mask
        return plain

    def update_masks(self, masks: Masks) -> None:
        """Set masks, keyed as those of `get_masks`."""
        host_names = {
            plain_name(name, target, wrapper.module): (name, target)
            for name, wrapper in self._module_wrappers.items()
            for target in wrapper.pruning_target_spaces
        }
        host_masks: Masks = defaultdict(dict)
        for layer, given in masks.items():
            for name, mask in given.items():
                module_name, tensor_name = host_names.get((layer, name), (layer, name))
                host_masks[module_name][tensor_name] = mask
        super().update_masks(host_masks)

    def _let_bases_train(self) -> None:
        """Add the name of every trainable basis to the evaluator, which builds its optimizers by names."""
        names = {id(parameter): name for name, parameter in self.bound_model.named_parameters()}
        groups = [
            group["params"]
            for helper in getattr(self.evaluator, "_optimizer_helpers", ())
            for group in (helper.kwargs["params"] if "params" in helper.kwargs else helper.args[0])
        ]
        for ref in parametrized_tensors(self.bound_model):
            space = ref.interspace
            if space is None or not space.basis.requires_grad:
                continue
            basis, (chain, original) = names[id(space.basis)], _host_name(ref.module_name, ref.tensor_name, ref.module)
            if not any(basis in group for group in groups):
                for group in groups:
                    if f"{chain}.{original}" in group:
                        group.append(basis)
                        break


class _Configured(_InEitherSpace):
    """A pruner that takes a model and a config list."""

    def __init__(self, model: nn.Module, config_list: Entries, *args: Any, **kwargs: Any) -> None:
        check_unwrapped(model)
        entries = _translated(model, config_list)
        try:
            super().__init__(model, entries, *args, **kwargs)
        except BaseException:
            wrappers: list[Any] = [m._modules[WRAPPER] for m in model.modules() if WRAPPER in m._modules]
            for wrapper in wrappers:
                wrapper.unwrap()
                put_back(wrapper, model)
            raise
        self._let_bases_train()

    @classmethod
    def from_compressor(cls, compressor: Any, *args: Any, **kwargs: Any) -> Any:
        """Continue with the wrappers of another compressor; see NNI's method."""
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
        for name, tensors in data.items():
            parametrization = TensorRef(self._module_wrappers[name].module, "original").parametrization
            for target, values in tensors.items():
                if parametrization is not None and parametrization.mask is not None:
                    # Masked entries rank below zeros, so that they are chosen again first.
                    values = torch.where(values == 0, torch.finfo(values.dtype).tiny, values) * parametrization.mask
                tensors[target] = unit_gauge(values, parametrization)
        return data


class LevelPruner(_ByMagnitude, host.LevelPruner):  # type: ignore[misc]
    """Prunes the entries of smallest magnitude; see NNI's class.

    >>> pruner = LevelPruner(nn.Sequential(nn.Linear(4, 4)), [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    >>> _, masks = pruner.compress()
    >>> int(masks["0"]["weight"].sum())
    8
    """


class L1NormPruner(_ByMagnitude, host.L1NormPruner):  # type: ignore[misc]
    """Prunes the output channels of smallest L1 norm; see NNI's class."""


class L2NormPruner(_ByMagnitude, host.L2NormPruner):  # type: ignore[misc]
    """Prunes the output channels of smallest L2 norm; see NNI's class."""


class FPGMPruner(_ByMagnitude, host.FPGMPruner):  # type: ignore[misc]
    """Prunes the output channels nearest to the geometric median; see NNI's class."""


class SlimPruner(_Configured, host.SlimPruner):  # type: ignore[misc]
    """Prunes the output channels whose trained factor is smallest; see NNI's class."""


class TaylorPruner(_Configured, host.TaylorPruner):  # type: ignore[misc]
    """Prunes by squares of gradient times value; see NNI's class."""


class MovementPruner(_Configured, host.MovementPruner):  # type: ignore[misc]
    """Prunes the entries that training moves towards zero; see NNI's class."""


class _Scheduled(_InEitherSpace):
    """A pruner that takes another pruner."""

    def __init__(self, pruner: Any, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(pruner, *args, **kwargs)
        except BaseException:
            # NNI removes the wrappers before it checks its other arguments.
            if vars(self).get("_is_wrapped"):
                self.unwrap_model()
            if vars(pruner).get("_is_wrapped") is False:
                pruner.wrap_model()
            raise
        self._let_bases_train()


class LinearPruner(_Scheduled, host.LinearPruner):  # type: ignore[misc]
    """Lets another pruner of this module prune gradually, linearly in time; see NNI's class."""


class AGPPruner(_Scheduled, host.AGPPruner):  # type: ignore[misc]
    """Lets another pruner of this module prune gradually, cubically in time; see NNI's class."""


class LightningEvaluator(HostLightningEvaluator):  # type: ignore[misc]
    """NNI's evaluator, in which the training can be limited in steps with ``pytorch_lightning`` 2 too (NNI's fails).

    It takes a traced ``pytorch_lightning.Trainer`` and ``LightningDataModule``.
    """

    def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        """Train the bound model, with the duration as an argument of a new trainer."""
        arguments = self.trainer.trace_kwargs
        if max_steps:
            self.trainer.trace_kwargs = {**arguments, "max_steps": max_steps}
        try:
            super().train(None, max_epochs)
        finally:
            self.trainer.trace_kwargs = arguments
