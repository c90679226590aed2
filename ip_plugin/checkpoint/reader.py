"""Loading a compact file into a model: everything is read and checked before the model changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from ..basis.bases import Constraint
from ..core import torch_masks
from ..core.optimizer import note_conversion
from ..core.parametrization import Interspace, Mask, enter, leave
from ..core.tensor_ref import TensorRef, by_basis, tensors_of
from ..errors import CheckpointError
from .container import CompactFile, dtype_name
from .contents import as_integers, check_modules, not_storable, owners
from .index_encoding import require
from .resizing import resized
from .schema import Record


class Plan:
    """The changes that load a file into a model, which does not change before `carry_out`.

    The file must be open until that returns: values are copied from its memory.

    Raises:
        InterspaceError: the file does not fit the model, or is inconsistent.
    """

    def __init__(self, model: nn.Module, file: CompactFile) -> None:
        check_modules(model)
        self._records = file.description.tensors
        self._refs = {ref.name: ref for ref in tensors_of(model)}
        self._module_names = {id(module): name for name, module in model.named_modules()}
        self._match()
        self._attributes = self._sizes(file.description.groups)
        self._match_bases(file)
        self._writers: dict[str, Callable[[Tensor], Tensor]] = {}
        self._masks: dict[str, Tensor] = {}
        for name, record in self._records.items():
            index = None if record.tied else file.positions(name)
            if not record.tied:
                self._writers[name] = _writer(file.stored_values(name), index, record, self._refs[name].parameter)
            if record.mask:
                self._masks[name] = _mask(record, index if record.mask == "positions" else file.kept(name))
        self._bases = [
            (nn.Parameter(file.basis(number), basis.trained), basis.constraint)
            for number, basis in enumerate(file.description.bases)
        ]

    def _match(self) -> None:
        """Check the names, kinds, dtypes and ties of the tensors."""
        missing = [name for name in self._refs if name not in self._records]
        unknown = [name for name in self._records if name not in self._refs]
        if missing or unknown:
            of_model = f"{len(missing)} tensors of the model that are not in the file ({', '.join(missing[:3])})"
            of_file = f"{len(unknown)} tensors of the file that are not in the model ({', '.join(unknown[:3])})"
            raise _wrong_model(" and ".join(([of_model] if missing else []) + ([of_file] if unknown else [])))
        owner = owners(self._refs.values())
        for name, record in self._records.items():
            ref = self._refs[name]
            if is_lazy(ref.parameter):
                raise not_storable(name, "not initialised yet", "run the model once before")
            if record.buffer != ref.is_buffer:
                there, here = ("a buffer", "a parameter") if record.buffer else ("a parameter", "a buffer")
                raise _wrong_model(f"{name!r}, {there} in the file and {here} in the model")
            dtype: torch.dtype = getattr(torch, record.dtype)
            if dtype != ref.parameter.dtype and not (dtype.is_floating_point and ref.parameter.is_floating_point()):
                raise _wrong_model(f"{name!r}, {record.dtype} in the file and {dtype_name(ref.parameter.dtype)} here")
            other = self._records[owner[name]]
            if (record.tied or name) != (other.tied or owner[name]):
                raise _wrong_model(f"{name!r} and {owner[name]!r}, which are one tensor in the model alone")
            require(not (record.mask and ref.is_foreign), "a mask behind someone else's parametrization", name)

    def _sizes(self, groups: Any) -> list[tuple[nn.Module, dict[str, Any]]]:
        """The new attributes of layers whose tensors are smaller in the file."""
        shapes: dict[int, dict[str, tuple[int, ...]]] = {}
        smaller_layers: set[int] = set()
        for name, record in self._records.items():
            ref = self._refs[name]
            here = tuple(ref.parameter.shape)
            shapes.setdefault(id(ref.module), {})[ref.tensor_name] = record.shape
            if record.shape != here:
                if len(here) != len(record.shape) or any(map(int.__gt__, record.shape, here)):
                    raise _wrong_model(f"{name!r} of shape {record.shape} in the file and {here} in the model")
                smaller_layers.add(id(ref.module))
        known = {self._module_names[id(ref.module)]: ref.module for ref in self._refs.values()}
        for name in groups:
            if not isinstance(known.get(name), _ConvNd):
                raise _wrong_model(f"groups of {name!r}, which is no convolution of the model")
        resized_layers = []
        for name, module in known.items():
            parts = groups.get(name, 1)
            if id(module) in smaller_layers:
                attributes = resized(module, shapes[id(module)], parts)
                if isinstance(attributes, str):
                    raise _wrong_model(f"layer {name!r}, other sizes in the file: {attributes}")
                resized_layers.append((module, attributes))
            elif isinstance(module, _ConvNd) and module.groups != parts:
                raise _wrong_model(f"{name!r} with {parts} groups in the file and {module.groups} in the model")
        return resized_layers

    def _match_bases(self, file: CompactFile) -> None:
        """Check that every basis belongs to convolutions of its kernel size."""
        for name, record in self._records.items():
            if record.basis is None:
                continue
            ref = self._refs[name]
            alone = not record.tied and all(other.tied != name for other in self._records.values())
            fits = isinstance(ref.module, _ConvNd) and ref.tensor_name == "weight" and alone
            require(fits, "a basis on something other than the weight of one convolution", name)
            size, elements = file.basis_size(record.basis), math.prod(record.shape[2:])
            require(size == elements > 1, f"{size} filters in the basis of kernels of {elements} elements", name)

    def carry_out(self) -> None:
        """Change the model."""
        for module, attributes in self._attributes:
            for name, value in attributes.items():
                setattr(module, name, value)
        for name, record in self._records.items():
            self._strip(self._refs[name], record)
        tensors: dict[str, Tensor] = {}
        for name, record in self._records.items():
            ref = self._refs[name]
            tensors[name] = tensors[record.tied] if record.tied else self._writers[name](ref.parameter)
            if tensors[name] is not ref.parameter:
                module, key = ref.target
                owner: dict[str, Any] = module._buffers if ref.is_buffer else module._parameters
                owner[key] = tensors[name]
        for number, (basis, constraint) in enumerate(self._bases):
            self._set_basis(number, basis, constraint)
        for name in self._records:
            ref = self._refs[name]
            if name in self._masks:
                ref.set_mask(self._masks[name])
            elif ref.parametrization is not None:
                ref.parametrization.mask = None

    def _strip(self, ref: TensorRef, record: Record) -> None:
        """Remove the mask of the host, and a parametrization of ours that the file does not have."""
        if ref.is_buffer:
            return
        torch_masks.take_off(*ref.target)
        wanted = Interspace if record.basis is not None else Mask if record.mask else None
        if ref.parametrization is not None and type(ref.parametrization) is not wanted:
            leave(ref.module, ref.tensor_name, ref.parameter.detach())

    def _set_basis(self, number: int, basis: nn.Parameter, constraint: Constraint) -> None:
        """Set the basis of its layers; the Parameter that they share stays, unless other layers share it, too."""
        members = [self._refs[name] for name, record in self._records.items() if record.basis == number]
        shared = by_basis(self._refs.values())
        present = [parameter for parameter, refs in shared.items() if not set(refs).isdisjoint(members)]
        values = basis.data.to(members[0].parameter.device)
        if len(present) == 1 and set(shared[present[0]]) <= set(members):
            present[0].requires_grad_(basis.requires_grad)
            basis = present[0]
        _replace(basis, values)
        for ref in members:
            if ref.interspace is None:
                enter(ref.module, ref.tensor_name, Interspace(basis, tuple(ref.parameter.shape[2:]), constraint))
            else:
                ref.interspace.basis, ref.interspace.constraint = basis, constraint
            note_conversion(ref.parameter, changed=False)


def _wrong_model(found: str) -> CheckpointError:
    return CheckpointError(
        "The model must have the architecture of the file: the same tensors, with sizes at least as large.",
        found,
        "build the model as it was built before it was saved; `ip-plugin inspect FILE` shows what is in the file",
    )


def _writer(values: Tensor, index: Tensor | None, record: Record, tensor: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that gives a tensor its new values: in its memory if dtype, shape and layout fit, else in new memory.

    It returns the tensor: the same object, unless that is on the meta device.
    """
    dtype: torch.dtype = getattr(torch, record.dtype)
    values = values.to(dtype)
    if tensor.dtype == dtype and tensor.shape == record.shape and tensor.is_contiguous() and not tensor.is_meta:
        index = None if index is None else index.to(tensor.device)
        return partial(_fill, values=values.to(tensor.device), index=index)
    whole = _fill(torch.empty(record.shape, dtype=dtype), values, index)
    if tensor.is_meta:
        return lambda old: nn.Parameter(whole, old.requires_grad) if isinstance(old, nn.Parameter) else whole
    return partial(_replace, values=_like(whole, tensor))


def _fill(tensor: Tensor, values: Tensor, index: Tensor | None) -> Tensor:
    """Write values bit for bit into a contiguous tensor, and zeros elsewhere."""
    if index is None:
        tensor.detach().copy_(values.reshape(tensor.shape))
    else:
        as_integers(tensor.detach().view(-1).zero_()).index_copy_(0, index, as_integers(values))
    return tensor


def _replace(tensor: Tensor, values: Tensor) -> Tensor:
    """Replace the memory of a tensor; a gradient that does not fit is dropped."""
    if tensor.grad is not None and (tensor.grad.shape != values.shape or tensor.grad.dtype != values.dtype):
        tensor.grad = None
    tensor.data = values
    return tensor


def _mask(record: Record, index: Tensor | None) -> Tensor:
    """A mask that keeps the given positions; None keeps all entries."""
    if index is None:
        return torch.ones(record.shape, dtype=torch.bool)
    return torch.zeros(record.numel, dtype=torch.bool).index_fill_(0, index, True).reshape(record.shape)


def _like(values: Tensor, tensor: Tensor) -> Tensor:
    """Values on the device and in the memory format of the tensor that they replace."""
    values = values.to(tensor.device)
    if values.shape == tensor.shape:
        return torch.empty_like(tensor, dtype=values.dtype, requires_grad=False).copy_(values)
    for dim, last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == dim and tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous():
            return values.contiguous(memory_format=last)
    return values
