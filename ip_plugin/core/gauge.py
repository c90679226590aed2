"""The gauge: the free scale between coefficients and basis filters.

``coefficient[n] * a`` with ``basis[n] / a`` is the same network, but magnitudes of coefficients change. They can be
compared where every filter has unit norm: `unit_gauge` reads them so and changes nothing, `normalize` makes it so.
"""

from __future__ import annotations

import warnings
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from ..basis import bases
from ..errors import InvalidBasisError
from .parametrization import Interspace, Mask
from .tensor_ref import Model, by_basis, prunable_tensors

#: What filters in the interspace are compared by: their coefficients, or the kernels that these make.
Similarity: TypeAlias = Literal["coefficients", "weights"]

_ADAM = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
#: The power of the gradient with which state of torch's optimizers scales.
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
    """Coefficients as they are when every basis filter has unit norm.

    Args:
        coefficients: ``(out, in, *kernel)``, or any tensor that is not in the interspace.
        parametrization: what the tensor is under; without a basis the tensor is returned as it is.
    """
    norms = parametrization.filter_norms if isinstance(parametrization, Interspace) else None
    return coefficients if norms is None else coefficients * norms.reshape(1, 1, *coefficients.shape[2:])


@torch.no_grad()
def compared(coefficients: Tensor, parametrization: Mask | None, similarity: Similarity) -> Tensor:
    """What filters are compared by: coefficients in unit gauge, or the kernels that they make.

    Args:
        coefficients: ``(out, in, *kernel)``, masked; or any tensor that is not in the interspace, returned as it is.
        parametrization: what the tensor is under.
        similarity: "coefficients" or "weights".
    """
    if similarity == "weights" and isinstance(parametrization, Interspace):
        return bases.compose(coefficients.detach(), parametrization.effective_basis.detach())
    return unit_gauge(coefficients.detach(), parametrization)


@torch.no_grad()
def normalize(model: Model, optimizer: Optimizer | None = None) -> Model:
    """Give the filters of bases without a constraint unit norm, for good; the function that is computed stays.

    For bases of ``constraint="none"``, from a checkpoint or from `ip_plugin.methods.refine`; they have the constraint
    ``"unit"`` afterwards. Coefficients of all layers that share a basis are scaled with it. Gradients are scaled the
    other way, and so is the state of `optimizer`; state of an optimizer that is not torch's own is reset with a
    warning.

    Args:
        model: changed in place. A plain model stays as it is.
        optimizer: one that trains the model.

    Returns:
        The model.

    Raises:
        InvalidBasisError: a filter of norm zero (or NaN); the model is as it was.

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
            raise InvalidBasisError(
                "A filter must have a finite norm above zero to be given unit norm.",
                f"filter {worst} of the basis of layer {sharers[basis][0].module_name!r} has norm {float(norm[worst])}",
                "set its coefficients and the filter anew, or train without letting it vanish",
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
        if basis.grad is not None:  # what would change a norm has no effect any more
            basis.grad -= (basis.grad * basis).sum(1, keepdim=True) * basis
    if reset:
        warnings.warn(f"optimizer state was reset, its meaning is not known: {', '.join(sorted(reset))}", stacklevel=2)
    return model


def _rescale(parameter: nn.Parameter, scale: Tensor, optimizer: Optimizer | None) -> set[str]:
    """Multiply a parameter by `scale`, its gradient and what grew from it accordingly.

    Returns:
        The names of state that was reset.
    """
    parameter.mul_(scale)
    if parameter.grad is not None:
        parameter.grad.div_(scale)
    if optimizer is None or parameter not in optimizer.state:
        return set()
    state = optimizer.state[parameter]
    grown = [name for name, value in state.items() if isinstance(value, Tensor) and value.shape == parameter.shape]
    powers = _POWERS.get(type(optimizer), {})
    unknown = {name for name in grown if name not in powers}
    if unknown:
        del optimizer.state[parameter]
        return unknown
    for name in grown:
        state[name].div_(scale ** powers[name])
    return set()
