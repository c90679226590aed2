"""Filter bases: construction, constraints, and conversion of kernels to coefficients and back.

A basis of a kernel with ``N = prod(kernel)`` elements is an ``(N, N)`` matrix whose rows are the filters, flattened in
row-major order. A kernel is ``h = sum_n coefficient[n] * basis[n]`` (interspace pruning, after Wimmer, Mehnert and
Condurache, CVPR 2022, arXiv 2203.07808). Everything here is a pure function of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BasisError

BasisSpec: TypeAlias = Literal["standard", "orthonormal", "dct"] | Tensor
Constraint: TypeAlias = Literal["none", "unit", "orthonormal"]
CONSTRAINTS: tuple[Constraint, ...] = get_args(Constraint)

#: Largest condition number of a basis, its filters scaled to unit norm: with float32 weights the relative error of a
#: conversion is about 6e-8 times the condition number.
MAX_CONDITION = 1e4

_SINGULAR = 1e12
_NAMED_BASES = 'use "standard", "orthonormal" or "dct"'


def make(basis: BasisSpec, kernel: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Make a basis for kernels of shape `kernel`, float64 on the CPU.

    Args:
        basis: ``"standard"`` (one filter for each kernel position), ``"orthonormal"`` (random, uniformly distributed,
            from `generator`), ``"dct"`` (DCT-II, separable), or a tensor of shape ``(N, N)`` or ``(N, *kernel)``.
        kernel: spatial shape, for example ``(3, 3)``.
        generator: source of randomness for ``"orthonormal"``.

    Returns:
        Tensor ``(N, N)``, ``N = prod(kernel)``; row ``n`` is filter ``n``.

    Raises:
        BasisError: unknown name, wrong shape, not real, not finite, singular or ill-conditioned.

    >>> make("standard", (1, 3))
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]], dtype=torch.float64)
    """
    if isinstance(basis, Tensor):
        return _checked(basis, kernel)
    if basis == "standard":
        return torch.eye(math.prod(kernel), dtype=torch.float64, device="cpu")
    if basis == "orthonormal":
        return _orthonormal(math.prod(kernel), generator)
    if basis == "dct":
        return _dct(kernel)
    rule = '`basis` must be "standard", "orthonormal", "dct" or a tensor of shape (N, N).'
    raise BasisError(rule, f"{basis!r}", _NAMED_BASES)


def _orthonormal(n: int, generator: torch.Generator | None) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, device="cpu", generator=generator))
    # Q is uniformly distributed if the diagonal of R is positive (Mezzadri 2007, arXiv math-ph/0609050).
    basis: Tensor = q * r.diagonal().sign()
    return basis.contiguous()


def _dct(kernel: Sequence[int]) -> Tensor:
    """The tensor product of orthonormal DCT-II matrices, one for each kernel dimension."""
    product = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for size in kernel:
        position = torch.arange(size, dtype=torch.float64, device="cpu")
        cosines = torch.cos(math.pi / size * (position + 0.5) * position[:, None])
        cosines[0] /= math.sqrt(2.0)
        product = torch.kron(product, cosines * math.sqrt(2.0 / size))
    return product


def constrained(basis: Tensor, constraint: Constraint) -> Tensor:
    """Apply a constraint to a trained basis: the filters that kernels are composed of.

    Differentiable any number of times. The standard basis is returned bit for bit. Under ``"unit"`` and
    ``"orthonormal"`` the norm of a row of `basis` has no effect, so neither weight decay nor a large step matters.

    Args:
        basis: ``(N, N)``, the Parameter that is trained.
        constraint: ``"none"``; ``"unit"``: every row divided by its norm; ``"orthonormal"``: the rows orthonormalised
            one after the other (Gram and Schmidt; by QR).

    Returns:
        ``(N, N)``. A row of zeros gives a row of zeros under ``"unit"``.

    >>> constrained(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), "unit")
    tensor([[0.6000, 0.8000],
            [0.0000, 1.0000]])
    >>> constrained(torch.tensor([[3.0, 0.0], [1.0, 2.0]]), "orthonormal") + 0.0
    tensor([[1., 0.],
            [0., 1.]])
    """
    if constraint == "none":
        return basis
    wide = basis.float() if basis.dtype == torch.float16 else basis
    # Divide by the largest entry first: squares of the entries of a very small filter (after weight decay) or of a very
    # large one are out of range. (`torch._weight_norm` is a single operation, but its second derivative is wrong.)
    largest = torch.linalg.vector_norm(wide.detach(), math.inf, dim=1, keepdim=True)
    scaled = wide / torch.where(largest > 0, largest, 1.0)
    unit: Tensor = scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True).clamp_min(0.5)
    if constraint == "orthonormal":
        q, r = torch.linalg.qr((unit.float() if unit.dtype == torch.bfloat16 else unit).mT)
        unit = (q * torch.where(r.diagonal() < 0, -1, 1)).mT
    return unit.to(basis.dtype)


def normalized(basis: Tensor, constraint: Constraint) -> Tensor:
    """Scale an initial basis to fulfil a constraint.

    Raises:
        BasisError: the constraint is ``"orthonormal"``, and the filters are not orthogonal.
    """
    if constraint == "none":
        return basis
    unit = constrained(basis, "unit")
    if constraint == "orthonormal" and not bool((unit @ unit.mT - torch.eye(len(unit))).abs().max() < 1e-5):
        rule = 'The filters of a basis must be orthogonal for constraint="orthonormal".'
        raise BasisError(rule, "filters that are not", 'use constraint="unit", or another basis')
    return unit


def _checked(basis: Tensor, kernel: Sequence[int]) -> Tensor:
    n = math.prod(kernel)
    if not basis.is_floating_point():
        raise BasisError("A basis must be a real floating point tensor.", f"{basis.dtype}", _NAMED_BASES)
    if tuple(basis.shape) not in {(n, n), (n, *kernel)}:
        rule = f"A basis for kernels of shape {tuple(kernel)} must have shape {(n, n)} or {(n, *kernel)}."
        remedy = "select layers of one kernel shape with `layers=`, or pass a basis of the right shape"
        raise BasisError(rule, f"shape {tuple(basis.shape)}", remedy)
    basis = basis.detach().to("cpu", torch.float64, copy=True).reshape(n, n)
    check_condition(basis)
    return basis


def check_condition(basis: Tensor) -> None:
    """Raise BasisError unless every kernel can be written in `basis` with little loss of precision."""
    if basis.is_meta:
        remedy = "load the weights before the model is converted"
        raise BasisError("A basis must have values.", "a basis on the meta device", remedy)
    if not bool(basis.isfinite().all()):
        raise BasisError("A basis must be finite.", "NaN or infinite values", _NAMED_BASES)
    norm = norms(basis)
    if not bool((norm > 0).all()):
        zero = int((norm == 0).nonzero()[0])
        raise BasisError("No filter of a basis may be zero.", f"filter {zero} has norm 0", _NAMED_BASES)
    # At unit norm: the scale of a filter is arbitrary (the gauge).
    condition = float(torch.linalg.cond(basis.double() / norm.double()[:, None]))
    if not condition <= MAX_CONDITION:
        rule = f"The condition number of a basis (its filters at unit norm) must be at most {MAX_CONDITION:g}."
        raise BasisError(rule, f"{condition:.3g}: its filters are linearly dependent, or nearly so", _NAMED_BASES)


def check_regular(basis: Tensor, layer: str) -> None:
    """Raise BasisError if the basis of a layer is not finite, or singular in float64.

    Weaker than `check_condition`: training may lead to an ill-conditioned basis.
    """
    rule = "The basis of a layer must be finite and not singular."
    remedy = "go back to an earlier state of the training; `model.state_dict()` holds anything"
    if not bool(basis.isfinite().all()):
        raise BasisError(rule, f"NaN or infinite values in that of {layer!r}", remedy)
    norm = norms(basis.detach().double())
    if not bool((norm > 0).all()) or float(torch.linalg.cond(basis.detach().double() / norm[:, None])) > _SINGULAR:
        raise BasisError(rule, f"filters in that of {layer!r} that are linearly dependent, or zero", remedy)


def is_standard(basis: Tensor) -> bool:
    """Whether `basis` is the standard basis, in which coefficients equal the weights."""
    return torch.equal(basis.detach(), torch.eye(len(basis), dtype=basis.dtype, device=basis.device))


def norms(basis: Tensor) -> Tensor:
    """Norm of every filter, shape ``(N,)``: `coefficient[n]` times it is the coefficient of the unit-norm filter."""
    norm: Tensor = torch.linalg.vector_norm(basis, dim=1)
    return norm


def compose(coefficients: Tensor, basis: Tensor) -> Tensor:
    """Kernels from coefficients: ``weight[o, i] = sum_n coefficients[o, i, n] * basis[n]``.

    Differentiable any number of times in both arguments. The result has the memory format of `coefficients`; with the
    standard basis it equals them bit for bit.

    Args:
        coefficients: ``(out, in, *kernel)``.
        basis: ``(N, N)``.

    >>> coefficients = torch.tensor([[[[2.0, 0.0, -1.0]]]])
    >>> basis = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
    >>> compose(coefficients, basis)
    tensor([[[[1., 4., 1.]]]])
    """
    n = basis.shape[0]
    if coefficients.stride(1) == 1:  # channels_last: (out, *kernel, in) in memory
        last = coefficients.movedim(1, -1)
        composed = basis.T @ last.reshape(last.shape[0], n, last.shape[-1])
        return composed.reshape(last.shape).movedim(-1, 1)
    if coefficients.device.type == "cpu" and coefficients.dtype == torch.float32:
        # The same product as below, as a 1x1 convolution: on a CPU six times faster than a matrix product with so few
        # columns (benchmarks/training_step.py).
        pixels = coefficients.reshape(1, 1, -1, n).permute(0, 3, 1, 2)
        composed = F.conv2d(pixels, basis.T.reshape(n, n, 1, 1)).permute(0, 2, 3, 1)
    else:
        composed = coefficients.reshape(-1, n) @ basis
    return composed.reshape(coefficients.shape)


@torch.no_grad()
def transform_(tensor: Tensor, matrix: Tensor, rows_at_once: int = 1 << 15) -> Tensor:
    """Multiply the flattened kernels of `tensor` by `matrix` from the right, in place.

    With the inverse of a basis this turns weights into coefficients; with its transpose, gradients of weights into
    gradients of coefficients. Computed in float64, `rows_at_once` at a time.
    """
    n = matrix.shape[0]
    matrix = matrix.to(tensor.device, torch.float64)
    step = max(1, rows_at_once // max(1, tensor.shape[1]))
    for start in range(0, tensor.shape[0], step):
        part = tensor[start : start + step]
        kernels = part.reshape(part.shape[0], part.shape[1], n)
        part.copy_((kernels.double() @ matrix).reshape(part.shape))
    return tensor


def inverse(basis: Tensor) -> Tensor:
    """The matrix that turns flattened kernels into coefficients, float64.

    Raises:
        BasisError: the basis is singular or ill-conditioned.
    """
    check_condition(basis.detach())
    inverted: Tensor = torch.linalg.inv(basis.detach().double())
    return inverted
