"""A compact file on its way into a model: everything is read and checked before anything changes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from ..core import torch_masks
from ..core.optimizer import note_conversion
from ..core.parametrization import Interspace, Mask, enter, leave
from ..core.tensor_ref import TensorRef, tensors_of
from ..errors import InvalidFileError, NotStorableError, WrongModelError
from .container import CompactFile, dtype_name
from .contents import as_integers, check_modules, owners
from .resizing import resized
from .schema import Record


class Plan:
    """What a file makes of a model.

    Args:
        model: not changed before `carry_out`.
        file: open until `carry_out` is done: values are copied from its memory.

    Raises:
        InterspaceError: file and model do not go together, or the file is broken.
    """

    def __init__(self, model: nn.Module, file: CompactFile) -> None:
        check_modules(model)
        self._records = file.description.tensors
        self._refs = {ref.name: ref for ref in tensors_of(model)}
        self._module_names = {id(module): name for name, module in model.named_modules()}
        self._match()
        self._attributes = self._sizes(file.description.groups)
        self._match_bases(file)
        self._contents: dict[str, _Content] = {}
        self._masks: dict[str, Tensor] = {}
        for name, record in self._records.items():
            index = None if record.tied else file.positions(name)
            if not record.tied:
                self._contents[name] = _content(file.stored_values(name), index, record, self._refs[name].parameter)
            if record.mask:
                self._masks[name] = _mask(record, index if record.mask == "positions" else file.kept(name))
        self._bases = [
            nn.Parameter(file.basis(number), basis.trained) for number, basis in enumerate(file.description.bases)
        ]
        self._constraints = [basis.constraint for basis in file.description.bases]

    def _match(self) -> None:
        """Names, kinds, dtypes and ties of the model's tensors are those of the file."""
        missing = [name for name in self._refs if name not in self._records]
        unknown = [name for name in self._records if name not in self._refs]
        if missing or unknown:
            of_model = f"{len(missing)} tensors of the model that are not in the file ({', '.join(missing[:3])})"
            of_file = f"{len(unknown)} tensors of the file that are not in the model ({', '.join(unknown[:3])})"
            raise WrongModelError(" and ".join(([of_model] if missing else []) + ([of_file] if unknown else [])))
        owner = owners(self._refs.values())
        for name, record in self._records.items():
            ref = self._refs[name]
            if is_lazy(ref.parameter):
                raise NotStorableError(name, "not initialised yet", "run the model once before")
            kinds = [_kind(is_buffer) for is_buffer in (record.buffer, ref.is_buffer)]
            if kinds[0] != kinds[1]:
                raise WrongModelError(f"{name!r}, {kinds[0]} in the file and {kinds[1]} in the model")
            dtype: torch.dtype = getattr(torch, record.dtype)
            if dtype != ref.parameter.dtype and not (dtype.is_floating_point and ref.parameter.is_floating_point()):
                raise WrongModelError(
                    f"{name!r}, {record.dtype} in the file and {dtype_name(ref.parameter.dtype)} here"
                )
            others = self._records[owner[name]]
            if (record.tied or name) != (others.tied or owner[name]):
                raise WrongModelError(f"{name!r} and {owner[name]!r}, which are one tensor in the model alone")
            if record.mask and ref.is_foreign:
                raise InvalidFileError(f"{name!r}: a mask on what is not of a layer")

    def _sizes(self, groups: Any) -> list[tuple[nn.Module, dict[str, Any]]]:
        """The attributes of layers that were cut."""
        shapes: dict[int, dict[str, tuple[int, ...]]] = {}
        cut: dict[int, nn.Module] = {}
        for name, record in self._records.items():
            ref = self._refs[name]
            here = tuple(ref.parameter.shape)
            shapes.setdefault(id(ref.module), {})[ref.tensor_name] = record.shape
            if record.shape != here:
                smaller = len(here) == len(record.shape) and all(map(int.__le__, record.shape, here))
                if not smaller:
                    raise WrongModelError(f"{name!r} of shape {record.shape} in the file and {here} in the model")
                cut[id(ref.module)] = ref.module
        known = {self._module_names[id(ref.module)]: ref.module for ref in self._refs.values()}
        for name in groups:
            if not isinstance(known.get(name), _ConvNd):
                raise WrongModelError(f"groups of {name!r}, which is no convolution of the model")
        found = []
        for name, module in known.items():
            parts = groups.get(name, 1)
            if id(module) not in cut:
                if isinstance(module, _ConvNd) and module.groups != parts:
                    raise WrongModelError(f"{name!r} with {parts} groups in the file and {module.groups} in the model")
                continue
            attributes = resized(module, shapes[id(module)], parts)
            if isinstance(attributes, str):
                raise WrongModelError(f"layer {name!r}, other sizes in the file: {attributes}")
            found.append((module, attributes))
        return found

    def _match_bases(self, file: CompactFile) -> None:
        """Every basis belongs to convolutions of its size."""
        for name, record in self._records.items():
            if record.basis is None:
                continue
            ref = self._refs[name]
            alone = not record.tied and all(other.tied != name for other in self._records.values())
            if not (isinstance(ref.module, _ConvNd) and ref.tensor_name == "weight" and alone):
                raise InvalidFileError(f"{name!r}: a basis on what is not the weight of one convolution")
            size, elements = file.basis_size(record.basis), math.prod(record.shape[2:])
            if size != elements or size == 1:
                raise InvalidFileError(f"{name!r}: {size} filters in the basis of kernels of {elements} elements")

    def carry_out(self) -> None:
        """Make the model what the file says."""
        for module, attributes in self._attributes:
            for name, value in attributes.items():
                setattr(module, name, value)
        for name, record in self._records.items():
            self._strip(self._refs[name], record)
        tensors: dict[str, Tensor] = {}
        for name, record in self._records.items():
            ref = self._refs[name]
            tensors[name] = tensors[record.tied] if record.tied else _filled(ref.parameter, self._contents[name])
            if tensors[name] is not ref.parameter:
                module, key = ref.target
                owner: dict[str, Any] = module._buffers if ref.is_buffer else module._parameters
                owner[key] = tensors[name]
        for number in range(len(self._bases)):
            self._set_basis(number)
        for name in self._records:
            ref = self._refs[name]
            if name in self._masks:
                ref.set_mask(self._masks[name])
            elif ref.parametrization is not None:
                ref.parametrization.mask = None

    def _strip(self, ref: TensorRef, record: Record) -> None:
        """Take off a tensor what the file does not put on it."""
        if ref.is_buffer:
            return
        torch_masks.take_off(*ref.target)
        wanted = Interspace if record.basis is not None else Mask if record.mask else None
        if ref.parametrization is not None and type(ref.parametrization) is not wanted:
            leave(ref.module, ref.tensor_name, ref.parameter.detach())

    def _set_basis(self, number: int) -> None:
        """Give the layers of a basis one Parameter: that which they share already, if they alone do."""
        members = [self._refs[name] for name, record in self._records.items() if record.basis == number]
        parameter, values = self._bases[number], self._bases[number].data
        there = [ref.interspace.basis for ref in members if ref.interspace is not None]
        elsewhere = [
            ref.interspace.basis
            for name, ref in self._refs.items()
            if ref.interspace is not None and self._records[name].basis != number
        ]
        like = members[0].parameter
        values = values.to(like.device)
        if len({id(each) for each in there}) == 1 and all(each is not there[0] for each in elsewhere):
            parameter = there[0]
            parameter.requires_grad_(self._bases[number].requires_grad)
        _replace(parameter, values)
        for ref in members:
            if ref.interspace is None:
                space = Interspace(parameter, tuple(like.shape[2:]), self._constraints[number])
                enter(ref.module, ref.tensor_name, space)
            else:
                ref.interspace.basis = parameter
                ref.interspace.constraint = self._constraints[number]
            note_conversion(ref.parameter, changed=False)


def _kind(is_buffer: bool) -> str:
    return "a buffer" if is_buffer else "a parameter"


class _Content(NamedTuple):
    """What a tensor is filled with: values, at some positions or at all of them; or another one that replaces it."""

    values: Tensor
    at: Tensor | None
    replaces: bool


def _content(values: Tensor, index: Tensor | None, record: Record, tensor: Tensor) -> _Content:
    """Values in the dtype of the record and on the device of a tensor, whose own memory takes them if it can."""
    dtype: torch.dtype = getattr(torch, record.dtype)
    values = values.to(dtype)
    if tensor.dtype == dtype and tensor.shape == record.shape and tensor.is_contiguous() and not tensor.is_meta:
        return _Content(values.to(tensor.device), None if index is None else index.to(tensor.device), False)
    whole = torch.empty(record.shape, dtype=dtype)
    _fill(whole, values, index)
    return _Content(_like(whole, tensor), None, True)


def _fill(tensor: Tensor, values: Tensor, index: Tensor | None) -> None:
    """Write values into a contiguous tensor, zeros where there are none; as they are, bit for bit."""
    if index is None:
        tensor.copy_(values.reshape(tensor.shape))
    else:
        flat = as_integers(tensor.view(-1).zero_())
        flat.index_copy_(0, index, as_integers(values))


def _filled(tensor: Tensor, content: _Content) -> Tensor:
    """A tensor with its content: the same object, unless it is on the meta device."""
    if tensor.is_meta:
        values = content.values
        return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
    if content.replaces:
        _replace(tensor, content.values)
    else:
        _fill(tensor.detach(), content.values, content.at)
    return tensor


def _replace(tensor: Tensor, values: Tensor) -> None:
    """Give a tensor other memory; a gradient that does not fit it goes."""
    if tensor.grad is not None and (tensor.grad.shape != values.shape or tensor.grad.dtype != values.dtype):
        tensor.grad = None
    tensor.data = values


def _mask(record: Record, index: Tensor | None) -> Tensor:
    """A mask that keeps the entries at some positions; None stands for all of them."""
    if index is None:
        return torch.ones(record.shape, dtype=torch.bool)
    return torch.zeros(record.numel, dtype=torch.bool).index_fill_(0, index, True).reshape(record.shape)


def _like(values: Tensor, tensor: Tensor) -> Tensor:
    """Values on the device and in the memory format of a tensor that they will replace."""
    if tensor.is_meta:
        return values
    values = values.to(tensor.device)
    if values.shape == tensor.shape:
        return torch.empty_like(tensor, dtype=values.dtype, requires_grad=False).copy_(values)
    for dim, last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == dim and tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous():
            return values.contiguous(memory_format=last)
    return values
