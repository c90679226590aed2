"""Fit the bases of a pruned network again, without an orthonormality constraint: `refine`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ...basis.bases import check_regular, compose
from ...basis.dictionary import Dictionary, learn
from ...basis.fitting import Kernels, kernel_rows
from ...core.tensor_ref import Model, TensorRef, by_basis, check_finite
from ..derivatives import unwrapped
from .reconstruction import reference_layers


@torch.no_grad()
def refine(
    model: Model,
    dense: nn.Module | None = None,
    *,
    seed: int = 0,
    round_done: Callable[[int, float], None] = lambda number, error: None,  # noqa: ARG005
) -> Model:
    """Approximate the kernels of the dense network better, with as many coefficients.

    Fits bases that need not be orthonormal, and chooses the kept coefficients again (see
    `ip_plugin.basis.dictionary.learn`); every layer keeps as many as before. No data is needed. The squared error of
    the layers that share a basis never rises: where nothing better is found, they stay as they are. So do layers
    without a basis, and those that share one where nothing is masked.

    Bases are scaled to spectral norm 1, so that a change of coefficients changes kernels by at most as much; they have
    no constraint afterwards. Some filters are nearly linearly dependent: for fine-tuning, freeze the basis
    (``requires_grad_(False)``, or `ip_plugin.param_groups` with ``basis_lr=0``), or train it slowly.

    Args:
        model: its bases, coefficients (zero where masked) and masks are changed in place. Build a new optimizer.
        dense: the same network before it was pruned; not changed. None: the model's own kernels without masks, which
            are the same if nothing was trained since.
        seed: of the sample of kernels with which fitting begins.
        round_done: called after each round with its number and the relative error of the layers that share a basis.

    Returns:
        The model.

    Raises:
        SelectionError: there is no layer, or `dense` lacks a layer of the model, or has it in another shape.
        ConversionError: NaN or infinite values in kernels.
        BasisError: a basis that is not finite, or singular. In all cases the model is as it was.

    >>> from ip_plugin import interspace
    >>> from ip_plugin.methods import magnitude, prune
    >>> model = interspace(nn.Conv2d(3, 16, 3), basis="fitted", sparsity=0.7)
    >>> dense = model.weight.detach()
    >>> model = prune(model, magnitude, sparsity=0.7)
    >>> before = (model.weight - dense).norm()
    >>> bool((refine(model).weight - dense).norm() < before)
    True
    """
    refs = unwrapped(model)[1]
    references = {} if dense is None else reference_layers(refs, unwrapped(dense)[1])
    groups = [members for members in by_basis(refs).values() if any(ref.mask is not None for ref in members)]
    dictionaries = [_refined(members, references, seed, round_done) for members in groups]
    for members, dictionary in zip(groups, dictionaries, strict=True):
        if dictionary is None:
            continue
        norm = float(torch.linalg.matrix_norm(dictionary.basis, 2))
        for ref, (coefficients, mask) in zip(members, dictionary.codes, strict=True):
            assert ref.interspace is not None
            ref.interspace.constraint = "none"
            ref.interspace.basis.copy_(dictionary.basis / norm)
            ref.parameter.copy_((coefficients * norm).reshape(ref.parameter.shape))
            if ref.mask is not None:
                ref.set_mask(mask.reshape(ref.parameter.shape))
    return model


def _refined(
    members: list[TensorRef], references: dict[str, TensorRef], seed: int, round_done: Callable[[int, float], None]
) -> Dictionary | None:
    """A basis and coefficients with a smaller error for the layers that share a basis, or None."""
    assert members[0].interspace is not None
    basis = members[0].interspace.effective_basis.detach()
    check_regular(basis, members[0].module_name)
    kernels, counts, before = [], [], 0.0
    for ref in members:
        dense = references.get(ref.module_name)
        kernels.append(Kernels(kernel_rows(compose(ref.parameter, basis) if dense is None else dense.composed), 0))
        check_finite(ref.module_name, kernels[-1].rows)
        counts.append(ref.parameter.numel() if ref.mask is None else int(ref.mask.sum()))
        before += float((kernels[-1].rows - kernel_rows(ref.composed)).square_().sum(dtype=torch.float64))
    dictionary = learn(kernels, counts, basis, seed=seed, round_done=round_done)
    return dictionary if dictionary.error < before else None
