"""The JSON description of the tensors in a compact file, and its strict validation."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, TypeVar

from ..basis.bases import CONSTRAINTS, Constraint
from ..errors import CheckpointError
from ..utils.validation import is_count
from .index_encoding import CODINGS, invalid_file, require

#: Version of the format. Files of other versions are rejected.
FORMAT = 1
_MOST = 2**62


@dataclass(frozen=True)
class Record:
    """One tensor of the plain model.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor, in torch's name without ``torch.``.
        stored: dtype of its values in the file, if it differs.
        buffer: whether it is a buffer.
        tied: name of the tied tensor that has the values; empty if it has values itself.
        positions: coding of the positions of its values; empty if all values are stored.
        mask: coding of its mask; ``"positions"`` if the mask equals the positions; empty without a mask.
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
        """Number of entries of the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Basis:
    """A filter basis.

    Attributes:
        trained: whether it requires gradients.
        constraint: see `ip_plugin.basis.constrained`; "none" in files of versions without constraints.
    """

    trained: bool
    constraint: Constraint = "none"


@dataclass(frozen=True)
class Description:
    """The description of a compact file.

    Attributes:
        tensors: records by name, in model order.
        bases: records of the bases, by number.
        groups: {module name: groups} of grouped convolutions.
    """

    tensors: Mapping[str, Record]
    bases: tuple[Basis, ...] = ()
    groups: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists; default values are left out."""
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
            CheckpointError: the text is nothing that `to_json` writes.
        """
        try:
            content = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise invalid_file(f"a description that is no JSON: {error}") from None
        if not isinstance(content, dict) or not is_count(content.get("format"), 1):
            raise invalid_file("a description without a format version")
        if content["format"] != FORMAT:
            raise invalid_file(
                f"format version {content['format']}, and this version of ip_plugin reads version {FORMAT}",
                "update ip_plugin",
            )
        keys = {"crc32", "format", "tensors", "bases", "groups"}
        require(set(content) == keys, f"a description of {', '.join(sorted(map(repr, content)))}")
        tensors, bases, groups = content["tensors"], content["bases"], content["groups"]
        types = isinstance(tensors, dict) and isinstance(bases, list) and isinstance(groups, dict)
        require(types, "a description whose parts are of other types")
        for name, count in groups.items():
            require(is_count(count, 1), f"groups {count!r}", name)
        description = Description(
            {name: _record(name, record) for name, record in tensors.items()},
            tuple(_typed(Basis, f"basis {i}", basis) for i, basis in enumerate(bases)),
            groups,
        )
        for number, basis in enumerate(description.bases):
            require(basis.constraint in CONSTRAINTS, f"the constraint {basis.constraint[:80]!r}", f"basis {number}")
        for name, record in description.tensors.items():
            _check(name, record, description)
        used = {record.basis for record in description.tensors.values()} - {None}
        require(used == set(range(len(bases))), f"{len(bases)} bases, of which tensors use {len(used)}")
        return description


def _short(record: Record) -> dict[str, Any]:
    """The fields of a record that have no default value."""
    return {field.name: value for field in fields(record) if (value := getattr(record, field.name)) != field.default}


def _record(name: str, content: object) -> Record:
    if isinstance(content, dict) and isinstance(content.get("shape"), list):
        shape = content["shape"]
        valid = len(shape) <= 64 and all(is_count(size) and size < _MOST for size in shape)
        require(valid and math.prod(shape) < _MOST, f"shape {str(shape)[:80]}", name)
        content = {**content, "shape": tuple(shape)}
    return _typed(Record, name, content)


T = TypeVar("T", Record, Basis)
_TYPES = {"shape": tuple, "buffer": bool, "basis": int, "trained": bool}


def _typed(cls: type[T], name: str, content: object) -> T:
    """A record with all required fields, each of its type."""
    require(isinstance(content, dict), f"a record that is a {type(content).__name__}", name)
    assert isinstance(content, dict)
    required = {field.name for field in fields(cls) if field.default is MISSING}
    allowed = {field.name for field in fields(cls)}
    require(required <= set(content) <= allowed, f"a record of {', '.join(sorted(map(repr, content)))[:200]}", name)
    for key, value in content.items():
        require(type(value) is _TYPES.get(key, str), f"{key} {str(value)[:80]!r}", name)
    return cls(**content)


def _check(name: str, record: Record, description: Description) -> None:
    """Raise CheckpointError if the fields of a record contradict each other."""
    require(record.positions in ("", *CODINGS), f"positions coded as {record.positions!r}", name)
    require(record.mask in ("", "positions", *CODINGS), f"a mask coded as {record.mask!r}", name)
    require(record.mask != "positions" or record.positions != "", "a mask equal to positions that are missing", name)
    if record.buffer:
        plain = not (record.positions or record.mask or record.stored) and record.basis is None
        require(plain, "a buffer with positions, a mask or a basis", name)
    half = record.stored in ("float16", "bfloat16") and record.dtype in ("float32", "float64")
    require(record.stored == "" or half, f"{record.dtype} stored as {record.stored!r}", name)
    if record.basis is not None:
        bases = len(description.bases)
        require(0 <= record.basis < bases, f"basis {record.basis} of {bases}", name)
    if record.tied:
        require(not (record.positions or record.stored), "values of its own, and those of another tensor", name)
        owner = description.tensors.get(record.tied)
        require(owner is not None and not owner.tied, f"the values of {record.tied!r}, which has none", name)
        assert owner is not None
        alike = (owner.shape, owner.dtype, owner.buffer) == (record.shape, record.dtype, record.buffer)
        require(alike and owner.mask != "positions", f"the values of {record.tied!r}, which differs", name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, count in Counter(name for name, _ in pairs).items():
        require(count == 1, f"{name!r} twice")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise invalid_file(f"the number {name}")
