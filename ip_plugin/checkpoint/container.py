"""A compact file: safetensors, with a description and a checksum of everything in it."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import torch
from torch import Tensor

from ..basis.bases import check_regular
from ..errors import InvalidBasisError, InvalidFileError
from ..utils.atomic import replacing
from .index_encoding import Positions, decode
from .schema import Description, Record

#: Dtypes that safetensors has a name for.
NATIVE = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
}  # fmt: skip
#: Dtypes that are stored as bytes: not all versions of safetensors have names for them.
AS_BYTES = ("complex64", "complex128", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
_KEY = "ip_plugin"
#: Before the digits of the checksum, in a JSON text within a JSON text.
_MARK = rb"{\"crc32\":\""
_DIGITS = 8
_READ_AT_ONCE = 1 << 22


def part(name: str, what: str) -> str:
    """What a part of a tensor is called in a file: its values, positions or mask."""
    return f"{name}/{what}"


def basis_name(number: int) -> str:
    """What a basis is called in a file."""
    return f"/basis/{number}"


def dtype_name(dtype: torch.dtype) -> str:
    """As torch names it, without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def native(values: Tensor) -> Tensor:
    """Values as safetensors takes them: on the CPU, row-major, and as bytes if it has no name for their dtype."""
    values = values.detach().cpu()
    if dtype_name(values.dtype) not in NATIVE:
        return values.reshape(-1).view(torch.uint8)
    return values.contiguous()


def write(path: Path, tensors: Mapping[str, Tensor], description: Description) -> None:
    """Write a compact file, whole or not at all.

    Args:
        path: what is there is replaced.
        tensors: as `native` gives them.
        description: what they are.
    """
    save_file = safetensors().torch.save_file
    text = json.dumps({"crc32": "0" * _DIGITS, **description.to_json()}, separators=(",", ":"))
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():  # safetensors refuses tensors that share memory
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        apart[name] = tensor if alone else tensor.clone()
        seen.add(storage.data_ptr())
    with replacing(path) as temporary:
        save_file(apart, temporary, metadata={_KEY: text})
        with open(temporary, "r+b") as file:
            start = _digits_at(file)
            assert start is not None
            digits = _checksum(file, start)
            file.seek(start)
            file.write(digits)


def _digits_at(file: IO[bytes]) -> int | None:
    """Where the digits of the checksum stand; None if the file has none."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        return None
    found = file.read(length).find(_MARK)
    return None if found < 0 or found + len(_MARK) + _DIGITS > length else 8 + found + len(_MARK)


def _checksum(file: IO[bytes], start: int) -> bytes:
    """Of the whole file, with zeros where the digits of the checksum are."""
    file.seek(0)
    checksum = zlib.crc32(b"0" * _DIGITS, zlib.crc32(file.read(start)))
    file.seek(start + _DIGITS)
    while data := file.read(_READ_AT_ONCE):
        checksum = zlib.crc32(data, checksum)
    return b"%08x" % checksum


class CompactFile:
    """An open compact file whose checksum is right, and whose description fits its tensors.

    Attributes:
        description: what it says of them.
        size: bytes of the file.
    """

    def __init__(self, content: Any, size: int) -> None:
        self._content, self.size = content, size
        self._names = set(content.keys())
        self.description = Description.from_json((content.metadata() or {}).get(_KEY, ""))
        self._check()

    def _check(self) -> None:
        """Refuse a file whose tensors are not those of the description."""
        expected = {basis_name(i) for i in range(len(self.description.bases))}
        for i in range(len(self.description.bases)):
            dtype, shape = self._found(basis_name(i))
            if dtype not in ("F16", "BF16", "F32", "F64") or len(shape) != 2 or shape[0] != shape[1]:
                raise InvalidFileError(f"basis {i}: {dtype} of shape {shape}")
        for name, record in self.description.tensors.items():
            for what, kind, wanted in _parts(record):
                key = part(name, what) if what else name
                expected.add(key)
                dtype, size = self._found(key)
                if dtype != kind or (size != wanted if wanted is not None else len(size) != 1):
                    raise InvalidFileError(f"{key!r}: {dtype} of shape {size} for {record.dtype} of {record.shape}")
            if record.positions and self.count(name) > record.numel:
                raise InvalidFileError(f"{name!r}: {self.count(name)} values for {record.numel} entries")
        if self._names != expected:
            raise InvalidFileError(f"tensors that nothing describes: {', '.join(sorted(self._names - expected))[:200]}")

    def _found(self, key: str) -> tuple[str, tuple[int, ...]]:
        if key not in self._names:
            raise InvalidFileError(f"no tensor {key!r}")
        piece = self._content.get_slice(key)
        return piece.get_dtype(), tuple(piece.get_shape())

    def tensor(self, key: str) -> Tensor:
        """A tensor of the file by its own name, in the file's memory: copy it before the file is closed."""
        found: Tensor = self._content.get_tensor(key)
        return found

    def basis(self, number: int) -> Tensor:
        """A basis, ``(N, N)``: finite and not singular; a copy."""
        found = self.tensor(basis_name(number)).clone()
        try:
            check_regular(found, basis_name(number))
        except InvalidBasisError:
            raise InvalidFileError(f"basis {number}, which is not finite, or is singular") from None
        return found

    def basis_size(self, number: int) -> int:
        """How many filters a basis has."""
        return self._found(basis_name(number))[1][0]

    def count(self, name: str) -> int:
        """How many values of a tensor the file holds."""
        record = self.description.tensors[name]
        if record.tied:
            return self.count(record.tied)
        if not record.positions:
            return record.numel
        (found,) = self._found(part(name, "values"))[1]
        stored = record.stored or record.dtype
        return found if stored in NATIVE else found // dtype_of(stored).itemsize

    def stored_values(self, name: str) -> Tensor:
        """The values of a tensor that the file holds, in the file's memory and of the dtype there."""
        record = self.description.tensors[name]
        found = self.tensor(part(name, "values") if record.positions else name)
        stored = record.stored or record.dtype
        if stored not in NATIVE:
            found = found.clone().view(dtype_of(stored))  # a copy: bytes of a file may lie anywhere
        return found if record.positions else found.reshape(record.shape)

    def positions(self, name: str) -> Tensor | None:
        """Where the values of a tensor are, int64; None if they are all there."""
        record = self.description.tensors[name]
        return self._index(name, "positions", record.positions, self.count(name))

    def kept(self, name: str) -> Tensor | None:
        """What a mask that is not where the values are keeps, int64; None if that is everything."""
        return self._index(name, "mask", self.description.tensors[name].mask, None)

    def _index(self, name: str, what: str, coding: str, count: int | None) -> Tensor | None:
        numel = self.description.tensors[name].numel
        if coding in ("", "all"):
            if count not in (None, numel):
                raise InvalidFileError(f"{name!r}: {count} values for {numel} entries")
            return None
        return decode(Positions(coding, self.tensor(part(name, what))), count, numel, name)

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor's parts."""
        total = 0
        for what, _, _ in _parts(self.description.tensors[name]):
            found = self.tensor(part(name, what) if what else name)
            total += found.numel() * found.element_size()
        return total


def _parts(record: Record) -> Iterator[tuple[str, str, tuple[int, ...] | None]]:
    """What a file holds of a tensor: which part (empty: the whole tensor), its dtype there, its shape (None: any)."""
    if not record.tied:
        stored = record.stored or record.dtype
        is_native = stored in NATIVE
        kind = NATIVE.get(stored, "U8")
        itemsize = dtype_of(stored).itemsize
        dtype_of(record.dtype)
        if record.positions:
            yield "values", kind, None
        else:
            yield "", kind, record.shape if is_native else (record.numel * itemsize,)
    for what in ("positions", "mask"):
        if getattr(record, what) not in ("", "all", "positions"):
            yield what, "U8", None


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name, if a file can hold it."""
    if name not in NATIVE and name not in AS_BYTES:
        raise InvalidFileError(f"dtype {name[:80]!r}")
    found: torch.dtype = getattr(torch, name)
    return found


@contextmanager
def opened(path: Path) -> Iterator[CompactFile]:
    """Open a compact file; its tensors are read when they are asked for.

    Raises:
        InvalidFileError: it is none, is damaged, or contradicts itself.
        OSError: there is no such file, or it cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = _digits_at(file)
        if start is None:
            raise InvalidFileError(f"{path}, which `ip_plugin.save` has not written", "pass a file that it has written")
        file.seek(start)
        digits = file.read(_DIGITS)
        if digits != _checksum(file, start):
            raise InvalidFileError(f"{path}, whose checksum is wrong: it was damaged or cut off")
    module = safetensors()
    try:
        content = module.safe_open(path, framework="pt")
    except module.SafetensorError as error:
        raise InvalidFileError(f"{path}, which safetensors cannot read: {error}") from None
    with content:
        yield CompactFile(content, size)


def safetensors() -> ModuleType:
    """The package safetensors, imported when a file is written or read."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        remedy = "run: pip install 'safetensors[torch]'"
        raise ImportError(f"compact files need safetensors and numpy ({error}); {remedy}") from error
    return safetensors
