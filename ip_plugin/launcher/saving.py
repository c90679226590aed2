"""What a switched run saves: files that the plain network loads, and that the run itself can go on from exactly."""

from __future__ import annotations

import copy
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..basis import bases
from ..core.convert import bake
from ..core.masking import set_masks
from ..core.tensor_ref import TensorRef, parametrized_tensors
from .libraries import PruningHistory
from .session import Session

#: Under this name the metadata of a saved state dict holds the tensors of the interspace.
METADATA = "ip_plugin"
_PART = re.compile(r"(?P<layer>(?:.*\.)?)parametrizations\.(?P<tensor>[^.]+)\.(?P<part>original|0\..+)")


def ordinary(value: Any) -> Any:
    """What `torch.save` gets in place of a value: converted models baked, their state dicts with plain keys.

    A state dict keeps the exact tensors (coefficients, bases, masks) in its metadata, which plain modules do not look
    at, and which `load` finds there. Other values come back as they are.
    """
    if isinstance(value, nn.Module):
        return _baked_copy(value) if parametrized_tensors(value) else value
    if isinstance(value, Mapping):
        if any(isinstance(key, str) and _PART.fullmatch(key) for key in value):
            return plain_state_dict(value)
        if type(value) in (dict, OrderedDict):
            inner = {key: ordinary(each) for key, each in value.items()}
            changed = any(inner[key] is not value[key] for key in value)
            return (dict if type(value) is dict else OrderedDict)(inner) if changed else value
    if type(value) in (list, tuple):
        items = [ordinary(each) for each in value]
        changed = any(new is not old for new, old in zip(items, value, strict=True))
        return type(value)(items) if changed else value
    return value


def _baked_copy(model: nn.Module) -> nn.Module:
    baked = bake(copy.deepcopy(model))
    for module in baked.modules():
        PruningHistory.forget(module)
    return baked


@torch.no_grad()
def plain_state_dict(state: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """The state dict of the baked network: kernels composed, masks applied, keys of the plain model.

    Args:
        state: of a model in which layers are converted or masked.
    """
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, value in state.items():
        match = _PART.fullmatch(key)
        if match:
            parts.setdefault((match["layer"], match["tensor"]), {})[match["part"]] = value
    ours = {at: found for at, found in parts.items() if "0.basis" in found or "0.mask" in found}
    plain: OrderedDict[str, Any] = OrderedDict()
    for key, value in state.items():
        match = _PART.fullmatch(key)
        layer = match["layer"] if match else key.rpartition(".")[0] + "." * ("." in key)
        for at in [at for at in ours if at[0] == layer]:  # before its bias, as in the plain model
            plain["".join(at)] = _composed(ours.pop(at))
        if match is None or (match["layer"], match["tensor"]) not in parts or not _is_ours(parts, match):
            plain[key] = value
    metadata = getattr(state, "_metadata", {})
    kept = {name: each for name, each in metadata.items() if "parametrizations" not in name.split(".")}
    plain._metadata = {**kept, METADATA: {"state": dict(state), "metadata": dict(metadata)}}  # type: ignore[attr-defined]
    return plain


def _is_ours(parts: Mapping[tuple[str, str], Mapping[str, Tensor]], match: re.Match[str]) -> bool:
    found = parts[match["layer"], match["tensor"]]
    return "0.basis" in found or "0.mask" in found


def _composed(parts: Mapping[str, Tensor]) -> Tensor:
    values = parts["original"]
    if parts.get("0.mask") is not None:
        values = values * parts["0.mask"]
    if "0.basis" in parts:
        constraint = bases.CONSTRAINTS[int(parts.get("0._extra_state", torch.tensor(bases.CONSTRAINTS.index("none"))))]
        values = bases.compose(values, bases.constrained(parts["0.basis"], constraint))
    return values.clone()


def exact(state: Any) -> OrderedDict[str, Any] | None:
    """The state dict of the interspace that `plain_state_dict` has put into metadata; None if there is none."""
    kept = getattr(state, "_metadata", {}).get(METADATA)
    if kept is None:
        return None
    found = OrderedDict(kept["state"])
    found._metadata = kept["metadata"]  # type: ignore[attr-defined]
    return found


def loading(session: Session, load: Callable[..., Any]) -> Callable[..., Any]:
    """`nn.Module.load_state_dict` that finds the exact state of what a switched run has saved."""

    def load_state_dict(self: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        found = exact(state_dict)
        if found is not None and session.options.space == "interspace":
            session.convert(self)
            _make_room(self, found)
            if set(found) == set(self.state_dict()):
                return load(self, found, *args, **kwargs)
        result = load(self, state_dict, *args, **kwargs)
        _warn_of_changed_kernels(self, state_dict)
        return result

    return load_state_dict


def _make_room(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give layers the masks that a state has and the model has not; loading fills them."""
    modules = dict(model.named_modules())
    for key, value in state.items():
        match = _PART.fullmatch(key)
        name = match["layer"].removesuffix(".") if match else ""
        if match and match["part"] == "0.mask" and match["tensor"] == "weight" and name in modules:
            weight = modules[name].weight
            if key not in model.state_dict() and isinstance(weight, Tensor) and weight.shape == value.shape:
                set_masks(model, {name: torch.ones_like(weight, dtype=torch.bool)})


@torch.no_grad()
def _warn_of_changed_kernels(model: nn.Module, state: Mapping[str, Any]) -> None:
    """A dense kernel that a mask in the present basis cannot represent has changed while it was loaded."""
    modules = dict(model.named_modules())
    changed = []
    for key, value in state.items():
        name, _, tensor_name = key.rpartition(".")
        module = modules.get(name)
        if tensor_name == "weight" and module is not None and TensorRef(module).chain is not None:
            loaded = module.weight
            if isinstance(loaded, Tensor) and loaded.shape == value.shape and not torch.allclose(
                loaded.as_subclass(Tensor), value.to(loaded.device, loaded.dtype), rtol=1e-3, atol=1e-4
            ):  # fmt: skip
                changed.append(name)
    if changed:
        warnings.warn(
            f"{len(changed)} pruned layers (the first is {changed[0]!r}) have other kernels than were loaded: "
            "masks of coefficients in the present basis do not allow them. Load what torch.save wrote, as it was "
            "written (a new dict made of its items has lost the state of the interspace)",
            stacklevel=3,
        )
