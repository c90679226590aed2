"""Compact checkpoints of pruned models: `save` and `load`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from ..basis.bases import check_regular
from ..core.optimizer import watch
from ..core.tensor_ref import Model, TensorRef, by_basis, inner, parametrized_by_another, tensors_of
from ..errors import CheckpointError
from .container import AS_BYTES, NATIVE, basis_name, dtype_name, native, opened, part, write
from .contents import Packed, check_modules, not_storable, owners, packed
from .reader import Plan
from .schema import Basis, Description, Record

FilePath: TypeAlias = str | os.PathLike[str]


@torch.no_grad()
def save(model: nn.Module, path: FilePath, *, dtype: torch.dtype | None = None, resumable: bool = False) -> None:
    """Save a compressed checkpoint: non-zero values, their positions, each basis once.

    For models in either space, with masks of ours or of `torch.nn.utils.prune`, or baked with zeros in the weights.
    Zeros of prunable layers and masked values are left out; everything else is stored as it is. Save before you bake:
    `bake` makes the kernels of the interspace dense. Inverse: `load`.

    A compact file is a safetensors file with a JSON description and a checksum. Loading executes no code; corrupt or
    inconsistent files are rejected with a diagnostic; writes are atomic.

    Args:
        model: not changed. Wrappers (DistributedDataParallel, DataParallel, torch.compile) are removed.
        path: an existing file is replaced.
        dtype: None stores every value bit for bit (except that an unmasked zero of a prunable layer loses its sign);
            torch.float16 or torch.bfloat16 rounds the weights and coefficients of prunable layers (not bases, biases,
            norms and buffers). They are loaded in their original dtype.
        resumable: store pruned values and the signs of zeros as well, so that training continues bit for bit (save the
            optimizer's state_dict separately). Without it, pruned values are loaded as zeros.

    Raises:
        CheckpointError: the model contains something that is no tensor with values, or `dtype` is not supported, cannot
            hold the values, or is combined with `resumable`.
        BasisError: a basis is not finite, or singular.
        ConversionError: someone else's parametrization sits on top of ours. In all cases an existing file is kept.

    >>> import tempfile
    >>> from ip_plugin import interspace, prunable
    >>> from ip_plugin.adapters import torch_prune
    >>> def build():
    ...     return nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    >>> model = interspace(build())
    >>> torch_prune.global_unstructured(prunable(model), torch_prune.L1Unstructured, amount=0.95)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(model, f"{folder}/model.safetensors")
    ...     size, loaded = os.path.getsize(f"{folder}/model.safetensors"), load(build(), f"{folder}/model.safetensors")
    >>> x = torch.randn(1, 3, 8, 8)
    >>> size < 13_000, torch.equal(loaded(x), model(x))
    (True, True)
    """
    if dtype not in (None, torch.float16, torch.bfloat16):
        raise _stored_dtype_error(f"dtype={dtype}")
    if dtype is not None and resumable:
        raise _stored_dtype_error(f"dtype={dtype}, and resumable=True, which keeps every bit")
    model = inner(model)
    _check(model)
    refs = tensors_of(model)
    owner = owners(refs)
    spaces = [ref.interspace for ref, *_ in by_basis(refs).values() if ref.interspace is not None]
    numbers = {space.basis: number for number, space in enumerate(spaces)}
    tensors = {basis_name(number): native(basis) for basis, number in numbers.items()}
    records: dict[str, Record] = {}
    for ref, packed_tensor in packed(model, resumable=resumable):
        if dtype is not None and ref.is_prunable:
            packed_tensor = _rounded(packed_tensor, dtype, ref.name)
        records[ref.name] = _record(ref, packed_tensor, owner[ref.name], numbers)
        for what, tensor in packed_tensor.parts().items():
            key = part(ref.name, what)
            if key in tensors:
                raise not_storable(key, "two tensors of this name", "rename the module or parameter")
            tensors[key] = native(tensor)
    bases = tuple(Basis(space.basis.requires_grad, space.constraint) for space in spaces)
    convolutions = ((name, module) for name, module in model.named_modules() if isinstance(module, _ConvNd))
    groups = {name: module.groups for name, module in convolutions if module.groups > 1}
    write(Path(path), tensors, Description(records, bases, groups))


def _record(ref: TensorRef, stored: Packed, owner: str, numbers: Mapping[nn.Parameter, int]) -> Record:
    """The record of a tensor: `owner` is the name of the one that has its values, `numbers` those of the bases."""
    values, positions, mask = stored.values, stored.positions, stored.mask
    dtype = ref.parameter.dtype
    return Record(
        shape=tuple(ref.parameter.shape),
        dtype=dtype_name(dtype),
        stored="" if values is None or values.dtype == dtype else dtype_name(values.dtype),
        buffer=ref.is_buffer,
        tied="" if owner == ref.name else owner,
        positions="" if positions is None else positions.coding,
        mask="" if mask is None else "positions" if mask is positions else mask.coding,
        basis=None if ref.interspace is None else numbers[ref.interspace.basis],
    )


def _rounded(stored: Packed, dtype: torch.dtype, name: str) -> Packed:
    """A tensor with its float32 or float64 values in another dtype."""
    values = stored.values
    if values is None or values.dtype not in (torch.float32, torch.float64):
        return stored
    rounded = values.to(dtype)
    if bool((rounded.isinf() & values.isfinite()).any()):
        raise _stored_dtype_error(f"{dtype}, and {name!r} has values up to {float(values.abs().max()):.3g}")
    return replace(stored, values=rounded)


def _stored_dtype_error(found: str) -> CheckpointError:
    return CheckpointError(
        "`dtype` must be None, torch.float16 or torch.bfloat16, hold the values, and go without `resumable`.",
        found,
        "leave `dtype` out to store the values as they are; bfloat16 reaches as far as float32",
    )


def _check(model: nn.Module) -> None:
    """Raise unless a compact file can hold a model."""
    check_modules(model)
    for ref in tensors_of(model):
        tensor = ref.parameter
        if is_lazy(tensor):
            raise not_storable(ref.name, "not initialised yet", "run the model once before")
        if tensor.is_meta:
            raise not_storable(ref.name, "on the meta device, without values", "load values before")
        if tensor.layout != torch.strided:
            raise not_storable(ref.name, f"of layout {tensor.layout}", "make it dense with .to_dense()")
        if dtype_name(tensor.dtype) not in (*NATIVE, *AS_BYTES):
            raise not_storable(ref.name, f"of dtype {tensor.dtype}", "convert it to another dtype")
        if ref.is_foreign and ref.mask is not None:
            raise parametrized_by_another(ref.name, "another package, and pruned beneath")
        if ref.interspace is not None:
            check_regular(ref.interspace.basis, ref.name)


@torch.no_grad()
def load(model: Model, path: FilePath) -> Model:
    """Load a compressed checkpoint into a model of the same architecture, for example a freshly built one.

    Restores every saved value bit for bit, the space of every layer, shared bases, and masks (those of a pruning
    library become masks of ours). Layers whose channels were removed get the sizes in the file. Tensors get the dtype
    in the file, and keep the device and the memory format of the model. Inverse: `save`.

    Args:
        model: changed in place; plain, or in the interspace and masked in any way: parametrizations and masks that are
            not in the file are removed. Parameter objects stay, so an optimizer goes on training them, except for
            Parameters on the meta device, which are replaced by ones on the CPU, and for those that are tied in the
            file. Training modes and requires_grad do not change, except for bases.
        path: of a file that `save` has written.

    Returns:
        The model.

    Raises:
        CheckpointError: the file is corrupt, inconsistent, or no compact file; or the model has other tensors, smaller
            ones, or some that cannot be saved.
        ConversionError: someone else's parametrization sits on top of ours. In all cases the model is unchanged.

    >>> import tempfile
    >>> from ip_plugin import interspace, masks, set_masks
    >>> model = set_masks(interspace(nn.Conv2d(1, 1, (1, 3))), {"": torch.tensor([[[[True, False, False]]]])})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(model, f"{folder}/conv.safetensors")
    ...     loaded = load(nn.Conv2d(1, 1, (1, 3)), f"{folder}/conv.safetensors")
    >>> torch.equal(loaded.weight, model.weight), masks(loaded)
    (True, {'': tensor([[[[ True, False, False]]]])})
    """
    with opened(Path(path)) as file:
        Plan(inner(model), file).carry_out()
    watch(model)
    return model
