"""The filter scale (gauge): scaling a filter and its coefficients inversely does not change the network.

``coefficient[n] * a`` with ``basis[n] / a`` gives the same kernels, but other magnitudes of coefficients. They are
comparable if every filter has unit norm (unit gauge): `unit_gauge` returns such coefficients without changing the
model, `normalize` rescales the model.
"""

from __future__ import annotations

import warnings
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from ..basis import bases
from ..errors import BasisError
from .parametrization import Interspace, Mask
from .tensor_ref import Model, by_basis, prunable_tensors

#: What the similarity of filters in the interspace is computed from: their coefficients, or the composed kernels.
Similarity: TypeAlias = Literal["coefficients", "weights"]

_ADAM = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
#: How state of torch's optimizers scales with the gradient: {name: power}.
_POWERS: dict[type[Optimizer], dict[str, int]] = {
    optim.SGD: {"momentum_buffer": 1},
    optim.Adam: _ADAM,
    optim.AdamW: _ADAM,
    optim.NAdam: _ADAM,
    optim.RAdam: _ADAM,
    optim.Adamax: {"exp_avg": 1, "exp_inf": 1},
    optim.RMSprop: {"square_avg": 2, "grad_avg": 1, "momentum_buffer": 0},
    optim.Adagrad: {"sum": 2},
}


def unit_gauge(coefficients: Tensor, parametrization: Mask | None) -> Tensor:
    """The coefficients for unit-norm filters.

    Args:
        coefficients: ``(out, in, *kernel)``, or any spatial tensor.
        parametrization: that of the tensor; without a basis the tensor is returned unchanged.
    """
    norms = parametrization.filter_norms if isinstance(parametrization, Interspace) else None
    return coefficients if norms is None else coefficients * norms.reshape(1, 1, *coefficients.shape[2:])


@torch.no_grad()
def compared(coefficients: Tensor, parametrization: Mask | None, similarity: Similarity) -> Tensor:
    """What the similarity of filters is computed from: coefficients in unit gauge, or composed kernels.

    Args:
        coefficients: ``(out, in, *kernel)``, masked; a spatial tensor is returned unchanged.
        parametrization: that of the tensor.
        similarity: "coefficients" or "weights".
    """
    if similarity == "weights" and isinstance(parametrization, Interspace):
        return bases.compose(coefficients.detach(), parametrization.effective_basis.detach())
    return unit_gauge(coefficients.detach(), parametrization)


@torch.no_grad()
def normalize(model: Model, optimizer: Optimizer | None = None) -> Model:
    """Scale the filters of unconstrained bases to unit norm; the outputs of the model do not change.

    For bases with ``constraint="none"``, from a checkpoint or from `ip_plugin.methods.refine`; afterwards they have the
    constraint ``"unit"``. The coefficients of all layers that share a basis are scaled inversely. Gradients and the
    state of `optimizer` are scaled accordingly; state of an optimizer that is not torch's own is reset with a warning.

    Args:
        model: changed in place. A plain model stays as it is.
        optimizer: the optimizer that trains the model.

    Returns:
        The model.

    Raises:
        BasisError: the norm of a filter is zero or NaN; the model is unchanged.

    >>> from ip_plugin import interspace
    >>> model = interspace(nn.Conv2d(3, 16, 3), basis=2 * torch.eye(9), constraint="none")
    >>> space = normalize(model).parametrizations.weight[0]
    >>> torch.equal(space.basis, torch.eye(9)), space.constraint
    (True, 'unit')
    """
    sharers = by_basis(
        ref for ref in prunable_tensors(model) if ref.interspace is not None and ref.interspace.constraint == "none"
    )
    norms = {basis: bases.norms(basis) for basis in sharers}
    for basis, norm in norms.items():
        if not bool((norm > 0).all() & norm.isfinite().all()):
            worst = int((~((norm > 0) & norm.isfinite())).nonzero()[0])
            raise BasisError(
                "A filter must have a finite norm above zero to be scaled to unit norm.",
                f"filter {worst} of the basis of layer {sharers[basis][0].module_name!r} has norm {float(norm[worst])}",
                "assign new values to the filter and its coefficients, or train so that it does not vanish",
            )
    reset: set[str] = set()
    for basis, norm in norms.items():
        for ref in sharers[basis]:
            assert ref.interspace is not None
            ref.interspace.constraint = "unit"
        if bool((norm == 1).all()):
            continue
        for ref in sharers[basis]:
            scale = norm.reshape(1, 1, *ref.parameter.shape[2:])
            reset |= _rescale(ref.parameter, scale, optimizer)
        reset |= _rescale(basis, 1 / norm[:, None], optimizer)
        if basis.grad is not None:  # under the new constraint, the gradient along a filter is zero
            basis.grad -= (basis.grad * basis).sum(1, keepdim=True) * basis
    if reset:
        warnings.warn(f"unknown optimizer state was reset: {', '.join(sorted(reset))}", stacklevel=2)
    return model


def _rescale(parameter: nn.Parameter, scale: Tensor, optimizer: Optimizer | None) -> set[str]:
    """Multiply a parameter by `scale`, and scale its gradient and its optimizer state accordingly.

    Returns:
        The names of the state that was reset.
    """
    parameter.mul_(scale)
    if parameter.grad is not None:
        parameter.grad.div_(scale)
    if optimizer is None or parameter not in optimizer.state:
        return set()
    state = optimizer.state[parameter]
    names = [name for name, value in state.items() if isinstance(value, Tensor) and value.shape == parameter.shape]
    powers = _POWERS.get(type(optimizer), {})
    unknown = {name for name in names if name not in powers}
    if unknown:
        del optimizer.state[parameter]
        return unknown
    for name in names:
        state[name].div_(scale ** powers[name])
    return set()
