"""Filter variety for the structured methods of `torch.nn.utils.prune`, in either space.

A layer loses as many slices as without it, but redundant ones first; see `ip_plugin.methods.filter_variety`.
`varied_scores` returns scores that rank the slices which are not pruned yet in that order, for functions that take
``importance_scores``, such as Lightning's `ModelPruning`.

>>> import torch
>>> from torch import nn
>>> from ip_plugin import interspace
>>> layer = interspace(nn.Conv2d(3, 8, 3), basis="orthonormal")
>>> ln_structured(layer, "weight", amount=0.5, n=1, dim=0).weight_mask[:, 0, 0, 0].sum()
tensor(4.)
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as host

from ip_plugin.core.gauge import Similarity, compared, unit_gauge
from ip_plugin.core.tensor_ref import TensorRef
from ip_plugin.errors import ArgumentError, ScoreError
from ip_plugin.methods.filter_variety import check_similarity, removal_order

from . import pruning
from .pruning import Amount

__all__ = ["ln_structured", "random_structured", "varied_scores"]

M = TypeVar("M", bound=nn.Module)


def ln_structured(
    module: M,
    name: str,
    amount: Amount,
    n: float | str,
    dim: int = 0,
    importance_scores: Tensor | None = None,
    *,
    strength: float = 1.0,
    similarity: Similarity = "coefficients",
) -> M:
    """Prune `amount` of the unpruned slices along `dim`, like `torch_prune.ln_structured`, but redundant ones first.

    Args:
        module, name, amount, n, importance_scores: as for `torch.nn.utils.prune`.
        dim: 0 or 1; slices along it are compared.
        strength: 1: redundancy decides, the norm only between two similar slices; 0: the norm alone.
        similarity: what is compared: "coefficients", as they are for filters of unit norm, or the composed "weights".

    Returns:
        The module.

    Raises:
        ArgumentError: another `dim` or similarity, or a tensor of fewer than two dimensions.
        AmountError: of `amount` or `strength`.
        ScoreError: scores of another shape, or NaN among them. In all cases nothing has changed.

    >>> layer = nn.Linear(2, 3, bias=False)
    >>> layer.weight.data = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 0.3]])  # two alike, and a small rare one
    >>> ln_structured(layer, "weight", amount=1, n=2).weight_mask
    tensor([[0., 0.],
            [1., 1.],
            [1., 1.]])
    """
    ref, values = _checked(module, name, dim)
    if importance_scores is None:
        scores = unit_gauge(values, ref.parametrization)
    else:
        pruning.check_scores(importance_scores, values, name)
        scores = importance_scores.detach()
    norms = host._compute_norm(scores.contiguous(), n, dim)
    varied = varied_scores(module, name, norms, dim, strength=strength, similarity=similarity)
    return pruning.ln_structured(module, name, amount, math.inf, dim, varied)


def random_structured(
    module: M,
    name: str,
    amount: Amount,
    dim: int = 0,
    *,
    strength: float = 1.0,
    similarity: Similarity = "coefficients",
) -> M:
    """Prune `amount` of the unpruned slices along `dim`: of two similar ones one, at random.

    Args, returns, raises: as `ln_structured`.
    """
    noise = torch.rand(_checked(module, name, dim)[1].shape[dim])
    varied = varied_scores(module, name, noise, dim, strength=strength, similarity=similarity)
    return pruning.ln_structured(module, name, amount, math.inf, dim, varied)


def varied_scores(
    module: nn.Module,
    name: str,
    scores: Tensor,
    dim: int = 0,
    *,
    strength: float = 1.0,
    similarity: Similarity = "coefficients",
) -> Tensor:
    """Scores by which a structured method removes redundant slices first.

    Args:
        module, name: the tensor; it is not changed.
        scores: ``(slices along dim,)``; they alone would remove the lowest first.
        dim, strength, similarity: as in `ln_structured`.

    Returns:
        A tensor of the tensor's shape: 2, 3, ... for slices in the order of removal, 1 for those pruned already.

    Raises:
        As `ln_structured`, and ScoreError: not one score for each slice.
    """
    ref, values = _checked(module, name, dim)
    check_similarity(similarity)
    if scores.shape != values.shape[dim : dim + 1]:
        raise ScoreError(
            "There must be one score for each slice.",
            f"scores {tuple(scores.shape)}, {values.shape[dim]} slices along {dim}",
            "pass a vector of scores",
        )
    slices = compared(values, ref.parametrization, similarity).movedim(dim, 0).flatten(1)
    mask = torch.ones_like(values, dtype=torch.bool) if ref.mask is None else ref.mask
    kept = mask.movedim(dim, 0).flatten(1).any(dim=1)
    ranks = torch.ones(len(scores), device=values.device)
    if bool(kept.any()):
        order = removal_order(scores.detach().to(kept.device)[kept], slices[kept], strength)
        ranks[kept.nonzero().squeeze(1)[order.to(kept.device)]] = torch.arange(2.0, 2 + len(order)).to(ranks)
    shape = [1] * values.dim()
    shape[dim] = -1
    return ranks.reshape(shape).expand(values.shape).contiguous()


def _checked(module: nn.Module, name: str, dim: int) -> tuple[TensorRef, Tensor]:
    """A tensor of which slices can be compared, and its masked values."""
    ref = TensorRef(module, name)
    values, mask = ref.parameter.detach(), ref.mask
    if dim not in (0, 1) or values.dim() < 2:
        raise ArgumentError(
            "Slices that are compared must be those along dimension 0 or 1 of a tensor with at least two dimensions.",
            f"dim {dim!r} of {name!r}, shape {tuple(values.shape)}",
            "pass dim=0 for output channels or dim=1 for input channels",
        )
    return ref, values if mask is None else values * mask
