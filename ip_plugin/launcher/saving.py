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

from ..core.convert import bake
from ..core.parametrization import Interspace, Mask
from ..core.tensor_ref import TensorRef, parametrized_tensors
from .libraries import PruningHistory
from .session import Session

#: Under this name the metadata of a saved state dict holds the tensors of the interspace.
METADATA = "ip_plugin"
_PART = re.compile(r"(?P<layer>(?:.*\.)?)parametrizations\.(?P<tensor>[^.]+)\.(?P<part>original|0\..+)")


def ordinary(value: Any) -> Any:
    """What `torch.save` gets in place of a value: converted models baked, their state dicts with plain keys.

    A state dict keeps the exact tensors (coefficients, bases, masks) in its metadata, which plain modules do not look
    at, and which `loading` finds there. Other values come back as they are.
    """
    if isinstance(value, nn.Module):
        marked = parametrized_tensors(value) or any(map(PruningHistory.of, value.modules()))
        return _baked_copy(value) if marked else value
    if isinstance(value, Mapping):
        if any(isinstance(key, str) and _PART.fullmatch(key) for key in value):
            return plain_state_dict(value)
        if type(value) in (dict, OrderedDict):
            inner = {key: ordinary(item) for key, item in value.items()}
            changed = any(inner[key] is not value[key] for key in value)
            return (dict if type(value) is dict else OrderedDict)(inner) if changed else value
    if type(value) in (list, tuple):
        items = [ordinary(item) for item in value]
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
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if match := _PART.fullmatch(key):
            tensors.setdefault(match["layer"] + match["tensor"], {})[match["part"]] = value
    # Layers that share a basis have one kernel shape and dtype; the state dict has it for the first of them.
    shared = {_kind(parts): parts["0.basis"] for parts in reversed(tensors.values()) if "0.basis" in parts}
    for parts in tensors.values():
        if parts.keys() >= {"0._extra_state", "original"} and _kind(parts) in shared:
            parts.setdefault("0.basis", shared[_kind(parts)])
    ours = {
        name: parts
        for name, parts in tensors.items()
        if "0.basis" in parts or ("0.mask" in parts and "0._extra_state" not in parts)
    }
    plain: OrderedDict[str, Any] = OrderedDict()
    for key, value in state.items():
        match = _PART.fullmatch(key)
        layer = match["layer"] if match else key[: key.rfind(".") + 1]
        for name, parts in ours.items():  # before the layer's bias, as in the plain model
            if name not in plain and name.rpartition(".")[0] == layer.removesuffix("."):
                plain[name] = _composed(parts)
        if match is None or match["layer"] + match["tensor"] not in ours:
            plain[key] = value
    metadata = getattr(state, "_metadata", {})
    kept = {name: version for name, version in metadata.items() if "parametrizations" not in name.split(".")}
    plain._metadata = {**kept, METADATA: {"state": dict(state), "metadata": dict(metadata)}}  # type: ignore[attr-defined]
    return plain


def _kind(parts: Mapping[str, Tensor]) -> tuple[torch.Size, torch.dtype]:
    return parts["original"].shape[2:], parts["original"].dtype


def _composed(parts: Mapping[str, Tensor]) -> Tensor:
    """The tensor that a layer with this state computes with."""
    original = parts["original"]
    if "0.basis" not in parts:
        parametrization = Mask()
    else:
        parametrization = Interspace(nn.Parameter(parts["0.basis"], requires_grad=False), original.shape[2:])
        if "0._extra_state" in parts:
            parametrization.set_extra_state(parts["0._extra_state"])
    parametrization.mask = parts.get("0.mask")
    composed: Tensor = parametrization(original)
    return composed


def exact(state: Any) -> OrderedDict[str, Any] | None:
    """The state dict of the interspace that `plain_state_dict` has put into metadata; None if there is none."""
    kept = getattr(state, "_metadata", {}).get(METADATA)
    if kept is None:
        return None
    found = OrderedDict(kept["state"])
    found._metadata = kept["metadata"]  # type: ignore[attr-defined]
    return found


def loading(session: Session, load: Callable[..., Any]) -> Callable[..., Any]:
    """`nn.Module.load_state_dict` that takes the exact state of what a switched run has saved.

    Masks that a model has and a state has not, because it was saved before they were pruned, stay.
    """

    def load_state_dict(self: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        state = exact(state_dict)
        if state is not None:
            session.convert(self)
            state = _with_masks(self, state)
            present = self.state_dict()
            if all(key in present or key.endswith(".basis") for key in state if _PART.fullmatch(key)):
                return load(self, state, *args, **kwargs)
        elif any(isinstance(key, str) and _PART.fullmatch(key) for key in state_dict):
            state_dict = _with_masks(self, OrderedDict(state_dict))
        result = load(self, state_dict, *args, **kwargs)
        _warn_of_changed_kernels(self, state_dict)
        return result

    return load_state_dict


def _with_masks(model: nn.Module, state: OrderedDict[str, Any]) -> OrderedDict[str, Any]:
    """Make model and state have the same masks: the model gets those that it lacks, the state those that it lacks."""
    modules = dict(model.named_modules())
    for key, value in state.items():
        match = _PART.fullmatch(key)
        module = modules.get(match["layer"].removesuffix(".")) if match else None
        if match and module is not None and match["part"] == "0.mask":
            ref = TensorRef(module, match["tensor"])
            if ref.mask is None and ref.parameter.shape == value.shape:
                ref.set_mask(torch.ones_like(value))
    for ref in parametrized_tensors(model):
        prefix = f"{ref.module_name}.parametrizations.{ref.tensor_name}.".removeprefix(".")
        if ref.mask is not None and f"{prefix}original" in state:
            state.setdefault(f"{prefix}0.mask", ref.mask)
    return state


@torch.no_grad()
def _warn_of_changed_kernels(model: nn.Module, state: Mapping[str, Any]) -> None:
    """A dense kernel that a mask in the present basis cannot represent has changed while it was loaded."""
    modules = dict(model.named_modules())
    changed = []
    for key, value in state.items():
        name, _, tensor_name = key.rpartition(".")
        module = modules.get(name)
        if tensor_name == "weight" and module is not None and TensorRef(module).interspace is not None:
            loaded = TensorRef(module).composed
            given = value.to(loaded.device, loaded.dtype)
            if loaded.shape == given.shape and not torch.allclose(loaded, given, rtol=1e-3, atol=1e-4):
                changed.append(name)
    if changed:
        warnings.warn(
            f"{len(changed)} pruned layers (the first is {changed[0]!r}) have other kernels than were loaded: "
            "masks of coefficients in the present basis do not allow them. Load what torch.save wrote, as it was "
            "written (a new dict made of its items has lost the state of the interspace)",
            stacklevel=3,
        )
