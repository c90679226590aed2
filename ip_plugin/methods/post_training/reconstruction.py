"""What pruning has cost a network, won back on a few batches without training: `reconstruct`, `reestimate_batch_norm`.

What is left of each layer is fitted by least squares, so that for the dense network's inputs it gives the dense
network's outputs (after He, Zhang and Sun 2017, arXiv 1707.06168, who do it where channels are pruned; here for any
mask, in either space).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...core.tensor_ref import Model, TensorRef
from ...errors import InvalidRidgeError, NoBatchesError, TwinMismatchError
from ..derivatives import Batches, call, pair, pure, unwrapped
from .layer_inputs import Moments, multiplies, observe, rows

#: Numbers in the moments that are held at once, if one layer does not need more.
_AT_ONCE = 1 << 26
_MOST_STEPS = 100
_TOLERANCE = 1e-4


@torch.no_grad()
def reconstruct(model: Model, dense: nn.Module, batches: Batches, *, ridge: float = 0.01) -> Model:
    """Fit what is left of every masked layer to the outputs that the layer has in the dense network.

    For the inputs of the dense network no layer's squared error on these batches is larger afterwards; entries that
    hardly matter there stay near to where they are. Masks and bases stay. The difference in the mean of the outputs
    goes into the layer's bias, or into the running mean of the BatchNorm behind it. Pruning in rounds, each followed by
    this, keeps far more than pruning at once. `reestimate_batch_norm` comes last.

    Layers without a mask, layers that see no input, and classes with a forward of their own stay as they are.
    Parameters keep their identity, and values behind masks stay. Under DistributedDataParallel give every process the
    same batches.

    Args:
        model: changed in place; masked by whatever means, in either space.
        dense: the same network before it was pruned; not changed.
        batches: pairs (inputs, targets) on the model's device, as the scores take them; targets are not looked at.
            A few: they are held in memory.
        ridge: what moving an entry costs, as a part of what it adds by itself to the energy of the outputs. With 0
            only these batches count.

    Returns:
        The model.

    Raises:
        NoBatchesError, InvalidBatchError, NothingToPruneError: the model is as it was.
        InvalidRidgeError: a ridge that is negative, or no number; the model is as it was.
        TwinMismatchError: `dense` lacks a layer of the model, or has it in another shape; the model is as it was.

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
        raise InvalidRidgeError(ridge)
    inner, found = unwrapped(model)
    twin, others = unwrapped(dense)
    inputs = [pair(batch)[0] for batch in batches]
    if not inputs:
        raise NoBatchesError
    twins = twins_of(found, others)
    changes: list[tuple[Tensor, Tensor]] = []
    for some in _chunks([each for each in found if each.mask is not None and multiplies(each)]):
        moments = {each.module_name: Moments() for each in some}
        takers = observe(twin, {twins[each.module_name]: moments[each.module_name].add for each in some}, inputs)
        for each in some:
            if moments[each.module_name].samples:
                means = _means(inner, twin, each, twins[each.module_name], takers.get(each.module_name, ()))
                changes += _fitted(each, twins[each.module_name], moments.pop(each.module_name), means, ridge)
    for tensor, value in changes:
        tensor.copy_(value)
    return model


@torch.no_grad()
def reestimate_batch_norm(model: Model, batches: Batches) -> Model:
    """Replace the running statistics of every BatchNorm by the averages over some batches.

    Everything else runs in evaluation mode (`torch.optim.swa_utils.update_bn` trains it all, dropout included). Modes,
    gradients and the random state stay.

    Args:
        model: changed in place: nothing but the buffers of BatchNorms that track statistics.
        batches: pairs (inputs, targets), as in `reconstruct`; every batch counts alike.

    Returns:
        The model.

    Raises:
        NoBatchesError, InvalidBatchError: the model is as it was.

    >>> model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
    >>> reestimate_batch_norm(model, [(torch.tensor([[1.0], [3.0]]), None)])[0].running_mean
    tensor([2.])
    """
    for buffer, value in estimates(model, [pair(batch)[0] for batch in batches]):
        buffer.copy_(value)
    return model


def estimates(model: nn.Module, inputs: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
    """Buffers of BatchNorms, and what `reestimate_batch_norm` would write there. The model stays as it is."""
    if not inputs:
        raise NoBatchesError
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
        for each in inputs:
            call(model, {}, each)
        found = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    return list(zip(buffers, found, strict=True))


def twins_of(found: Sequence[TensorRef], others: Sequence[TensorRef]) -> dict[str, TensorRef]:
    """The layer of the dense network for each layer."""
    known = {each.module_name: each for each in others}
    for each in found:
        other = known.get(each.module_name)
        if other is None or other.parameter.shape != each.parameter.shape:
            what = "no such layer" if other is None else f"one of shape {tuple(other.parameter.shape)}"
            raise TwinMismatchError(each.module_name, tuple(each.parameter.shape), what)
    return known


def _chunks(found: Sequence[TensorRef]) -> Iterator[list[TensorRef]]:
    """As many layers together as their moments leave room for."""
    some: list[TensorRef] = []
    room = _AT_ONCE
    for each in found:
        groups, _, inputs, n = rows(each.module, each.parameter).shape
        size = groups * (inputs * n) ** 2
        if some and size > room:
            yield some
            some, room = [], _AT_ONCE
        some.append(each)
        room -= size
    if some:
        yield some


def _means(
    model: nn.Module, dense: nn.Module, mine: TensorRef, its: TensorRef, takers: Sequence[str]
) -> list[tuple[Tensor, Tensor, int]]:
    """What holds the mean of a layer's outputs: (tensor, its value in the dense network, its sign)."""
    if isinstance(mine.module.bias, Tensor) and isinstance(its.module.bias, Tensor):
        return [(mine.module.bias.detach(), its.module.bias.detach(), 1)]
    modules, others = dict(model.named_modules()), dict(dense.named_modules())
    found = []
    for name in takers:
        norm, other = (getattr(where.get(name), "running_mean", None) for where in (modules, others))
        if isinstance(norm, Tensor) and isinstance(other, Tensor):
            found.append((norm, other, -1))
    return found


def _fitted(
    mine: TensorRef, its: TensorRef, moments: Moments, means: Sequence[tuple[Tensor, Tensor, int]], ridge: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """What to write into which tensors."""
    module, coefficients = mine.module, mine.parameter.detach()
    second = moments.second(central=bool(means))
    space = mine.interspace
    mask = mine.mask
    assert mask is not None
    start = rows(module, coefficients).to(second.dtype)
    basis = torch.eye(start.shape[3]) if space is None else space.effective_basis.detach()
    goal = rows(module, its.composed).to(second.dtype)
    found = least_squares(second, goal, start, rows(module, mask), basis.to(start), ridge)
    value = coefficients.clone(memory_format=torch.contiguous_format)
    rows(module, value).copy_(torch.where(rows(module, mask), found, start))
    yield coefficients, value
    kept = rows(module, value.masked_fill(~mask, 0)).to(second.dtype) @ basis.to(start)
    difference = ((goal - kept).flatten(2) @ moments.mean[:, :, None]).flatten()
    for tensor, dense, sign in means:
        yield tensor, dense + sign * difference


def least_squares(second: Tensor, goal: Tensor, start: Tensor, mask: Tensor, basis: Tensor, ridge: float) -> Tensor:
    """Coefficients `C` on a support that minimise ``(W - C G) M (W - C G)^T + ridge * |C - start|^2`` for every output.

    The ridge weighs each entry by the diagonal of the quadratic form, so the gauge does not matter. By conjugate
    gradients, preconditioned by that diagonal, for all outputs at once. No output's error is above that of `start`.

    Args:
        second: `M`, ``(groups, D, D)``, ``D = in / groups * N``.
        goal: `W`, ``(groups, out / groups, in / groups, N)``.
        start, mask: of the shape of `goal`.
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
    # What carries nothing, but for rounding, stays.
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
    found = start + scale * change
    return torch.where(error(goal - found @ basis) <= before, found, start)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """0 where the divisor is 0, as it is for outputs that are fitted exactly."""
    return torch.where(b > 0, a / b, 0)
