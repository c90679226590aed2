"""Measurement of pruned networks: parameters, non-zeros, bytes and multiply-adds, in either space.

In the interspace the zeros are in the coefficients, so ``(conv.weight == 0).sum()`` does not count them; `report` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..checkpoint.contents import packed
from ..core.channels import output_filters
from ..core.tensor_ref import TensorRef, by_basis, check_not_sharded, prunable_tensors, tensors_of
from ..utils.example_input import run
from .table import Report, Row


class Prepared(nn.Module):
    """A module that runs layers itself, without submodules for them: a network of `ip_plugin.sparse`.

    Attributes:
        plain: the rest of the model, which torch runs, under the names of the model.
    """

    plain: nn.Module

    def rows(self, calls: Sequence[tuple[Tensor, ...]]) -> list[Row]:
        """Rows of the layers that it runs itself.

        Args:
            calls: the inputs of each of its calls; without calls, multiply-adds are None.
        """
        raise NotImplementedError


@torch.no_grad()
def report(model: nn.Module, example_input: Any = None, *, variety: bool = False) -> Report:
    """Measure a pruned model: in either space, with masks of ours or of `torch.nn.utils.prune`, or baked.

    For a network from `ip_plugin.sparse.prepare`, the report also says how each layer is run; biases and norms that
    were folded into convolutions are not counted there.

    Args:
        model: not changed; with an example input it is run, in evaluation mode and without gradients.
        example_input: a tensor, a tuple of arguments, or a mapping of keyword arguments; needed for multiply-adds.
        variety: measure how different each layer's filters are (takes seconds for a ResNet-50).

    Returns:
        A `Report`.

    Raises:
        BatchError: the model does not run on the example input.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False))
    >>> total = report(model, torch.zeros(1, 1, 5, 5)).prunable
    >>> total.parameters, total.nonzeros, total.macs_dense
    (18, 18, 162)
    """
    check_not_sharded(model)
    prunable = prunable_tensors(model)
    stored: dict[int, int] = {}
    for ref, content in packed(model):
        stored[id(ref.parameter)] = stored.get(id(ref.parameter), 0) + content.nbytes
    from ..methods.filter_variety import measure  # not at the top: `import ip_plugin` must not import all methods

    prepared = {name: module for name, module in model.named_modules() if isinstance(module, Prepared)}
    calls: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in prepared}
    positions = None if example_input is None else _positions(model, prunable, example_input, prepared, calls)
    first_user = {basis: members[0].module_name for basis, members in by_basis(prunable).items()}
    rows = []
    for layer in prunable:
        space = layer.interspace
        basis, counted = "", None
        if space is not None:
            basis = first_user[space.basis]
            counted = space.basis if basis == layer.module_name else None
        bytes_stored = stored.pop(id(layer.parameter)) + (0 if counted is None else _bytes(counted))
        row = _row(layer, basis, counted, bytes_stored, None if positions is None else positions[layer.module_name])
        measured = measure(output_filters(layer.module, layer.composed)) if variety else None
        rows.append(row if measured is None else dataclasses.replace(row, **measured._asdict()))
    own = {name: module.rows(calls[name]) for name, module in prepared.items()}
    if own:
        rows = _prepared_rows(model, rows, own)
    total = _sum("prunable", rows)
    bases = sum(row.basis_parameters for own_rows in own.values() for row in own_rows)
    return Report(tuple(rows), total, _everything(model, prunable, total, sum(stored.values()), bases))


def _row(layer: TensorRef, basis: str, counted: Tensor | None, stored: int, positions: int | None) -> Row:
    coefficients, mask, space = layer.parameter.detach(), layer.mask, layer.interspace
    nonzero = coefficients != 0
    nonzero = nonzero if mask is None else nonzero & mask
    parameters, nonzeros = nonzero.numel(), int(nonzero.sum())
    transform = None
    if positions is not None:
        transform = 0
        if space is not None and isinstance(layer.module, _ConvNd):
            transform = positions * space.basis.numel() * min(layer.module.in_channels, layer.module.out_channels)
    return Row(
        layer=layer.module_name,
        space="spatial" if space is None else "interspace",
        shape=tuple(coefficients.shape),
        parameters=parameters,
        nonzeros=nonzeros,
        sparsity=1 - nonzeros / parameters if parameters else 0.0,
        basis=basis,
        basis_parameters=0 if counted is None else counted.numel(),
        bytes_dense=_bytes(coefficients),
        bytes_sparse=stored,
        macs_dense=None if positions is None else positions * parameters,
        macs_nonzero=None if positions is None else positions * nonzeros,
        macs_basis=transform,
    )


def _prepared_rows(model: nn.Module, by_torch: Iterable[Row], own: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Merge the rows of layers that torch runs with those of layers that prepared modules run.

    Args:
        model: gives the order of the rows, and names as in the model that was prepared.
        by_torch: the rows of layers that torch runs.
        own: {name of a prepared module: rows of the layers that it runs itself}.
    """

    def named(name: str) -> str:
        for prefix in own:
            inside = f"{prefix}.plain." if prefix else "plain."
            if name.startswith(inside):
                return _joined(prefix, name.removeprefix(inside))
        return name

    rows = {_joined(name, row.layer): row for name, own_rows in own.items() for row in own_rows}
    for row in by_torch:
        dense = dataclasses.replace(row, bytes_sparse=row.bytes_dense, runs="dense")
        sparse = rows.get(named(row.layer))
        if sparse is not None:  # torch runs only some of its calls
            counts = ("bytes_sparse", "macs_dense", "macs_nonzero", "macs_basis")
            sums = {count: _total((getattr(sparse, count), getattr(dense, count))) for count in counts}
            runs = ", ".join(dict.fromkeys((sparse.runs or "", "dense")))
            dense = dataclasses.replace(sparse, runs=runs, **sums)  # type: ignore[arg-type]
        rows[named(row.layer)] = dense
    order = {named(name): number for number, (name, _) in reversed(list(enumerate(model.named_modules())))}
    return [dataclasses.replace(rows[name], layer=name) for name in sorted(rows, key=order.__getitem__)]


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _sum(name: str, rows: Sequence[Row]) -> Row:
    parameters = sum(row.parameters for row in rows)
    nonzeros = sum(row.nonzeros for row in rows)
    return Row(
        layer=name,
        space="",
        shape=(),
        parameters=parameters,
        nonzeros=nonzeros,
        sparsity=1 - nonzeros / parameters if parameters else 0.0,
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


def _everything(model: nn.Module, layers: Sequence[TensorRef], prunable: Row, stored: int, bases: int) -> Row:
    """The sum of prunable layers, and all other parameters, bases and buffers.

    Args:
        model: as given to `report`.
        layers: its prunable layers.
        prunable: their sum.
        stored: bytes of all other tensors in a compact file.
        bases: number of entries of bases that are no Parameters of the model.
    """
    refs = tensors_of(model)
    masks = {ref.parameter: ref.mask for ref in refs if not ref.is_foreign and ref.mask is not None}
    coefficients = {layer.parameter for layer in layers}
    basis = by_basis(layers)
    parameters, nonzeros, size = prunable.parameters + bases, prunable.nonzeros + bases, 0
    for parameter in model.parameters():
        if parameter in coefficients:
            continue
        values = parameter.detach()
        parameters += values.numel()
        if parameter in basis:
            nonzeros += values.numel()  # stored dense; the rows contain its bytes
            continue
        size += _bytes(values)
        mask = masks.get(parameter)
        nonzeros += int(((values != 0) if mask is None else (values != 0) & mask).sum())
    size += sum(_bytes(ref.parameter) for ref in refs if ref.is_buffer)
    return dataclasses.replace(
        prunable,
        layer="everything",
        parameters=parameters,
        nonzeros=nonzeros,
        sparsity=1 - nonzeros / parameters if parameters else 0.0,
        bytes_dense=prunable.bytes_dense + size,
        bytes_sparse=prunable.bytes_sparse + stored,
    )


def _positions(
    model: nn.Module, layers: Sequence[TensorRef], example_input: Any,
    prepared: Mapping[str, Prepared], calls: Mapping[str, list[tuple[Tensor, ...]]],
) -> dict[str, int]:  # fmt: skip
    """How often each layer applies its weight: output positions (input positions if transposed) times batch size.

    The inputs of prepared modules are appended to `calls`.
    """
    counts = dict.fromkeys((layer.module_name for layer in layers), 0)
    owners = {id(layer.parameter): layer for layer in layers}

    def counter(layer: TensorRef) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if isinstance(module, _ConvTransposeNd):
                applied, channels = (*args, *kwargs.values())[0], module.in_channels
            elif isinstance(module, _ConvNd):
                applied, channels = output, module.out_channels
            else:
                applied, channels = output, layer.parameter.shape[0]
            if isinstance(applied, Tensor):
                counts[layer.module_name] += applied.numel() // channels

        return count

    if prepared:
        run(model, example_input)  # without hooks: preparing for a new shape runs layers, too

    def noter(name: str) -> Callable[..., None]:
        return lambda _, args: calls[name].append(args)

    hooks = [module.register_forward_pre_hook(noter(name)) for name, module in prepared.items()]
    for module in model.modules():
        if TensorRef(module).is_prunable:
            owner = owners[id(TensorRef(module).parameter)]  # the layer that lists a tied weight
            hooks.append(module.register_forward_hook(counter(owner), with_kwargs=True))
    try:
        run(model, example_input)
    finally:
        for hook in hooks:
            hook.remove()
    return counts
