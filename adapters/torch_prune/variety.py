"""Filter variety for the structured methods of `torch.nn.utils.prune`, in either space.

Of a layer as many slices go as without it, but redundant ones first; see `ip_plugin.methods.filter_variety`. The host
chooses, by scores that are dealt out anew among the slices that are not pruned yet; `varied_scores` makes them for
whatever takes ``importance_scores``, such as Lightning's `ModelPruning`.

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
from ip_plugin.errors import InvalidScoresError, InvalidVarietyError
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
    """Prune `amount` of the unpruned slices along `dim`, as `torch_prune.ln_structured` does, but redundant ones first.

    Args:
        module, name, amount, n, importance_scores: as the host takes them.
        dim: 0 or 1; slices along it are what is compared.
        strength: 1: redundancy decides, the norm only between two that are alike; 0: the norm alone.
        similarity: whether coefficients are compared, in unit gauge, or the kernels that they make.

    Returns:
        The module.

    Raises:
        InvalidVarietyError: another `dim`, strength or similarity, or a tensor of fewer than two dimensions.
        InvalidAmountError, InvalidScoresError: as the host's; nothing has changed.

    >>> layer = nn.Linear(2, 3, bias=False)
    >>> layer.weight.data = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 0.3]])  # two alike, and a small rare one
    >>> ln_structured(layer, "weight", amount=1, n=2).weight_mask
    tensor([[0., 0.],
            [1., 1.],
            [1., 1.]])
    """
    ref = _checked(module, name, dim)
    values = ref.parameter.detach()
    if importance_scores is None:
        scores = unit_gauge(_masked(values, ref.mask), ref.parametrization)
    elif importance_scores.shape == values.shape:
        scores = importance_scores.detach()
    else:
        raise InvalidScoresError(name, values.shape, importance_scores.shape)
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
    """Prune `amount` of the unpruned slices along `dim`: of two that are alike one of them, at random.

    Args, returns, raises: as `ln_structured`.
    """
    noise = torch.rand(_checked(module, name, dim).parameter.shape[dim])
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
    """Scores by which a structured method of the host takes redundant slices first.

    Args:
        module, name: the tensor; it is not changed.
        scores: ``(slices along dim,)``, of one's own; the lowest would go first.
        dim, strength, similarity: as in `ln_structured`.

    Returns:
        Of the tensor's shape: 2, 3, ... for the slices in the order in which they go, 1 for those that are pruned.

    Raises:
        InvalidVarietyError: as `ln_structured`, and scores that are not one for each slice.
    """
    ref = _checked(module, name, dim)
    check_similarity(similarity)
    tensor, mask = ref.parameter.detach(), ref.mask
    if scores.shape != tensor.shape[dim : dim + 1]:
        found = f"scores {tuple(scores.shape)}, {tensor.shape[dim]} slices along {dim}"
        raise InvalidVarietyError("There must be one score for each slice.", found)
    values = compared(_masked(tensor, mask), ref.parametrization, similarity)
    left = _slices(torch.ones_like(tensor, dtype=torch.bool) if mask is None else mask, dim).any(dim=1)
    places = torch.ones(len(scores), device=tensor.device)
    if bool(left.any()):
        order = removal_order(scores.detach().to(left.device)[left], _slices(values, dim)[left], strength)
        places[left.nonzero().squeeze(1)[order.to(left.device)]] = torch.arange(2.0, 2 + len(order)).to(places)
    return _slices_like(places, tensor, dim)


def _checked(module: nn.Module, name: str, dim: int) -> TensorRef:
    ref = TensorRef(module, name)
    shape = ref.parameter.shape
    if dim not in (0, 1) or len(shape) < 2:
        rule = "Slices that are compared must be those along dimension 0 or 1 of a tensor of at least two."
        raise InvalidVarietyError(rule, f"dim {dim!r} of {name!r}, shape {tuple(shape)}")
    return ref


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values * mask


def _slices(values: Tensor, dim: int) -> Tensor:
    return values.movedim(dim, 0).flatten(1)


def _slices_like(values: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """One value for each slice, spread over the slice."""
    shape = [1] * tensor.dim()
    shape[dim] = -1
    return values.reshape(shape).expand(tensor.shape).contiguous()
