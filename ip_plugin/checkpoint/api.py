"""Compact checkpoints: `save` and `load`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from ..basis.bases import check_regular
from ..core.optimizer import watch
from ..core.tensor_ref import Model, inner, tensors_of
from ..errors import AlreadyParametrizedError, NotStorableError, StoredDtypeError
from .container import AS_BYTES, NATIVE, basis_name, dtype_name, native, opened, part, write
from .contents import check_modules, packed
from .reader import Plan
from .schema import Basis, Description, Record

FilePath: TypeAlias = str | os.PathLike[str]


@torch.no_grad()
def save(model: nn.Module, path: FilePath, *, dtype: torch.dtype | None = None, resumable: bool = False) -> None:
    """Save a pruned model in a compact file: non-zero values, their positions, each basis once.

    For models in either space, with masks of ours or of `torch.nn.utils.prune`, or baked with zeros in the weights; of
    prunable layers and of masked tensors only what counts is stored, everything else as it is. Save before you bake:
    `bake` makes the kernels of the interspace dense. Inverse: `load`.

    The file is one of safetensors, with a description in JSON and a checksum: nothing in it is ever executed. It is
    written beside `path` and renamed, so that the old file or the new one is there at any moment.

    Args:
        model: not changed. DistributedDataParallel, DataParallel and what torch.compile has made are looked into.
        path: what is there is replaced.
        dtype: None stores every value bit for bit (a zero of a prunable layer that no mask keeps loses its sign);
            torch.float16 or torch.bfloat16 rounds the weights and coefficients of prunable layers (not bases, biases,
            norms and buffers). They are loaded in the dtype that they had.
        resumable: store what is behind masks as well, and every sign of a zero, so that training goes on bit for bit
            (save the optimizer's own state_dict beside it). Without it, values behind masks are zeros when loaded.

    Raises:
        NotStorableError: something in the model is no tensor with values.
        InvalidBasisError: a basis that is not finite, or singular.
        AlreadyParametrizedError: someone else's parametrization sits on top of ours.
        StoredDtypeError: `dtype` is another one, the values do not fit into it, or it is to be resumable.
            In all cases the file that was there is as it was.

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
        raise StoredDtypeError(f"dtype={dtype}")
    if dtype is not None and resumable:
        raise StoredDtypeError(f"dtype={dtype}, and resumable=True, which keeps every bit")
    model = inner(model)
    _check(model)
    tensors: dict[str, Tensor] = {}
    records: dict[str, Record] = {}
    owners: dict[int, str] = {}
    numbers: dict[int, int] = {}
    known: list[Basis] = []
    for ref, stored in packed(model, resumable=resumable):
        values, space = stored.values, ref.interspace
        number = None
        if space is not None:
            number = numbers.setdefault(id(space.basis), len(known))
            if number == len(known):
                known.append(Basis(space.basis.requires_grad, space.constraint))
                tensors[basis_name(number)] = native(space.basis)
        parts: dict[str, Tensor] = {}
        stored_dtype = ""
        if values is not None:
            if dtype is not None and ref.is_prunable and values.dtype in (torch.float32, torch.float64):
                values, stored_dtype = _rounded(values, dtype, ref.name), dtype_name(dtype)
            parts["" if stored.positions is None else "values"] = values
        if stored.positions is not None:
            parts["positions"] = stored.positions.data
        if stored.mask is not None and stored.mask is not stored.positions:
            parts["mask"] = stored.mask.data
        owner = owners.setdefault(id(ref.parameter), ref.name)
        records[ref.name] = Record(
            shape=tuple(ref.parameter.shape),
            dtype=dtype_name(ref.parameter.dtype),
            stored=stored_dtype,
            buffer=ref.is_buffer,
            tied="" if owner == ref.name else owner,
            positions="" if stored.positions is None else stored.positions.coding,
            mask="" if stored.mask is None else "positions" if stored.mask is stored.positions else stored.mask.coding,
            basis=number,
        )
        for what, tensor in parts.items():
            key = part(ref.name, what) if what else ref.name
            if what in ("positions", "mask") and not tensor.numel() and getattr(records[ref.name], what) == "all":
                continue
            if key in tensors:
                raise NotStorableError(key, "two tensors of this name", "rename the module or parameter")
            tensors[key] = native(tensor)
    convolutions = ((name, module) for name, module in model.named_modules() if isinstance(module, _ConvNd))
    groups = {name: module.groups for name, module in convolutions if module.groups > 1}
    write(Path(path), tensors, Description(records, tuple(known), groups))


def _rounded(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    rounded = values.to(dtype)
    if bool((rounded.isinf() & values.isfinite()).any()):
        raise StoredDtypeError(f"{dtype}, and {name!r} has values up to {float(values.abs().max()):.3g}")
    return rounded


def _check(model: nn.Module) -> None:
    """Raise unless a compact file can hold a model."""
    check_modules(model)
    for ref in tensors_of(model):
        tensor = ref.parameter
        if is_lazy(tensor):
            raise NotStorableError(ref.name, "not initialised yet", "run the model once before")
        if tensor.is_meta:
            raise NotStorableError(ref.name, "on the meta device, without values", "load values before")
        if tensor.layout != torch.strided:
            raise NotStorableError(ref.name, f"of layout {tensor.layout}", "make it dense with .to_dense()")
        if dtype_name(tensor.dtype) not in (*NATIVE, *AS_BYTES):
            raise NotStorableError(ref.name, f"of dtype {tensor.dtype}", "convert it to another dtype")
        if ref.is_foreign and ref.mask is not None:
            raise AlreadyParametrizedError(ref.name, "another package, and pruned beneath")
        if ref.interspace is not None:
            check_regular(ref.interspace.basis, ref.name)


@torch.no_grad()
def load(model: Model, path: FilePath) -> Model:
    """Load a compact file into a model of the same architecture, freshly built: afterwards it is what was saved.

    Every value is the one that was saved, bit for bit; layers are in the space that they were in, bases that were
    shared are shared, and masks (the hosts' too) are masks of ours. Layers whose channels were cut get the sizes of the
    file. Tensors have the dtype of the file, and the device and the memory format of the model. Inverse: `save`.

    Args:
        model: changed in place; plain, or in the interspace and masked in any way: then what the file does not have is
            taken off. Parameter objects stay, so an optimizer goes on; but for Parameters on the meta device, which
            give way to ones on the CPU, and for those that the file ties. Modes and requires_grad are left as they
            are, except that of bases.
        path: of a file that `save` has written.

    Returns:
        The model.

    Raises:
        InvalidFileError: the file is damaged, is none of ours, or contradicts itself.
        WrongModelError: the model has other tensors, or smaller ones. It is an InvalidFileError, too.
        NotStorableError, AlreadyParametrizedError: the model is one that `save` would refuse.
            In all cases the model is as it was.

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
