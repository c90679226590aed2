"""What a compact file says of its tensors, in JSON: written from records, and read strictly into them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, TypeVar

from ..basis.bases import CONSTRAINTS, Constraint
from ..errors import InvalidFileError
from ..utils.validation import is_count
from .index_encoding import CODINGS

#: Version of the format. A file of another version is refused.
FORMAT = 1
_MOST = 2**62


@dataclass(frozen=True)
class Record:
    """One tensor of the plain model.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor, as torch names it without ``torch.``.
        stored: dtype of its values in the file, where it is another one.
        buffer: whether it is a buffer.
        tied: name of the tensor that has the values; empty if it has them itself.
        positions: coding of the positions of its values; empty if they are all there.
        mask: coding of its mask; ``"positions"`` if that is what `positions` says; empty without a mask.
        basis: number of its basis; None if it is spatial.
    """

    shape: tuple[int, ...]
    dtype: str
    stored: str = ""
    buffer: bool = False
    tied: str = ""
    positions: str = ""
    mask: str = ""
    basis: int | None = None

    @property
    def numel(self) -> int:
        """Entries of the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Basis:
    """A filter basis.

    Attributes:
        trained: whether it is.
        constraint: see `ip_plugin.basis.constrained`; files from before there were constraints have none.
    """

    trained: bool
    constraint: Constraint = "none"


@dataclass(frozen=True)
class Description:
    """Everything that a compact file says.

    Attributes:
        tensors: in model order.
        bases: those that records refer to, by number.
        groups: of convolutions that have more than one, by module name.
    """

    tensors: Mapping[str, Record]
    bases: tuple[Basis, ...] = ()
    groups: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists; what is as ever is left out."""
        return {
            "format": FORMAT,
            "tensors": {name: _short(record) for name, record in self.tensors.items()},
            "bases": [asdict(basis) for basis in self.bases],
            "groups": dict(self.groups),
        }

    @staticmethod
    def from_json(text: str) -> Description:
        """Inverse of `to_json`.

        Raises:
            InvalidFileError: anything that `to_json` would not have written.
        """
        try:
            content = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            if isinstance(error, InvalidFileError):
                raise
            raise InvalidFileError(f"a description that is no JSON: {error}") from None
        if not isinstance(content, dict) or not is_count(content.get("format"), 1):
            raise InvalidFileError("a description without a format version")
        if content["format"] != FORMAT:
            raise InvalidFileError(
                f"format version {content['format']}, and this version of ip_plugin reads version {FORMAT}",
                "update ip_plugin",
            )
        if set(content) != {"crc32", "format", "tensors", "bases", "groups"}:
            raise InvalidFileError(f"a description of {', '.join(sorted(map(repr, content)))}")
        tensors, bases, groups = content["tensors"], content["bases"], content["groups"]
        if not (isinstance(tensors, dict) and isinstance(bases, list) and isinstance(groups, dict)):
            raise InvalidFileError("a description whose parts are of other kinds")
        for name, count in groups.items():
            _require(is_count(count, 1), f"groups {count!r}", name)
        found = Description(
            {name: _record(name, record) for name, record in tensors.items()},
            tuple(_typed(Basis, f"basis {i}", basis) for i, basis in enumerate(bases)),
            groups,
        )
        for number, basis in enumerate(found.bases):
            _require(basis.constraint in CONSTRAINTS, f"the constraint {basis.constraint[:80]!r}", f"basis {number}")
        for name, record in found.tensors.items():
            _check(name, record, found)
        used = {record.basis for record in found.tensors.values()} - {None}
        if used != set(range(len(bases))):
            raise InvalidFileError(f"{len(bases)} bases, of which tensors use {len(used)}")
        return found


def _short(record: Record) -> dict[str, Any]:
    return {
        each.name: getattr(record, each.name)
        for each in fields(record)
        if each.default is MISSING or getattr(record, each.name) != each.default
    }


def _record(name: str, content: object) -> Record:
    if isinstance(content, dict) and isinstance(content.get("shape"), list):
        shape = content["shape"]
        valid = len(shape) <= 64 and all(is_count(size) and size < _MOST for size in shape)
        _require(valid and math.prod(shape) < _MOST, f"shape {str(shape)[:80]}", name)
        content = {**content, "shape": tuple(shape)}
    return _typed(Record, name, content)


T = TypeVar("T", Record, Basis)
_KINDS = {"shape": tuple, "buffer": bool, "basis": int, "trained": bool}


def _typed(cls: type[T], name: str, content: object) -> T:
    """A record of which every field is there that must be, and of its kind."""
    _require(isinstance(content, dict), f"a record that is a {type(content).__name__}", name)
    assert isinstance(content, dict)
    needed = {each.name for each in fields(cls) if each.default is MISSING}
    allowed = {each.name for each in fields(cls)}
    _require(needed <= set(content) <= allowed, f"a record of {', '.join(sorted(map(repr, content)))[:200]}", name)
    for key, value in content.items():
        _require(type(value) is _KINDS.get(key, str), f"{key} {str(value)[:80]!r}", name)
    return cls(**content)


def _check(name: str, record: Record, all_of: Description) -> None:
    """Refuse a record whose fields contradict each other."""
    _require(record.positions in ("", *CODINGS), f"positions coded as {record.positions!r}", name)
    _require(record.mask in ("", "positions", *CODINGS), f"a mask coded as {record.mask!r}", name)
    _require(record.mask != "positions" or record.positions != "", "a mask that is where values are not", name)
    if record.buffer:
        plain = not (record.positions or record.mask or record.stored) and record.basis is None
        _require(plain, "a buffer with positions, a mask or a basis", name)
    half = record.stored in ("float16", "bfloat16") and record.dtype in ("float32", "float64")
    _require(record.stored == "" or half, f"{record.dtype} stored as {record.stored!r}", name)
    if record.basis is not None:
        _require(0 <= record.basis < len(all_of.bases), f"basis {record.basis} of {len(all_of.bases)}", name)
    if record.tied:
        _require(not (record.positions or record.stored), "values of its own, and those of another tensor", name)
        owner = all_of.tensors.get(record.tied)
        _require(owner is not None and not owner.tied, f"the values of {record.tied!r}, which has none", name)
        assert owner is not None
        alike = (owner.shape, owner.dtype, owner.buffer) == (record.shape, record.dtype, record.buffer)
        _require(alike and owner.mask != "positions", f"the values of {record.tied!r}, which has others", name)


def _require(condition: bool, found: str, name: str) -> None:
    if not condition:
        raise InvalidFileError(f"{name!r}: {found}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidFileError(f"{twice!r} twice")
    return content


def _no_constant(name: str) -> None:
    raise InvalidFileError(f"the number {name}")
