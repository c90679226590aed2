"""A basis that several layers share in state dicts: stored once, under the first of its keys, and loaded into all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

#: {basis: the latest call of `load_state_dict` that has reached it}
_latest = WeakTensorKeyDictionary()


def is_stored(basis: nn.Parameter, destination: Mapping[str, Any]) -> bool:
    """Whether a state dict that is being filled has this basis already, under the key of another layer."""
    place = _place(basis)
    return any(
        key.endswith(".basis") and isinstance(value, Tensor) and _place(value) == place
        for key, value in destination.items()
    )


def _place(tensor: Tensor) -> tuple[int, int]:
    local: Tensor = getattr(tensor, "_local_tensor", tensor)  # of torch's DTensor, which has no memory of its own
    return local.untyped_storage()._cdata, int(local.storage_offset())


@dataclass
class _Load:
    """One call of `load_state_dict`, as a shared basis sees it. It does not keep the basis alive.

    Attributes:
        missing_keys: torch's list; it is the same object for all modules in one call, and another one in another call.
        waiting: parametrizations that the call has reached, and their keys, until one of the keys was there.
        loaded: whether one was there.
        assigned: the Parameter that was loaded instead of the basis, by ``assign=True`` on the meta device.
    """

    missing_keys: list[str]
    waiting: list[tuple[ReferenceType[Any], str]] = field(default_factory=list)
    loaded: bool = False
    assigned: nn.Parameter | None = None


def note_load(space: Any, shared: nn.Parameter, key: str, present: bool, missing_keys: list[str]) -> None:
    """Tell that a layer's part of a state dict was loaded: what it lacks, it has from the layers that share its basis.

    Args:
        space: the parametrization of the layer.
        shared: its basis before loading.
        key: that of the basis in the whole state dict.
        present: whether the state dict has it.
        missing_keys: the list that torch hands to `_load_from_state_dict`.
    """
    load = _latest.get(shared)
    if load is None or load.missing_keys is not missing_keys:
        load = _latest[shared] = _Load(missing_keys)
    if space.basis is not shared and load.assigned is None:
        load.assigned = space.basis
    load.loaded |= present
    load.waiting.append((ref(space), key))
    if load.loaded:
        for reference, its_key in load.waiting:
            if load.assigned is not None and reference() is not None:
                reference().basis = load.assigned
            if its_key in missing_keys:
                missing_keys.remove(its_key)
        load.waiting.clear()
