"""Filter bases: making them, and writing kernels in them.

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

from ..errors import InvalidBasisError

BasisSpec: TypeAlias = Literal["standard", "orthonormal", "dct"] | Tensor
Constraint: TypeAlias = Literal["none", "unit", "orthonormal"]
CONSTRAINTS: tuple[Constraint, ...] = get_args(Constraint)

#: A basis whose condition number, in unit gauge, is above this is refused: with float32 weights the relative error of
#: converting is about 6e-8 times the condition number.
MAX_CONDITION = 1e4

_ROWS_AT_ONCE = 1 << 15
_SINGULAR = 1e12


def make(basis: BasisSpec, kernel: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """A basis for kernels of shape `kernel`, float64 on the CPU.

    Args:
        basis: ``"standard"`` (one filter for each kernel position), ``"orthonormal"`` (random, uniformly distributed,
            from `generator`), ``"dct"`` (DCT-II, separable), or a tensor of shape ``(N, N)`` or ``(N, *kernel)``.
        kernel: spatial shape, for example ``(3, 3)``.
        generator: source of randomness for ``"orthonormal"``.

    Returns:
        Tensor ``(N, N)``, ``N = prod(kernel)``; row ``n`` is filter ``n``.

    Raises:
        InvalidBasisError: unknown name, wrong shape, not real, not finite, singular or ill-conditioned.

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
    raise InvalidBasisError(
        '`basis` must be "standard", "orthonormal", "dct" or a tensor of shape (N, N).',
        f"{basis!r}",
    )


def _orthonormal(n: int, generator: torch.Generator | None) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, device="cpu", generator=generator))
    # Signs of R's diagonal made positive, Q is uniformly distributed (Mezzadri 2007, arXiv math-ph/0609050).
    found: Tensor = q * r.diagonal().sign()
    return found.contiguous()


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
    """The filters that kernels are composed of: the rows of a trained basis, under a constraint.

    Differentiable any number of times. The standard basis stays what it is bit for bit, and the scale of a row of
    `basis` does not matter under ``"unit"`` and ``"orthonormal"``: neither weight decay nor a large step can change it.

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
    # By the largest entry first: the squares of what weight decay leaves of a filter, or of a very large one, are out
    # of range. (`torch._weight_norm` is one operation instead of all this, but its second derivative is wrong.)
    largest = torch.linalg.vector_norm(wide.detach(), math.inf, dim=1, keepdim=True)
    scaled = wide / torch.where(largest > 0, largest, 1.0)
    unit: Tensor = scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True).clamp_min(0.5)
    if constraint == "orthonormal":
        q, r = torch.linalg.qr((unit.float() if unit.dtype == torch.bfloat16 else unit).mT)
        unit = (q * torch.where(r.diagonal() < 0, -1, 1)).mT
    return unit.to(basis.dtype)


def normalized(basis: Tensor, constraint: Constraint) -> Tensor:
    """A basis to begin with under a constraint.

    Raises:
        InvalidBasisError: it is to be orthonormal, and its filters are not orthogonal.
    """
    if constraint == "none":
        return basis
    found = constrained(basis, "unit")
    if constraint == "orthonormal" and not bool((found @ found.mT - torch.eye(len(found))).abs().max() < 1e-5):
        raise InvalidBasisError(
            'The filters of a basis must be orthogonal for constraint="orthonormal".',
            "filters that are not",
            'use constraint="unit", or another basis',
        )
    return found


def _checked(basis: Tensor, kernel: Sequence[int]) -> Tensor:
    n = math.prod(kernel)
    if not basis.is_floating_point():
        raise InvalidBasisError("A basis must be a real floating point tensor.", f"{basis.dtype}")
    if tuple(basis.shape) not in {(n, n), (n, *kernel)}:
        raise InvalidBasisError(
            f"A basis for kernels of shape {tuple(kernel)} must have shape {(n, n)} or {(n, *kernel)}.",
            f"shape {tuple(basis.shape)}",
            "select layers of one kernel shape with `layers=`, or pass a basis of the right shape",
        )
    basis = basis.detach().to("cpu", torch.float64, copy=True).reshape(n, n)
    check_condition(basis)
    return basis


def check_condition(basis: Tensor) -> None:
    """Raise InvalidBasisError unless every kernel can be written in `basis` with little loss of precision."""
    if basis.is_meta:
        raise InvalidBasisError(
            "A basis must have values.", "a basis on the meta device", "load the weights before the model is converted"
        )
    if not bool(basis.isfinite().all()):
        raise InvalidBasisError("A basis must be finite.", "NaN or infinite values")
    norm = norms(basis)
    if not bool((norm > 0).all()):
        zero = int((norm == 0).nonzero()[0])
        raise InvalidBasisError("No filter of a basis may be zero.", f"filter {zero} has norm 0")
    # The scale of a filter is free (the gauge), so it must not count.
    condition = float(torch.linalg.cond(basis.double() / norm.double()[:, None]))
    if not condition <= MAX_CONDITION:
        raise InvalidBasisError(
            f"The condition number of a basis (its filters at unit norm) must be at most {MAX_CONDITION:g}.",
            f"{condition:.3g}: its filters are linearly dependent, or nearly so",
        )


def check_regular(basis: Tensor, layer: str) -> None:
    """Raise InvalidBasisError for the basis of a layer that is not finite, or singular as far as float64 can tell.

    Less than `check_condition` asks for: training may lead to a basis that is ill-conditioned.
    """
    rule = "The basis of a layer must be finite and not singular."
    remedy = "go back to an earlier state of the training; `model.state_dict()` holds anything"
    if not bool(basis.isfinite().all()):
        raise InvalidBasisError(rule, f"NaN or infinite values in that of {layer!r}", remedy)
    norm = norms(basis.detach().double())
    if not bool((norm > 0).all()) or float(torch.linalg.cond(basis.detach().double() / norm[:, None])) > _SINGULAR:
        raise InvalidBasisError(rule, f"filters in that of {layer!r} that depend on each other, or are zero", remedy)


def is_standard(basis: Tensor) -> bool:
    """Whether coefficients in `basis` are weights: each filter is one kernel position."""
    return torch.equal(basis.detach(), torch.eye(len(basis), dtype=basis.dtype, device=basis.device))


def norms(basis: Tensor) -> Tensor:
    """Norm of every filter, shape ``(N,)``: what `coefficient[n]` is multiplied by in unit gauge."""
    found: Tensor = torch.linalg.vector_norm(basis, dim=1)
    return found


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
        composed = basis.mT @ last.reshape(last.shape[0], n, last.shape[-1])
        return composed.reshape(last.shape).movedim(-1, 1)
    if coefficients.device.type == "cpu" and coefficients.dtype == torch.float32:
        # The same product as below, but as a 1x1 convolution: on a CPU six times faster than a matrix product that is
        # this narrow (benchmarks/training_step.py).
        pixels = coefficients.reshape(1, 1, -1, n).permute(0, 3, 1, 2)
        composed = F.conv2d(pixels, basis.mT.reshape(n, n, 1, 1)).permute(0, 2, 3, 1)
    else:
        composed = coefficients.reshape(-1, n) @ basis
    return composed.reshape(coefficients.shape)


@torch.no_grad()
def transform_(tensor: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the flattened kernels of `tensor` by `matrix` from the right, in place and a few rows at a time.

    With the inverse of a basis this turns weights into coefficients; with its transpose, gradients by weights into
    gradients by coefficients. Works in float64, whatever the tensor's dtype.
    """
    n = matrix.shape[0]
    matrix = matrix.to(tensor.device, torch.float64)
    step = max(1, _ROWS_AT_ONCE // max(1, tensor.shape[1]))
    for start in range(0, tensor.shape[0], step):
        part = tensor[start : start + step]
        kernels = part.reshape(part.shape[0], part.shape[1], n)
        part.copy_((kernels.double() @ matrix).reshape(part.shape))
    return tensor


def inverse(basis: Tensor) -> Tensor:
    """The matrix that turns flattened kernels into coefficients, float64.

    Raises:
        InvalidBasisError: the basis is singular or ill-conditioned.
    """
    check_condition(basis.detach())
    found: Tensor = torch.linalg.inv(basis.detach().double())
    return found
