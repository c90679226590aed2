"""What a model consists of when it is stored: its tensors under their plain names, with masks and bases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core import torch_masks
from ..core.layer import Target, is_prunable, mask_of, target
from ..core.parametrization import Interspace, Mask, held, ours, ours_in, parametrizations
from ..errors import AlreadyParametrizedError, NotStorableError
from .index_encoding import Positions, encode


@dataclass(frozen=True)
class Place:
    """One tensor of a model, where the plain model has it.

    Attributes:
        name: its name in the state_dict of the plain model.
        module, tensor_name: where the plain model has it.
        tensor: the Parameter behind masks and parametrizations of ours, or the buffer.
        is_buffer: whether it is a buffer.
    """

    name: str
    module: nn.Module
    tensor_name: str
    tensor: Tensor
    is_buffer: bool = False

    @property
    def parametrization(self) -> Mask | None:
        """Our parametrization of the tensor, or None."""
        return None if self.is_buffer else ours(self.module, self.tensor_name)

    @property
    def interspace(self) -> Interspace | None:
        """Our parametrization if the tensor is in the interspace, or None."""
        found = self.parametrization
        return found if isinstance(found, Interspace) else None

    @property
    def target(self) -> Target:
        """What a pruner acts on."""
        return target(self.module, self.tensor_name)

    @property
    def mask(self) -> Tensor | None:
        """What `mask_of` finds; None of a buffer."""
        return None if self.is_buffer else mask_of(self.target)

    @property
    def prunable(self) -> bool:
        """Whether it is the weight of a layer that can be pruned."""
        return self.tensor_name == "weight" and is_prunable(self.module)


def places(model: nn.Module) -> list[Place]:
    """Every tensor that the state_dict of the plain model would hold, in model order; tied ones once for each name."""
    found = []
    for prefix, module in model.named_modules():
        if isinstance(module, Mask) or ours_in(module) is not None:
            continue
        prefix += "." if prefix else ""
        pruned = torch_masks.pruned_names(module)
        names = []
        for name, parameter in module._parameters.items():
            if parameter is not None:
                plain = name.removesuffix("_orig")
                names.append(plain if plain in pruned else name)
        if parametrize.is_parametrized(module):
            names += [name for name in parametrizations(module) if ours(module, name) is not None]
        found += [Place(prefix + name, module, name, torch_masks.parameter(*target(module, name))) for name in names]
        for name, buffer in module._buffers.items():
            hosts = name.endswith("_mask") and name.removesuffix("_mask") in pruned
            if buffer is not None and not hosts and name not in module._non_persistent_buffers_set:
                found.append(Place(prefix + name, module, name, buffer, is_buffer=True))
    return found


def check_modules(model: nn.Module) -> None:
    """Raise if a model has state that is in no Parameter and no buffer, or someone else's parametrization on ours."""
    for each in held(model):
        if len(each.chain) > 1:
            raise AlreadyParametrizedError.beside_ours(each.layer, list(each.chain)[1:], each.tensor_name)
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state and not isinstance(module, Interspace):
            raise NotStorableError(name, f"the extra state of a {type(module).__name__}", "keep it in buffers")


def owners(places: list[Place]) -> dict[str, str]:
    """Of tensors that several places hold, the name of the first, for each of them; the others are their own."""
    first: dict[int, str] = {}
    return {place.name: first.setdefault(id(place.tensor), place.name) for place in places}


@dataclass(frozen=True)
class Packed:
    """A tensor as it is stored.

    Attributes:
        values: all of them in the shape of the tensor, or (1-D) those at `positions`; None if another place has them.
        positions: where the values are; None if they are all there.
        mask: what the mask keeps; None without a mask. The same object as `positions` if that says it.
    """

    values: Tensor | None
    positions: Positions | None = None
    mask: Positions | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of values, positions and mask."""
        parts = {} if self.values is None else {id(self.values): self.values}
        parts |= {id(each.data): each.data for each in (self.positions, self.mask) if each is not None}
        return sum(part.numel() * part.element_size() for part in parts.values())


def pack(
    values: Tensor, mask: Tensor | None = None, *, sparse: bool = True, whole: bool = False, signs: bool = False
) -> Packed:
    """Store a tensor in few bytes, without losing a bit of what counts.

    Args:
        values: any strided tensor.
        mask: bools of its shape, False = pruned.
        sparse: whether zeros may be left out where no mask says what counts.
        whole: keep what is behind the mask.
        signs: keep -0.0 as well, which pruning by a product leaves of negative values, about half of all.

    >>> packed = pack(torch.tensor([0.0, 7.0, -0.0, 0.0]))
    >>> packed.values, packed.positions.coding, packed.nbytes
    (tensor([7.]), 'bits', 5)
    """
    values = values.detach()
    if mask is not None and not whole:
        positions, index = encode(mask)
        return Packed(_at(values, index), positions, positions)
    masked = None if mask is None else encode(mask)[0]
    if sparse:
        nonzero = nonzero_entries(values.reshape(-1), signs=signs)
        if not bool(nonzero.all()):
            positions, index = encode(nonzero)
            found = Packed(_at(values, index), positions, masked)
            if found.nbytes < Packed(values, None, masked).nbytes:
                return found
    return Packed(values, None, masked)


def nonzero_entries(flat: Tensor, *, signs: bool = False) -> Tensor:
    """Which entries of a 1-D tensor are not zero (nor -0.0, without `signs`).

    Told by their bits: a denormal number counts, whatever the processor makes of it.
    """
    parts = torch.view_as_real(flat) if flat.is_complex() else flat
    bits = parts.view(_INTEGERS[parts.element_size()])
    if parts.is_floating_point() and not signs:
        bits = bits << 1
    return (bits != 0).any(1) if flat.is_complex() else bits != 0


def _at(values: Tensor, index: Tensor) -> Tensor:
    flat = values.reshape(-1)
    return as_integers(flat).index_select(0, index).view(flat.dtype).reshape(-1)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(flat: Tensor) -> Tensor:
    """A 1-D tensor as integers of the same bits, one row an entry: they can be moved whatever the dtype is."""
    if flat.element_size() == 16:  # complex128
        return torch.view_as_real(flat).view(torch.int64)
    return flat.view(_INTEGERS[flat.element_size()])


def packed(model: nn.Module, *, resumable: bool = False) -> Iterator[tuple[Place, Packed]]:
    """Each tensor of a model as a compact file holds it; bases, which are stored as they are, are not among them.

    Values that several places share are stored with the first of them, masks at each.

    Args:
        model: not changed.
        resumable: keep what is behind masks, and the signs of zeros.
    """
    found = places(model)
    owner = owners(found)
    shared = {name for place, name in owner.items() if place != name}
    sparse = {owner[place.name] for place in found if place.prunable}
    for place in found:
        mask = place.mask
        if owner[place.name] != place.name:
            yield place, Packed(None, None, None if mask is None else encode(mask)[0])
        else:
            whole = resumable or place.name in shared
            yield place, pack(place.tensor, mask, sparse=place.name in sparse, whole=whole, signs=resumable)
