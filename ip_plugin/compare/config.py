"""What a study runs: its schema, its TOML file, and the grid of its cells.

Every field is described once, here: the commented file of ``ip-plugin compare --write-config``, the options of the
command and its error messages are made from these models.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from ip_plugin.basis.bases import Constraint
from ip_plugin.errors import StudyError, listed

from . import criteria as known_criteria

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: The criterion of the cells that are not pruned; they are in every study.
DENSE = "dense"
#: Fields of a study that name what is run, and not how: results of other values may lie in the same folder.
AXES = ("name", "criteria", "sparsities", "spaces", "seeds")

S = TypeVar("S", bound="Study")


def nearest(name: str, known: Iterable[str]) -> str:
    """What to do about a name that is not known: use the closest one, or one of all.

    >>> nearest("adamv", ("sgd", "adamw"))
    "use 'adamw'"
    """
    known = list(known)
    folded = {item.lower(): item for item in known}
    close = difflib.get_close_matches(name.lower(), folded, 1)
    return f"use {folded[close[0]]!r}" if close else f"use one of {listed(known, 20)}"


class FieldError(StudyError):
    """A value of a study that is not understood; `where` are the names that lead to it."""

    where: tuple[str, ...] = ()


class _Part(BaseModel):
    """A frozen model whose mistakes are StudyErrors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _refused(type(self), error) from None


def _refused(model: type[BaseModel], error: ValidationError) -> FieldError:
    """The first mistake of a model, in words."""
    first = error.errors()[0]
    where = tuple(str(name) for name in first["loc"])
    cause = first.get("ctx", {}).get("error")
    name, value = ".".join(where), first["input"]
    if isinstance(cause, StudyError):
        refused = FieldError(cause.rule, cause.found, cause.remedy)
        where += getattr(cause, "where", ())
    elif first["type"] == "extra_forbidden":
        refused = FieldError(
            "A study must have no keys but those of its schema.", f"{name!r}", nearest(name, model.model_fields)
        )
    else:
        rule = first["msg"].replace("Input should", f"`{name}` must")
        choices = get_args(model.model_fields[where[0]].annotation)
        texts = [choice for choice in choices if isinstance(choice, str)]
        remedy = nearest(value, texts) if texts and isinstance(value, str) else f"change {name}"
        refused = FieldError(f"{rule}.", f"{value!r}", remedy)
    refused.where = where
    return refused


def _values(value: Any) -> Any:
    """The values of a text: they are separated by commas outside of brackets."""
    if isinstance(value, str):
        return [part for part in re.split(r",\s*(?![^()]*\))", value.strip()) if part]
    return value if isinstance(value, (list, tuple, range)) else [value]


def _sparsities(value: Any) -> Any:
    """Fractions; ``90`` and ``90%`` are 0.9."""

    def read(one: Any) -> float:
        text = str(one).strip()
        number = float(text.removesuffix("%"))
        return round(number / 100, 12) if text.endswith("%") or number > 1 else number

    try:
        return [read(one) for one in _values(value)]
    except ValueError:
        rule = "`sparsities` must be fractions of at least 0 and below 1."
        raise StudyError(rule, f"{value!r}", "write for example 0.9,0.95,0.98 or 90%,95%,98%") from None


def _seeds(value: Any) -> Any:
    """Numbers; ``5..9`` are 5, 6, 7, 8 and 9."""
    seeds: list[Any] = []
    for one in _values(value):
        limits = re.fullmatch(r"\s*(\d+)\s*\.\.\s*(\d+)\s*", one) if isinstance(one, str) else None
        seeds += range(int(limits[1]), int(limits[2]) + 1) if limits else [one]
    return seeds


Texts = Annotated[tuple[str, ...], BeforeValidator(_values)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_values)]


class SpaceSpec(_Part):
    """One value of a study's axis of spaces, such as ``spatial`` or ``interspace(basis=dct, sharing=layer)``.

    >>> str(SpaceSpec.parse("IP(frozen, basis=dct)"))
    'interspace(basis=dct, frozen=true)'
    """

    kind: Literal["spatial", "interspace"] = "interspace"
    basis: Literal["standard", "orthonormal", "dct"] = "orthonormal"
    sharing: Literal["layer", "model"] = "model"
    constraint: Constraint = "unit"
    frozen: bool = False

    @classmethod
    def parse(cls, text: str) -> SpaceSpec:
        """A space by its text.

        Raises:
            StudyError: it is not understood.
        """
        rule = "A space must be spatial, interspace, or as interspace(basis=dct, sharing=layer, frozen=true)."
        parts = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text)
        kinds = {"sp": "spatial", "ip": "interspace", "spatial": "spatial", "interspace": "interspace"}
        name = parts[1].lower() if parts else text
        if parts is None or name not in kinds:
            raise StudyError(rule, f"{text!r}", nearest(name, ("spatial", "interspace")))
        options: dict[str, str] = {}
        for option in _values(parts[2] or ""):
            key, _, value = option.partition("=")
            options[key.strip()] = value.strip() or "true"
        if name in ("sp", "spatial") and options:
            raise StudyError(rule, f"{text!r}", "leave out the options of spatial, which has no bases")
        return cls(**options, kind=kinds[name])  # type: ignore[arg-type]

    def __str__(self) -> str:
        fields = type(self).model_fields
        values = {name: getattr(self, name) for name in fields if name != "kind"}
        given = [f"{name}={str(value).lower()}" for name, value in values.items() if value != fields[name].default]
        return f"{self.kind}({', '.join(given)})" if given else self.kind


class Data(_Part):
    """Images and labels."""

    source: str = Field(
        default="digits",
        description="images and labels: digits, a data set of torchvision (CIFAR10), a folder of images (train/ and "
        "test/), a file .npz (train_images, train_labels, test_images, test_labels), or module:function that returns "
        "data sets of torch",
    )
    root: str | None = Field(default=None, description="folder of a torchvision data set")
    train_images: int | None = Field(default=None, ge=1, description="number of training images, the same in each run")
    validation: float = Field(default=0.0, ge=0, lt=1, description="share of the training images for validation")
    augment: Texts = Field(
        default=(), description='transforms of torchvision.transforms.v2, for example "RandomCrop(32, padding=4)"'
    )
    image_size: int | None = Field(default=None, ge=1, description="resize images to squares of this many pixels")


class Model(_Part):
    """The network."""

    name: str = Field(
        default="auto",
        description="network: auto (a small network for the data), a model of torchvision or timm, or module:function",
    )
    options: dict[str, Any] = Field(default={}, description="keyword arguments of the model")
    stem: Literal["auto", "imagenet", "small"] = Field(
        default="auto",
        description="first layers: imagenet, small (3x3, without stride or pooling), or auto (by the image size)",
    )


class Training(_Part):
    """How networks are trained and fine-tuned."""

    function: str | None = Field(default=None, description="your own training function, module:function")
    epochs: int = Field(default=16, ge=1, description="epochs of training")
    finetune_epochs: int = Field(default=8, ge=0, description="epochs of fine-tuning after pruning")
    batch_size: int = Field(default=100, ge=1, description="images in a batch")
    optimizer: Literal["sgd", "adamw"] = Field(default="sgd", description="optimizer: sgd or adamw")
    lr: float = Field(default=0.15, gt=0, description="peak learning rate")
    basis_lr: float = Field(default=1.0, ge=0, description="learning rate of the bases, as a multiple of lr")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of sgd")
    weight_decay: float = Field(default=5e-4, ge=0, description="weight decay; bases have none")
    schedule: Literal["one-cycle", "cosine", "steps"] = Field(
        default="one-cycle", description="learning-rate schedule: one-cycle, cosine or steps"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="label smoothing of the cross entropy")
    workers: int = Field(default=0, ge=0, description="processes that load images")
    device: str = Field(default="cpu", description="device of torch: cpu, cuda, mps")
    amp: bool = Field(default=False, description="train in bfloat16 by autocast")
    channels_last: bool = Field(default=False, description="memory format of images and network")
    compile: bool = Field(default=False, description="train by torch.compile")
    threads: int = Field(default=1, ge=1, description="CPU threads of each run; another number, other results")


class Tune(_Part):
    """Learning rates tuned for each space, on the validation images."""

    learning_rates: Numbers = Field(default=(), description="the same grid for each space; empty: no tuning")
    seeds: int = Field(default=1, ge=1, description="number of seeds with which each learning rate is tried")
    rates: dict[str, float] = Field(default={}, description="learning rates by space, where they are known: not tuned")


class Measure(_Part):
    """What is measured and kept besides accuracies."""

    deploy_threads: int | None = Field(
        default=None, ge=1, description="measure the latency of each pruned network with this many CPU threads"
    )
    keep: Annotated[tuple[Literal["models", "masks"], ...], BeforeValidator(_values)] = Field(
        default=(), description="files kept for each run: models, masks"
    )
    tensorboard: bool = Field(default=False, description="write logs for TensorBoard")


class Cell(NamedTuple):
    """One cell of a study's grid: a criterion at a sparsity, in a space, with a seed."""

    criterion: str
    sparsity: float
    space: str
    seed: int

    def __str__(self) -> str:
        return f"{self.criterion} at {self.sparsity:g}, {self.space}, seed {self.seed}"


class Study(_Part):
    """A grid of cells, and what they have in common.

    Raises:
        StudyError: a name is not known, or a value makes no sense.

    >>> study = Study(sparsities=(0.9,), seeds=(0, 1))
    >>> len(study.cells()), str(study.cells()[-1])
    (12, 'torch:l1 at 0.9, interspace, seed 1')
    """

    name: str = Field(default="ip-compare", description="name of the study", min_length=1)
    criteria: Texts = Field(
        default=("torch:random", "torch:l1"),
        description="criteria; `ip-plugin criteria` lists them. Yours are module:object",
        min_length=1,
    )
    sparsities: Annotated[tuple[float, ...], BeforeValidator(_sparsities)] = Field(
        default=(0.9, 0.95, 0.98), description="shares of the entries (or channels) that are pruned", min_length=1
    )
    spaces: Texts = Field(
        default=("spatial", "interspace"),
        description="spaces: spatial (SP), interspace (IP), or as interspace(basis=dct, sharing=layer, "
        "constraint=unit, frozen=true)",
        min_length=1,
    )
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_seeds)] = Field(
        default=tuple(range(6)), description="random seeds; 0..5 are 0, 1, 2, 3, 4, 5", min_length=1
    )
    data: Data = Data()
    model: Model = Model()
    training: Training = Training()
    tune: Tune = Tune()
    measure: Measure = Measure()

    @field_validator("criteria")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return _once("criteria", tuple(map(_criterion, names)))

    @field_validator("spaces")
    @classmethod
    def _canonical(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        return _once("spaces", tuple(str(SpaceSpec.parse(text)) for text in texts))

    @field_validator("sparsities")
    @classmethod
    def _fractions(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        for value in values:
            if not 0 <= value < 1:
                rule = "`sparsities` must be fractions of at least 0 and below 1."
                raise StudyError(rule, f"{value!r}", "change sparsities")
        return _once("sparsities", values)

    @field_validator("seeds")
    @classmethod
    def _different(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        return _once("seeds", values)

    def cells(self) -> list[Cell]:
        """Every cell: all of one seed before those of the next, dense networks first, spaces of a pair in turn."""
        grid = [(DENSE, 0.0), *product(self.criteria, self.sparsities)]
        return [
            Cell(criterion, sparsity, space, seed)
            for seed, (criterion, sparsity), space in product(self.seeds, grid, self.spaces)
        ]

    def changed(self: S, changes: Mapping[str, Any] | None = None, /, **more: Any) -> S:
        """The same study with other values, which are named by their dotted path.

        >>> Study().changed({"training.epochs": 2}, seeds="0..1").training.epochs
        2
        """
        values = self.model_dump()
        for name, value in {**(changes or {}), **more}.items():
            put(values, name, value)
        return type(self)(**values)

    def common(self) -> dict[str, Any]:
        """What all results of one folder have in common: everything but the axes and what is only kept or logged."""
        values = self.model_dump(mode="json", exclude={*AXES, "measure"})
        return values | {"measure": {"deploy_threads": self.measure.deploy_threads}}


def _once(name: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise StudyError(f"`{name}` must have every value once.", f"{values!r}", f"change {name}")
    return values


def _criterion(name: str) -> str:
    """The full name of a criterion; the library's may be left out where only one has it."""
    if ":" not in name and name != DENSE:
        known = known_criteria.available()
        base, _, suffix = name.partition("+")  # a control
        full = [candidate for candidate in known if candidate.partition(":")[2] == name]
        full = full or [
            f"{candidate}+{suffix}" for candidate in known if candidate.partition(":")[2] == base and suffix
        ]
        if len(full) == 1:
            return full[0]
        remedy = f"use one of {', '.join(full)}" if full else nearest(name, known)
        raise StudyError("A criterion must be named library:criterion.", f"{name!r}", remedy)
    known_criteria.load(name)
    return name


class Run(_Part):
    """How a study is run; it changes nothing in the results."""

    output: str | None = Field(default=None, description="folder for the results; by default the study's name")
    engine: Literal["local", "dask", "nni"] = Field(
        default="local", description="what runs the cells: local (this machine), dask or nni"
    )
    jobs: int | None = Field(default=None, ge=1, description="runs at once; by default one for each core")
    scheduler: str | None = Field(
        default=None, description="address of a Dask scheduler (tcp://...); by default a cluster on this machine"
    )
    nni_config: str | None = Field(default=None, description="NNI's YAML file, for training service and limits")
    nni_port: int | None = Field(
        default=None, ge=1, le=65535, description="port of NNI's web portal; by default the first free one from 8080"
    )


class Config(Study):
    """A study and how it is run: what a TOML file holds."""

    run: Run = Run()

    def study(self) -> Study:
        """The study alone."""
        return Study(**self.model_dump(exclude={"run"}))


def put(values: dict[str, Any], name: str, value: Any) -> None:
    """Set a value of nested dicts by its dotted path."""
    *tables, key = name.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise StudyError("A table must have keys.", f"a value at {table!r} of {name!r}", "use the name of a table")
    values[key] = value


def setting(text: str) -> tuple[str, Any]:
    """The name and the value of a text as ``training.label_smoothing=0.1``; values are those of TOML, or plain text.

    >>> setting("training.amp=true"), setting("model.name=resnet18")
    (('training.amp', True), ('model.name', 'resnet18'))
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise StudyError("A value must be set by name=value.", f"{text!r}", "write for example training.lr=0.1")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()


def read(path: Path | None = None, changes: Mapping[str, Any] | None = None) -> Config:
    """A study from a TOML file, with values of the file replaced by dotted path.

    Raises:
        StudyError: the file cannot be read; a key, name or value is wrong, with its line.
    """
    values: dict[str, Any] = {}
    text = ""
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
            values = tomllib.loads(text)
        except (OSError, ValueError) as error:
            raise StudyError("The study must be a TOML file.", f"{str(path)!r}: {error}", "correct it") from error
    for name, value in (changes or {}).items():
        put(values, name, value)
    try:
        return Config(**values)
    except FieldError as error:
        given = any(".".join(error.where).startswith(name) for name in changes or {})
        line = None if given else line_of(text, error.where)
        if line is None:
            raise
        for number, content in enumerate(text.splitlines()[line - 1 :], start=line):  # the value in a list of lines
            if error.found.strip("'") in content:
                line = number
                break
        raise StudyError(error.rule, f"{error.found} ({path}, line {line})", error.remedy) from None


def line_of(text: str, where: tuple[str, ...]) -> int | None:
    r"""The line of a TOML file that sets a value, or that begins the table or the list which holds it.

    >>> line_of("[training]\nepochs = 3\nlr = 0", ("training", "lr"))
    3
    """
    table: list[str] = []
    best, line = 0, None
    for number, content in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[+\s*([^\]]+?)\s*\]", content)
        key = re.match(r"""\s*([\w.\-"' ]+?)\s*=""", content)
        if header:
            table = header[1].split(".")
        names = table if header else [*table, *key[1].split(".")] if key else []
        names = [name.strip("\"' ") for name in names]
        if len(names) > best and tuple(names) == where[: len(names)]:
            best, line = len(names), number
    return line


def commented() -> str:
    """A TOML file with every field, its description and its default value.

    >>> print(commented()[:60])
    # A study of ip-plugin; run it by: ip-plugin compare study.t
    """
    lines = ["# A study of ip-plugin; run it by: ip-plugin compare study.toml", ""]
    tables: list[str] = []
    for name, field in Config.model_fields.items():
        if isinstance(field.default, BaseModel):
            part = type(field.default)
            tables += ["", f"# {part.__doc__ or ''}".rstrip(), f"[{name}]"]
            for key, inner in part.model_fields.items():
                tables += _entry(key, inner.description, inner.default)
        else:
            lines += _entry(name, field.description, field.default)
    return "\n".join([*lines, *tables]) + "\n"


def _entry(name: str, description: str | None, default: Any) -> Iterator[str]:
    yield f"# {description}"
    yield f"# {name} =" if default is None else f"{name} = {json.dumps(default)}"


def described(path: str) -> tuple[str, Any]:
    """(description, default) of a field by its dotted path."""
    model: type[BaseModel] = Config
    *tables, key = path.split(".")
    for table in tables:
        model = type(model.model_fields[table].default)
    field = model.model_fields[key]
    return field.description or "", field.default
