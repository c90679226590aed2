"""The bases of a pruned network, fitted once more, and not orthonormal any longer: `refine`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...basis.bases import check_regular, compose
from ...basis.dictionary import Dictionary, learn
from ...basis.fitting import Kernels, kernel_rows
from ...core.tensor_ref import Model, TensorRef, by_basis, check_finite
from ..derivatives import unwrapped
from .reconstruction import twins_of


@torch.no_grad()
def refine(
    model: Model,
    dense: nn.Module | None = None,
    *,
    seed: int = 0,
    round_done: Callable[[int, float], None] = lambda number, error: None,  # noqa: ARG005
) -> Model:
    """Bring masked kernels in the interspace nearer to those of the dense network, with as many coefficients.

    Bases are fitted that need not be orthonormal, and which coefficients are kept is chosen anew
    (`learn`); every layer keeps as many as it has. No data is needed. The squared error of the layers that share a
    basis never rises; where nothing better is found, they stay as they are. So do layers without a
    basis, and those that share one where nothing is masked.

    Filters are scaled such that no step in the coefficients moves a kernel farther than it is long, so these bases have
    no constraint afterwards. Some filters nearly depend
    on each other: in a fine-tuning, hold the basis (``requires_grad_(False)``, or `ip_plugin.param_groups` with
    ``basis_lr=0``), or train it slowly.

    Args:
        model: changed in place: bases, coefficients and masks. Masked-out coefficients are zero afterwards, and an
            optimizer has to be made anew.
        dense: the same network before it was pruned; not changed. None: what the model's coefficients make without the
            masks, which is the same as long as nothing was trained since.
        seed: of the sample of kernels that is looked at first.
        round_done: called after each round with its number and the relative error of the layers that share a basis.

    Returns:
        The model.

    Raises:
        NothingToPruneError: there is no layer; the model is as it was.
        TwinMismatchError: `dense` lacks a layer of the model, or has it in another shape; the model is as it was.
        NonFiniteWeightError, InvalidBasisError: NaN or infinite values in kernels, or a basis that is not finite or
            singular; the model is as it was.

    >>> from ip_plugin import interspace
    >>> from ip_plugin.methods import magnitude, prune
    >>> model = interspace(nn.Conv2d(3, 16, 3), basis="fitted", sparsity=0.7)
    >>> dense = model.weight.detach()
    >>> model = prune(model, magnitude, sparsity=0.7)
    >>> before = (model.weight - dense).norm()
    >>> bool((refine(model).weight - dense).norm() < before)
    True
    """
    found = unwrapped(model)[1]
    twins = None if dense is None else twins_of(found, unwrapped(dense)[1])
    changes = []
    for members in by_basis(found).values():
        if any(layer.mask is not None for layer in members):
            wanted = [_without_mask(layer) if twins is None else twins[layer.module_name].composed for layer in members]
            kernels = [Kernels(kernel_rows(each), 0) for each in wanted]
            changes.append((members, _refined(members, kernels, seed, round_done)))
    for members, better in changes:
        if better is not None:
            _write(members, better)
    return model


def _refined(
    members: Sequence[TensorRef], kernels: Sequence[Kernels], seed: int, round_done: Callable[[int, float], None]
) -> Dictionary | None:
    """What is better for the layers that share a basis, if it is."""
    check_regular(_basis(members[0]), members[0].module_name)
    counts, before = [], 0.0
    for layer, wanted in zip(members, kernels, strict=True):
        check_finite(layer.module_name, wanted.rows)
        counts.append(layer.parameter.numel() if layer.mask is None else int(layer.mask.sum()))
        before += float((wanted.rows - kernel_rows(layer.composed)).square_().sum(dtype=torch.float64))
    found = learn(kernels, counts, _basis(members[0]), seed=seed, round_done=round_done)
    return found if found.error < before else None


def _write(members: Sequence[TensorRef], found: Dictionary) -> None:
    longest = float(torch.linalg.matrix_norm(found.basis, 2))
    for layer in members:
        assert layer.interspace is not None
        layer.interspace.constraint = "none"
        layer.interspace.basis.copy_(found.basis / longest)
    for layer, (coefficients, mask) in zip(members, found.codes, strict=True):
        held = layer.parameter
        held.copy_((coefficients * longest).reshape(held.shape))
        if layer.mask is not None:
            layer.set_mask(mask.reshape(held.shape))


def _without_mask(layer: TensorRef) -> Tensor:
    return compose(layer.parameter.detach(), _basis(layer))


def _basis(layer: TensorRef) -> Tensor:
    assert layer.interspace is not None
    return layer.interspace.effective_basis.detach()
