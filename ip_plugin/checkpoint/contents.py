"""The tensors of a model as a compact file stores them: values, positions and masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.parametrization import Interspace
from ..core.tensor_ref import TensorRef, check_no_other, parametrized_tensors, tensors_of
from ..errors import CheckpointError
from .index_encoding import Positions, encode


def check_modules(model: nn.Module) -> None:
    """Raise if a model has state outside of Parameters and buffers, or another parametrization on top of ours."""
    check_no_other(parametrized_tensors(model))
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state and not isinstance(module, Interspace):
            raise not_storable(name, f"the extra state of a {type(module).__name__}", "keep it in buffers")


def not_storable(name: str, found: str, remedy: str) -> CheckpointError:
    """The error for something in a model that a compact file cannot hold."""
    rule = "A compact file holds tensors with values: parameters and buffers."
    return CheckpointError(rule, f"{name!r}: {found}", remedy)


def owners(refs: Iterable[TensorRef]) -> dict[str, str]:
    """{name of a tensor: the first name of the same tensor}, which is another one only where tensors are tied."""
    first: dict[int, str] = {}
    return {ref.name: first.setdefault(id(ref.parameter), ref.name) for ref in refs}


@dataclass(frozen=True)
class Packed:
    """A tensor as a file stores it.

    Attributes:
        values: all values in the shape of the tensor, or (1-D) those at `positions`; None if a tied tensor has them.
        positions: of the values; None if all values are stored.
        mask: the positions that the mask keeps; None without a mask; the same object as `positions` if they are equal.
    """

    values: Tensor | None
    positions: Positions | None = None
    mask: Positions | None = None

    def parts(self) -> dict[str, Tensor]:
        """What a file holds: "values", "positions" and "mask"; "" is the whole tensor."""
        parts: dict[str, Tensor] = {}
        if self.values is not None:
            parts["" if self.positions is None else "values"] = self.values
        if self.positions is not None and self.positions.coding != "all":
            parts["positions"] = self.positions.data
        if self.mask is not None and self.mask is not self.positions and self.mask.coding != "all":
            parts["mask"] = self.mask.data
        return parts

    @property
    def nbytes(self) -> int:
        """Bytes of values, positions and mask."""
        return sum(part.nbytes for part in self.parts().values())


def pack(
    values: Tensor, mask: Tensor | None = None, *, sparse: bool = True, whole: bool = False, signs: bool = False
) -> Packed:
    """Choose the smallest lossless representation of a tensor.

    Args:
        values: any strided tensor.
        mask: bools of its shape, False = pruned.
        sparse: whether zeros may be left out if there is no mask.
        whole: store pruned values, too.
        signs: keep the sign of zeros; products with masks turn pruned negative values into -0.0.

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
            packed = Packed(_at(values, index), positions, masked)
            if packed.nbytes < Packed(values, None, masked).nbytes:
                return packed
    return Packed(values, None, masked)


def nonzero_entries(flat: Tensor, *, signs: bool = False) -> Tensor:
    """A mask of the entries of a 1-D tensor that are not zero (with `signs`, -0.0 is not zero).

    By their bits, so denormal numbers are not zero, even if the processor flushes them.
    """
    parts = torch.view_as_real(flat) if flat.is_complex() else flat
    bits = parts.view(_INTEGERS[parts.element_size()])
    if parts.is_floating_point() and not signs:
        bits = bits << 1
    return (bits != 0).any(1) if flat.is_complex() else bits != 0


def _at(values: Tensor, index: Tensor) -> Tensor:
    return as_integers(values.reshape(-1)).index_select(0, index).view(values.dtype).reshape(-1)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(flat: Tensor) -> Tensor:
    """A 1-D tensor as integers of the same bits, one row for each entry: these can be indexed, whatever the dtype."""
    if flat.element_size() == 16:  # complex128
        return torch.view_as_real(flat).view(torch.int64)
    return flat.view(_INTEGERS[flat.element_size()])


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor, which may be sharded by FSDP2 (a DTensor); every process has to call."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def packed(model: nn.Module, *, resumable: bool = False) -> Iterator[tuple[TensorRef, Packed]]:
    """Each tensor of a model as a compact file stores it, except bases, which are stored as they are.

    Values of tied tensors are stored with the first of them, masks with each. `resumable` keeps pruned values and the
    signs of zeros.
    """
    refs = tensors_of(model)
    owner = owners(refs)
    shared = {first for name, first in owner.items() if name != first}
    sparse = {owner[ref.name] for ref in refs if ref.is_prunable}
    for ref in refs:
        mask = None if ref.mask is None else gathered(ref.mask)
        if owner[ref.name] != ref.name:
            yield ref, Packed(None, None, None if mask is None else encode(mask)[0])
        else:
            whole = resumable or ref.name in shared
            yield ref, pack(gathered(ref.parameter), mask, sparse=ref.name in sparse, whole=whole, signs=resumable)
