"""The tensors of a model as a compact file stores them: values, positions and masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.parametrization import Interspace
from ..core.tensor_ref import TensorRef, check_no_other, parametrized_tensors, tensors_of
from ..errors import NotStorableError
from .index_encoding import Positions, encode


def check_modules(model: nn.Module) -> None:
    """Raise if a model has state that is in no Parameter and no buffer, or someone else's parametrization on ours."""
    check_no_other(parametrized_tensors(model))
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state and not isinstance(module, Interspace):
            raise NotStorableError(name, f"the extra state of a {type(module).__name__}", "keep it in buffers")


def owners(refs: Iterable[TensorRef]) -> dict[str, str]:
    """{name of a tensor: the first name of the same tensor}, which is another one only where tensors are tied."""
    first: dict[int, str] = {}
    return {ref.name: first.setdefault(id(ref.parameter), ref.name) for ref in refs}


@dataclass(frozen=True)
class Packed:
    """A tensor as it is stored.

    Attributes:
        values: all of them in the shape of the tensor, or (1-D) those at `positions`; None if a tied tensor has them.
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


def packed(model: nn.Module, *, resumable: bool = False) -> Iterator[tuple[TensorRef, Packed]]:
    """Each tensor of a model as a compact file holds it; bases, which are stored as they are, are not among them.

    Values of tied tensors are stored with the first of them, masks with each.

    Args:
        model: not changed.
        resumable: keep what is behind masks, and the signs of zeros.
    """
    refs = tensors_of(model)
    owner = owners(refs)
    shared = {first for name, first in owner.items() if name != first}
    sparse = {owner[ref.name] for ref in refs if ref.is_prunable}
    for ref in refs:
        mask = ref.mask
        if owner[ref.name] != ref.name:
            yield ref, Packed(None, None, None if mask is None else encode(mask)[0])
        else:
            whole = resumable or ref.name in shared
            yield ref, pack(ref.parameter, mask, sparse=ref.name in sparse, whole=whole, signs=resumable)
