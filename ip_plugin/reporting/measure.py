"""Measurement of pruned networks: parameters, non-zeros, bytes and multiply-adds, in either space.

In the interspace the zeros are in the coefficients, so ``(conv.weight == 0).sum()`` does not count them; `report` does.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList, type_before_parametrizations

from ..checkpoint.contents import gathered, packed
from ..core.channels import output_filters
from ..core.tensor_ref import TensorRef, by_basis, prunable_tensors, tensors_of
from ..errors import ArgumentError, listed
from ..utils.example_input import run
from .multiply_adds import MultiplyAdds
from .table import Report, Row


class LayerCall(NamedTuple):
    """A call of a layer by a `Network`.

    Attributes:
        layer, how: which, and how it was run.
        bytes: of what it read.
        positions: of the output, over all images.
        milliseconds: that it took, if that was measured.
    """

    layer: str
    how: str
    bytes: int
    positions: int
    milliseconds: float | None = None


class Network(Protocol):
    """A network that runs layers itself: one of `ip_plugin.sparse`.

    Attributes:
        noted: calls of layers are appended to it, unless it is None.
    """

    noted: list[LayerCall] | None

    def first_calls(self) -> list[LayerCall]:
        """Calls of layers for the inputs that the network was prepared for."""
        ...


class Other(NamedTuple):
    """A Parameter that is neither prunable nor a basis.

    Attributes:
        kind: class of its module, and its name there.
        parameters, nonzeros, bytes: numbers of entries, and their size.
    """

    kind: str
    parameters: int
    nonzeros: int
    bytes: int


@dataclasses.dataclass
class Measured:
    """What can be measured of a model without running it.

    Attributes:
        rows: of the prunable layers, without multiply-adds.
        transforms: of each layer in the interspace the multiply-adds of its basis at one position.
        others: the other Parameters, by the names of their tensors.
        stored, dense: bytes of all other tensors in a compact file, and of buffers.
        first_names: of every tensor the name of the first one that is the same.
    """

    rows: list[Row]
    transforms: dict[str, int]
    others: dict[str, Other]
    stored: int
    dense: int
    first_names: dict[str, str]


@dataclasses.dataclass(eq=False)
class Prepared:
    """What a module that `ip_plugin.sparse.prepare` has made knows of the model; its attribute `PREPARED`.

    Attributes:
        measured: of the model.
        by_torch: modules that torch may run, by their names in the model.
        networks: run the other layers.
    """

    measured: Measured
    by_torch: Mapping[str, nn.Module]
    networks: Sequence[Network]

    def first_calls(self) -> list[LayerCall]:
        """Calls of layers for the inputs that the networks were prepared for."""
        return [call for network in self.networks for call in network.first_calls()]


PREPARED = "_ip_plugin_prepared"


@torch.no_grad()
def report(model: nn.Module, example_input: Any = None, *, variety: bool = False) -> Report:
    """Measure a pruned model: in either space, with masks of ours or of `torch.nn.utils.prune`, or baked.

    For what `ip_plugin.sparse.prepare` returns, counts are those of the model that was prepared, and the report also
    says how each layer is run.

    Args:
        model: not changed; with an example input it is run, in evaluation mode and without gradients. Sharded by
            FSDP2, every process has to call.
        example_input: a tensor, a tuple of arguments, or a mapping of keyword arguments; needed for multiply-adds.
        variety: measure how different each layer's filters are (takes seconds for a ResNet-50); not of what `prepare`
            returns.

    Returns:
        A `Report`. Multiply-adds are those of convolutions and matrix products with a Parameter, be it in a layer or in
        a function; not those of tensors that are computed from Parameters outside of layers.

    Raises:
        BatchError: the model does not run on the example input.
        ArgumentError: the model is, or contains, one of TorchScript.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False))
    >>> total = report(model, torch.zeros(1, 1, 5, 5)).prunable
    >>> total.parameters, total.nonzeros, total.macs_dense
    (18, 18, 162)
    """
    scripts = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripts:
        raise ArgumentError(
            "A model that is measured must consist of ordinary modules.",
            f"TorchScript: {listed(scripts)}" if scripts[0] else "a model of TorchScript",
            "measure the model before torch.jit.trace or torch.jit.script",
        )
    prepared = {name: vars(module)[PREPARED] for name, module in model.named_modules() if PREPARED in vars(module)}
    measured = measure(model, without=prepared, variety=variety)
    if prepared:
        measured.rows = [dataclasses.replace(row, bytes_sparse=row.bytes_dense, runs="dense") for row in measured.rows]
    macs, calls = None, {name: part.first_calls() for name, part in prepared.items()}
    if example_input is not None:
        macs, calls = _multiply_adds(model, measured, prepared, example_input)
    for name, part in prepared.items():
        _include(measured, name, part, calls[name], macs)
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    measured.rows.sort(key=lambda row: order[next((n for n in prepared if _is_inside(row.layer, n)), row.layer)])
    return _report(measured, macs)


def measure(model: nn.Module, *, without: Iterable[str] = (), variety: bool = False, packing: bool = True) -> Measured:
    """Measure what can be measured without running a model.

    Args:
        model: not changed.
        without: names of modules to leave out.
        variety: as of `report`.
        packing: find the bytes in a compact file; else those of all values.
    """
    from ..methods.filter_variety import measure as variety_of  # `import ip_plugin` must not import all methods

    def included(ref: TensorRef) -> bool:
        return not any(_is_inside(ref.module_name, name) for name in without)

    refs, layers = filter(included, tensors_of(model)), list(filter(included, prunable_tensors(model)))
    names = {id(layer.parameter): layer.name for layer in layers}
    tensors = {ref.name: (ref, names.setdefault(id(ref.parameter), ref.name)) for ref in refs}
    stored = {id(ref.parameter): _bytes(ref.parameter) for ref, _ in tensors.values()}
    if packing:
        stored = dict.fromkeys(stored, 0)
        for ref, content in packed(model):
            if included(ref):
                stored[id(ref.parameter)] += content.nbytes
    bases = by_basis(layers)
    rows, transforms = [], {}
    for layer in layers:
        space, counted, user = layer.interspace, None, ""
        if space is not None:
            user = bases[space.basis][0].module_name
            counted = space.basis if user == layer.module_name else None
            if isinstance(layer.module, _ConvNd):
                channels = min(layer.module.in_channels, layer.module.out_channels)
                transforms[layer.module_name] = space.basis.numel() * channels
        size = stored.pop(id(layer.parameter)) + (0 if counted is None else _bytes(counted))
        row = _row(layer, user, 0 if counted is None else counted.numel(), size)
        values = variety_of(output_filters(layer.module, gathered(layer.composed))) if variety else None
        rows.append(row if values is None else dataclasses.replace(row, **values._asdict()))
    counted_elsewhere = {*(layer.parameter for layer in layers), *bases}
    others = {
        ref.name: Other(_kind(model, ref), ref.parameter.numel(), int(_nonzero(ref).sum()), _bytes(ref.parameter))
        for ref, name in tensors.values()
        if name == ref.name and not ref.is_buffer and ref.parameter not in counted_elsewhere
    }
    buffers = sum(_bytes(ref.parameter) for ref, _ in tensors.values() if ref.is_buffer)
    first_names = {name: first for name, (_, first) in tensors.items()}
    return Measured(rows, transforms, others, sum(stored.values()), buffers, first_names)


def _row(layer: TensorRef, basis: str, basis_parameters: int, stored: int) -> Row:
    parameters, nonzeros = layer.parameter.numel(), int(_nonzero(layer).sum())
    return Row(
        layer=layer.module_name,
        space="spatial" if layer.interspace is None else "interspace",
        shape=tuple(layer.parameter.shape),
        parameters=parameters,
        nonzeros=nonzeros,
        sparsity=_sparsity(parameters, nonzeros),
        basis=basis,
        basis_parameters=basis_parameters,
        bytes_dense=_bytes(layer.parameter),
        bytes_sparse=stored,
        macs_dense=None,
        macs_nonzero=None,
        macs_basis=None,
    )


def _kind(model: nn.Module, ref: TensorRef) -> str:
    """The class of the module that has a tensor, and the tensor's name there."""
    module, tensor_name = ref.module, ref.tensor_name
    if isinstance(module, ParametrizationList):  # someone else's
        name, _, tensor_name = ref.module_name.rpartition(".parametrizations.")
        module = model.get_submodule(name.removeprefix("parametrizations."))
    return f"{type_before_parametrizations(module).__name__}.{tensor_name}"


def _nonzero(ref: TensorRef) -> Tensor:
    nonzero = gathered(ref.parameter.detach()) != 0
    mask = None if ref.is_foreign else ref.mask
    return nonzero if mask is None else nonzero & gathered(mask)


def _multiply_adds(
    model: nn.Module, measured: Measured, prepared: Mapping[str, Prepared], example_input: Any
) -> tuple[Counter[str], dict[str, list[LayerCall]]]:
    """Run a model: multiply-adds of each tensor by torch, and the calls of layers by networks."""
    if prepared:
        run(model, example_input)  # without counting: preparing for a new shape runs layers, too
    macs = MultiplyAdds()
    for ref in tensors_of(model):
        name = measured.first_names.get(ref.name)
        if name is None:
            continue
        macs.add(name, ref.parameter)
        if ref.is_prunable:
            macs.watch(name, ref.module, ref.parameter)
        if ref.chain is not None:
            macs.watch_composed(name, ref.chain)
        elif ref.parameter is not (value := getattr(ref.module, ref.tensor_name)):  # pruned by the host
            macs.add(name, value)
    for prefix, part in prepared.items():
        for module_name, module in part.by_torch.items():
            for tensor_name, parameter in module.named_parameters(recurse=False):
                own_name = _joined(module_name, tensor_name)
                name = _joined(prefix, part.measured.first_names.get(own_name, own_name))
                macs.add(name, parameter)
                if TensorRef(module, tensor_name).is_prunable and "forward" not in vars(module):  # not a network's
                    macs.watch(name, module, parameter)
        for network in part.networks:
            network.noted = []
    calls: dict[str, list[LayerCall]] = {}
    try:
        with macs.counting():
            run(model, example_input)
    finally:
        for prefix, part in prepared.items():
            calls[prefix] = [call for network in part.networks for call in network.noted or ()]
            for network in part.networks:
                network.noted = None
    return macs.counts, calls


def _include(
    measured: Measured, name: str, part: Prepared, calls: Sequence[LayerCall], macs: Counter[str] | None
) -> None:
    """Add what is known of a prepared part of a model.

    Args:
        measured: of the rest; changed in place.
        name: of the part.
        part: which layers are whose.
        calls: of layers that the part runs itself; with `macs`, those of an example input.
        macs: multiply-adds of each tensor by torch; those of `calls` are added.
    """
    for row in part.measured.rows:
        layer = _joined(name, row.layer)
        own = [call for call in calls if call.layer == row.layer]
        runs = dict.fromkeys(call.how for call in own)
        times = [call.milliseconds for call in own if call.milliseconds is not None]
        if not own or (macs is not None and macs.get(_weight(layer))):
            runs["dense"] = None
        if macs is not None:
            macs[_weight(layer)] += sum(call.positions for call in own) * row.parameters
        size = sum(call.bytes for call in part.first_calls() if call.layer == row.layer)
        size += row.bytes_dense if row.layer in part.by_torch else 0
        row = dataclasses.replace(row, layer=layer, basis=row.basis and _joined(name, row.basis), bytes_sparse=size)
        measured.rows.append(dataclasses.replace(row, runs=", ".join(runs), milliseconds=sum(times) if times else None))
    measured.transforms.update({_joined(name, layer): count for layer, count in part.measured.transforms.items()})
    measured.others.update({_joined(name, tensor): other for tensor, other in part.measured.others.items()})
    measured.stored += part.measured.stored
    measured.dense += part.measured.dense


def _report(measured: Measured, macs: Mapping[str, int] | None) -> Report:
    """The report of a model.

    Args:
        measured: of all its parts.
        macs: multiply-adds of each tensor.
    """
    rows = measured.rows
    if macs is not None:
        rows = [_with_macs(row, macs.get(_weight(row.layer), 0), measured.transforms.get(row.layer, 0)) for row in rows]
    others = measured.others.values()
    parameters, nonzeros = sum(other.parameters for other in others), sum(other.nonzeros for other in others)
    outside: dict[str, int] = {}
    for other in others:
        outside[other.kind] = outside.get(other.kind, 0) + other.parameters
    prunable = _sum("prunable", rows)
    bases = prunable.basis_parameters
    parameters, nonzeros = prunable.parameters + bases + parameters, prunable.nonzeros + bases + nonzeros
    everything = dataclasses.replace(
        prunable,
        layer="everything",
        parameters=parameters,
        nonzeros=nonzeros,
        sparsity=_sparsity(parameters, nonzeros),
        bytes_dense=prunable.bytes_dense + sum(other.bytes for other in others) + measured.dense,
        bytes_sparse=prunable.bytes_sparse + measured.stored,
    )
    if macs is not None:
        used = [(macs.get(name, 0), other) for name, other in measured.others.items() if other.parameters]
        everything = dataclasses.replace(
            everything,
            macs_dense=(prunable.macs_dense or 0) + sum(count for count, _ in used),
            macs_nonzero=(prunable.macs_nonzero or 0)
            + sum(count * other.nonzeros // other.parameters for count, other in used),
        )
    return Report(tuple(rows), prunable, everything, dict(sorted(outside.items(), key=lambda item: -item[1])))


def _with_macs(row: Row, macs: int, transform: int) -> Row:
    """A row with its multiply-adds.

    Args:
        row: without them.
        macs: with all weights.
        transform: multiply-adds of the basis at one position.
    """
    size = max(1, row.parameters)
    return dataclasses.replace(
        row, macs_dense=macs, macs_nonzero=macs * row.nonzeros // size, macs_basis=macs // size * transform
    )


def _sum(name: str, rows: Sequence[Row]) -> Row:
    parameters = sum(row.parameters for row in rows)
    nonzeros = sum(row.nonzeros for row in rows)
    return Row(
        layer=name,
        space="",
        shape=(),
        parameters=parameters,
        nonzeros=nonzeros,
        sparsity=_sparsity(parameters, nonzeros),
        basis="",
        basis_parameters=sum(row.basis_parameters for row in rows),
        bytes_dense=sum(row.bytes_dense for row in rows),
        bytes_sparse=sum(row.bytes_sparse for row in rows),
        macs_dense=_total(row.macs_dense for row in rows),
        macs_nonzero=_total(row.macs_nonzero for row in rows),
        macs_basis=_total(row.macs_basis for row in rows),
    )


def _total(values: Iterable[int | None]) -> int | None:
    counts = list(values)
    return None if None in counts else sum(count or 0 for count in counts)


def _sparsity(parameters: int, nonzeros: int) -> float:
    return 1 - nonzeros / parameters if parameters else 0.0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _weight(layer: str) -> str:
    return _joined(layer, "weight")


def _is_inside(name: str, prefix: str) -> bool:
    """Whether a module is the one named `prefix`, or a part of it."""
    return not prefix or name == prefix or name.startswith(prefix + ".")
