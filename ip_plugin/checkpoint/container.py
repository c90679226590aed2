"""The file format of compact files: safetensors with a JSON description and a checksum of the whole file."""

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
from ..errors import BasisError
from ..utils.atomic import replacing
from .index_encoding import Positions, decode, invalid_file, require
from .schema import Description, Record

#: Dtypes that safetensors has a name for.
NATIVE = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
}  # fmt: skip
#: Dtypes that are stored as bytes, because not all versions of safetensors have names for them.
AS_BYTES = ("complex64", "complex128", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
_KEY = "ip_plugin"
#: What precedes the digits of the checksum, in a JSON text within a JSON text.
_MARK = rb"{\"crc32\":\""
_DIGITS = 8
_READ_AT_ONCE = 1 << 22


def part(name: str, what: str) -> str:
    """The key of a part of a tensor in a file: "values", "positions", "mask", or "" for the whole tensor."""
    return f"{name}/{what}" if what else name


def basis_name(number: int) -> str:
    """The key of a basis in a file."""
    return f"/basis/{number}"


def dtype_name(dtype: torch.dtype) -> str:
    """Torch's name of a dtype, without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def native(values: Tensor) -> Tensor:
    """Values as safetensors accepts them: on the CPU, row-major, and as bytes if it has no name for their dtype."""
    values = values.detach().cpu()
    if dtype_name(values.dtype) not in NATIVE:
        return values.reshape(-1).view(torch.uint8)
    return values.contiguous()


def write(path: Path, tensors: Mapping[str, Tensor], description: Description) -> None:
    """Write a compact file, atomically, of tensors by key, as `native` returns them."""
    save_file = safetensors().torch.save_file
    text = json.dumps({"crc32": "0" * _DIGITS, **description.to_json()}, separators=(",", ":"))
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():  # safetensors refuses tensors that share memory
        storage = tensor.untyped_storage()
        apart[name] = tensor.clone() if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen else tensor
        seen.add(storage.data_ptr())
    with replacing(path) as temporary:
        save_file(apart, temporary, metadata={_KEY: text})
        seal(temporary)


def seal(path: Path) -> None:
    """Write the checksum of a compact file into its description, which has zeros in its place."""
    with open(path, "r+b") as file:
        start = _digits_at(file)
        assert start is not None
        digits = _checksum(file, start)
        file.seek(start)
        file.write(digits)


def _digits_at(file: IO[bytes]) -> int | None:
    """The offset of the digits of the checksum; None if the file has none."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        return None
    mark = file.read(length).find(_MARK)
    return None if mark < 0 or mark + len(_MARK) + _DIGITS > length else 8 + mark + len(_MARK)


def _checksum(file: IO[bytes], start: int) -> bytes:
    """The checksum of the whole file, with zeros in place of the digits at `start`."""
    file.seek(0)
    checksum = zlib.crc32(b"0" * _DIGITS, zlib.crc32(file.read(start)))
    file.seek(start + _DIGITS)
    while data := file.read(_READ_AT_ONCE):
        checksum = zlib.crc32(data, checksum)
    return b"%08x" % checksum


class CompactFile:
    """An open compact file of `size` bytes, with a valid checksum and a description that fits its tensors."""

    def __init__(self, content: Any, size: int) -> None:
        self._content, self.size = content, size
        self._names, expected = set(content.keys()), set()
        self.description = Description.from_json((content.metadata() or {}).get(_KEY, ""))
        for i in range(len(self.description.bases)):
            expected.add(basis_name(i))
            dtype, shape = self._header(basis_name(i))
            square = len(shape) == 2 and shape[0] == shape[1]
            require(square and dtype in ("F16", "BF16", "F32", "F64"), f"basis {i}: {dtype} of shape {shape}")
        for name, record in self.description.tensors.items():
            for what, required_dtype, required_shape in _parts(record):
                key = part(name, what)
                expected.add(key)
                dtype, shape = self._header(key)
                fits = len(shape) == 1 if required_shape is None else shape == required_shape
                wrong = f"{dtype} of shape {shape} for {record.dtype} of {record.shape}"
                require(fits and dtype == required_dtype, wrong, key)
            count = self.count(name) if record.positions else 0
            require(count <= record.numel, f"{count} values for {record.numel} entries", name)
        others = ", ".join(sorted(self._names - expected))[:200]
        require(self._names == expected, f"tensors without a description: {others}")

    def _header(self, key: str) -> tuple[str, tuple[int, ...]]:
        """The dtype (in the name of safetensors) and the shape of a tensor of the file."""
        require(key in self._names, f"no tensor {key!r}")
        piece = self._content.get_slice(key)
        return piece.get_dtype(), tuple(piece.get_shape())

    def tensor(self, key: str) -> Tensor:
        """A tensor of the file by its key, in the file's memory: copy it before the file is closed."""
        tensor: Tensor = self._content.get_tensor(key)
        return tensor

    def basis(self, number: int) -> Tensor:
        """A copy of a basis, ``(N, N)``, finite and not singular."""
        basis = self.tensor(basis_name(number)).clone()
        try:
            check_regular(basis, basis_name(number))
        except BasisError:
            raise invalid_file(f"basis {number}, which is not finite, or is singular") from None
        return basis

    def basis_size(self, number: int) -> int:
        """The number of filters of a basis."""
        return self._header(basis_name(number))[1][0]

    def count(self, name: str) -> int:
        """The number of values of a tensor in the file."""
        record = self.description.tensors[name]
        if record.tied:
            return self.count(record.tied)
        if not record.positions:
            return record.numel
        (size,) = self._header(part(name, "values"))[1]
        stored = record.stored or record.dtype
        return size if stored in NATIVE else size // dtype_of(stored).itemsize

    def stored_values(self, name: str) -> Tensor:
        """The values of a tensor in the file, in its memory and with the dtype that they have there."""
        record = self.description.tensors[name]
        values = self.tensor(part(name, "values" if record.positions else ""))
        stored = record.stored or record.dtype
        if stored not in NATIVE:
            values = values.clone().view(dtype_of(stored))  # a copy, which is aligned
        return values if record.positions else values.reshape(record.shape)

    def positions(self, name: str) -> Tensor | None:
        """The positions of the values of a tensor, int64; None if all values are stored."""
        record = self.description.tensors[name]
        return self._index(name, "positions", record.positions, self.count(name))

    def kept(self, name: str) -> Tensor | None:
        """The positions that a mask keeps, int64, if they are not those of the values; None if it keeps everything."""
        return self._index(name, "mask", self.description.tensors[name].mask, None)

    def _index(self, name: str, what: str, coding: str, count: int | None) -> Tensor | None:
        numel = self.description.tensors[name].numel
        if coding in ("", "all"):
            require(count in (None, numel), f"{count} values for {numel} entries", name)
            return None
        return decode(Positions(coding, self.tensor(part(name, what))), count, numel, name)

    def nbytes(self, name: str) -> int:
        """Bytes of all parts of a tensor."""
        return sum(self.tensor(part(name, what)).nbytes for what, _, _ in _parts(self.description.tensors[name]))


def _parts(record: Record) -> Iterator[tuple[str, str, tuple[int, ...] | None]]:
    """The parts of a tensor in a file: (name of the part, its dtype, its shape or None for any vector)."""
    if not record.tied:
        stored = record.stored or record.dtype
        itemsize = dtype_of(stored).itemsize
        dtype_of(record.dtype)  # is checked
        if record.positions:
            yield "values", NATIVE.get(stored, "U8"), None
        else:
            yield "", NATIVE.get(stored, "U8"), record.shape if stored in NATIVE else (record.numel * itemsize,)
    for what in ("positions", "mask"):
        if getattr(record, what) not in ("", "all", "positions"):
            yield what, "U8", None


def dtype_of(name: str) -> torch.dtype:
    """The dtype of this name, if a file can hold it."""
    require(name in NATIVE or name in AS_BYTES, f"dtype {name[:80]!r}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@contextmanager
def opened(path: Path) -> Iterator[CompactFile]:
    """Open a compact file; its tensors are read on demand.

    Raises:
        CheckpointError: it is corrupt, inconsistent, or no compact file.
        OSError: there is no such file, or it cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = _digits_at(file)
        if start is None:
            raise invalid_file(f"{path}, which `ip_plugin.save` has not written", "pass a file that it has written")
        file.seek(start)
        digits = file.read(_DIGITS)
        require(digits == _checksum(file, start), f"{path}, whose checksum is wrong: it is corrupt or truncated")
    module = safetensors()
    try:
        content = module.safe_open(path, framework="pt")
    except module.SafetensorError as error:
        raise invalid_file(f"{path}, which safetensors cannot read: {error}") from None
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
