"""Layer-wise least-squares reconstruction after pruning, on a few batches, without training.

The remaining entries of each layer are fitted so that for the dense network's inputs they give the dense network's
outputs: after He, Zhang and Sun 2017 (arXiv 1707.06168: channel pruning), here for any mask, in either space.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...core.channels import by_group
from ...core.tensor_ref import Model, TensorRef
from ...errors import ArgumentError, SelectionError
from ..derivatives import Batches, call, pairs, pure, unwrapped
from .layer_inputs import Moments, multiplies, observe

_MOST_STEPS = 100
_TOLERANCE = 1e-4


@torch.no_grad()
def reconstruct(
    model: Model, dense: nn.Module, batches: Batches, *, ridge: float = 0.01, moments_at_once: int = 1 << 26
) -> Model:
    """Fit the remaining entries of every masked layer to the outputs that the layer has in the dense network.

    On these batches, with the inputs of the dense network, no layer's squared error is larger afterwards; entries that
    hardly matter there stay near their values. Masks and bases stay. The difference in the mean of the outputs goes
    into the layer's bias, or into the running mean of the BatchNorm that it feeds. Pruning in rounds, each followed by
    a reconstruction, is far more accurate than pruning at once. Call `reestimate_batch_norm` last.

    Layers without a mask, layers that get no input, and classes with a forward of their own stay as they are. So do
    values behind masks, and Parameter objects. With DistributedDataParallel pass the same batches in every process.

    Args:
        model: changed in place; with masks of any kind, in either space.
        dense: the same network before it was pruned; not changed.
        batches: a few pairs (inputs, targets) on the model's device, held in memory; targets are ignored.
        ridge: penalty for changing an entry, relative to the energy that the entry alone adds to the outputs. With 0
            only the fit to these batches counts.
        moments_at_once: how many numbers in second moments of inputs are held in memory together (those of one layer at
            least); the dense network runs on the batches once for each group of layers.

    Returns:
        The model.

    Raises:
        BatchError: there are no batches, or one is no pair.
        SelectionError: there is no layer, or `dense` lacks a layer of the model, or has it in another shape.
        ArgumentError: a ridge that is negative, or no number. In all cases the model is as it was.

    >>> import copy
    >>> from ip_plugin.methods import magnitude, prune
    >>> dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> model = prune(copy.deepcopy(dense), magnitude, sparsity=0.7)
    >>> x = torch.rand(16, 3, 8, 8)
    >>> before = (model(x) - dense(x)).square().sum()
    >>> bool((reconstruct(model, dense, [(x, None)])(x) - dense(x)).square().sum() < before)
    True
    """
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not 0 <= ridge < math.inf:
        raise ArgumentError(
            "`ridge` must be a finite number of at least 0.", f"{ridge!r}", "leave it out, or pass 0.01"
        )
    inner, refs = unwrapped(model)
    reference, dense_refs = unwrapped(dense)
    inputs = [inputs for inputs, _ in pairs(batches)]
    references = reference_layers(refs, dense_refs)
    changes: list[tuple[Tensor, Tensor]] = []
    for group in _groups([ref for ref in refs if ref.mask is not None and multiplies(ref)], moments_at_once):
        moments = {ref.module_name: Moments() for ref in group}
        norms = observe(reference, {references[name]: moments[name].add for name in moments}, inputs)
        for ref in group:
            name = ref.module_name
            if moments[name].samples:
                means = _means(inner, reference, ref, references[name], norms.get(name, ()))
                changes += _fitted(ref, references[name], moments.pop(name), means, ridge)
    for tensor, value in changes:
        tensor.copy_(value)
    return model


@torch.no_grad()
def reestimate_batch_norm(model: Model, batches: Batches) -> Model:
    """Replace the running statistics of every BatchNorm by averages over some batches.

    All other modules run in evaluation mode (`torch.optim.swa_utils.update_bn` runs them in training mode, dropout
    included). Modes, gradients and the random state stay.

    Args:
        model: only the running statistics of BatchNorms are changed, in place.
        batches: pairs (inputs, targets), as in `reconstruct`; every batch has the same weight.

    Returns:
        The model.

    Raises:
        BatchError: there are no batches, or one is no pair; the model is as it was.

    >>> model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
    >>> reestimate_batch_norm(model, [(torch.tensor([[1.0], [3.0]]), None)])[0].running_mean
    tensor([2.])
    """
    for buffer, value in estimates(model, [inputs for inputs, _ in pairs(batches)]):
        buffer.copy_(value)
    return model


def estimates(model: nn.Module, inputs: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
    """Buffers of BatchNorms, each with the value that `reestimate_batch_norm` writes to it. Changes nothing."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    with pure(model), torch.no_grad():
        model.eval()
        for norm in norms:
            for name, buffer in list(norm.named_buffers(recurse=False)):
                setattr(norm, name, buffer.clone())
            norm.reset_running_stats()
            norm.momentum = None  # a plain average
            norm.train()
        for batch in inputs:
            call(model, {}, batch)
        values = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    return list(zip(buffers, values, strict=True))


def reference_layers(refs: Sequence[TensorRef], dense_refs: Sequence[TensorRef]) -> dict[str, TensorRef]:
    """{layer name: the layer in the dense network}; raises SelectionError if one is missing, or has another shape."""
    references = {ref.module_name: ref for ref in dense_refs}
    for ref in refs:
        other, shape = references.get(ref.module_name), tuple(ref.parameter.shape)
        if other is None or other.parameter.shape != shape:
            problem = "no such layer" if other is None else f"one of shape {tuple(other.parameter.shape)}"
            raise SelectionError(
                "The dense network must have every prunable layer of the model, in the same shape.",
                f"layer {ref.module_name!r} of shape {shape}, and {problem} in the dense network",
                "pass a copy of the model from before it was pruned: copy.deepcopy(model)",
            )
    return references


def _groups(refs: Sequence[TensorRef], most: int) -> Iterator[list[TensorRef]]:
    """Layers in lists whose moments have at most so many numbers together, or a single layer."""
    group: list[TensorRef] = []
    room = most
    for ref in refs:
        groups, _, inputs, n = by_group(ref.module, ref.parameter).shape
        size = groups * (inputs * n) ** 2
        if group and size > room:
            yield group
            group, room = [], most
        group.append(ref)
        room -= size
    if group:
        yield group


def _means(
    model: nn.Module, dense: nn.Module, ref: TensorRef, reference: TensorRef, norms: Sequence[str]
) -> list[tuple[Tensor, Tensor, int]]:
    """The tensors that shift the mean of a layer's outputs: (tensor, its value in the dense network, sign)."""
    if isinstance(ref.module.bias, Tensor) and isinstance(reference.module.bias, Tensor):
        return [(ref.module.bias.detach(), reference.module.bias.detach(), 1)]
    buffers, dense_buffers = (dict(network.named_buffers(remove_duplicate=False)) for network in (model, dense))
    names = [f"{norm}.running_mean".removeprefix(".") for norm in norms]
    return [(buffers[name], dense_buffers[name], -1) for name in names if name in buffers and name in dense_buffers]


def _fitted(
    ref: TensorRef, reference: TensorRef, moments: Moments, means: Sequence[tuple[Tensor, Tensor, int]], ridge: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """New values of the tensors of a layer: (tensor, value)."""
    module, coefficients, space, mask = ref.module, ref.parameter.detach(), ref.interspace, ref.mask
    assert mask is not None
    second = moments.second(central=bool(means))
    start = by_group(module, coefficients).to(second.dtype)
    basis = torch.eye(start.shape[3]) if space is None else space.effective_basis.detach()
    goal = by_group(module, reference.composed).to(second.dtype)
    fitted = least_squares(second, goal, start, by_group(module, mask), basis.to(start), ridge)
    value = coefficients.clone(memory_format=torch.contiguous_format)
    by_group(module, value).copy_(torch.where(by_group(module, mask), fitted, start))
    yield coefficients, value
    kept = by_group(module, value.masked_fill(~mask, 0)).to(second.dtype) @ basis.to(start)
    difference = ((goal - kept).flatten(2) @ moments.mean[:, :, None]).flatten()
    for tensor, dense, sign in means:
        yield tensor, dense + sign * difference


def least_squares(second: Tensor, goal: Tensor, start: Tensor, mask: Tensor, basis: Tensor, ridge: float) -> Tensor:
    """Coefficients `C` on a support that minimise ``(W - C G) M (W - C G)^T + ridge * |C - start|^2`` for every output.

    The ridge weighs each entry by the diagonal of the quadratic form, so the result does not depend on the filter
    scale. Conjugate gradients, preconditioned by that diagonal, for all outputs at once. No output's error rises.

    Args:
        second: `M`, ``(groups, D, D)``, ``D = in / groups * N``.
        goal, start, mask: ``(groups, out / groups, in / groups, N)``; `goal` is `W`.
        basis: `G`, ``(N, N)``.
        ridge: at least 0.
    """
    _, _, inputs, n = goal.shape

    def gradient(kernels: Tensor) -> Tensor:
        by_kernel: Tensor = (kernels.flatten(2) @ second).unflatten(2, (inputs, n))
        return (by_kernel @ basis.mT).mul_(mask)

    def error(kernels: Tensor) -> Tensor:
        return ((kernels.flatten(2) @ second) * kernels.flatten(2)).sum(2)[:, :, None, None]

    blocks = second.unflatten(2, (inputs, n)).unflatten(1, (inputs, n)).diagonal(dim1=1, dim2=3)
    diagonal = torch.einsum("nk,gkli,nl->gin", basis, blocks, basis)[:, None]
    # Entries without an effect, up to rounding, stay.
    scale = torch.where(diagonal > 1e-6 * diagonal.amax(), diagonal.abs().rsqrt(), 0)
    start = start * mask
    rest = goal - start @ basis
    before = error(rest)
    residual = scale * gradient(rest)
    change = torch.zeros_like(residual)
    direction = residual
    size = first = residual.square().sum((2, 3), keepdim=True)
    for _ in range(_MOST_STEPS):
        product = scale * gradient((scale * direction) @ basis) + ridge * direction
        step = _quotient(size, (direction * product).sum((2, 3), keepdim=True))
        change = change + step * direction
        residual = residual - step * product
        previous, size = size, residual.square().sum((2, 3), keepdim=True)
        if bool((size <= _TOLERANCE**2 * first).all()):
            break
        direction = residual + _quotient(size, previous) * direction
    fitted = start + scale * change
    return torch.where(error(goal - fitted @ basis) <= before, fitted, start)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``; 0 where `b` is 0, as for outputs that are fitted exactly."""
    return torch.where(b > 0, a / b, 0)
