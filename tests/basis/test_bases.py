"""Making bases and composing kernels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from ip_plugin.basis import bases
from ip_plugin.errors import BasisError

KERNELS = [(3,), (2, 2), (3, 3), (1, 5), (7, 7), (2, 3, 2)]


def slow(coefficients: Tensor, basis: Tensor) -> Tensor:
    return torch.einsum("oin,nk->oik", coefficients.flatten(2), basis).view_as(coefficients)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["standard", "orthonormal", "dct"])
def test_named_bases_are_orthonormal(name: str, kernel: tuple[int, ...]) -> None:
    basis = bases.make(name, kernel, torch.Generator().manual_seed(0))
    n = math.prod(kernel)
    assert basis.shape == (n, n) and basis.dtype == torch.float64
    torch.testing.assert_close(basis @ basis.mT, torch.eye(n, dtype=torch.float64))


def test_the_dct_of_a_2x2_kernel_is_the_hadamard_basis() -> None:
    expected = 0.5 * torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64)
    torch.testing.assert_close(bases.make("dct", (2, 2)), expected)


def test_the_dct_of_three_positions_by_hand() -> None:
    a, b, c = 1 / math.sqrt(3), 1 / math.sqrt(2), 1 / math.sqrt(6)
    expected = torch.tensor([[a, a, a], [b, 0, -b], [c, -2 * c, c]], dtype=torch.float64)
    torch.testing.assert_close(bases.make("dct", (3,)), expected)


def test_orthonormal_depends_on_the_seed_alone() -> None:
    first, again, other = (bases.make("orthonormal", (3, 3), torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_a_tensor_is_taken_flat_or_as_filters_and_copied() -> None:
    filters = torch.eye(9) + 0.1
    for given_basis in (filters, filters.view(9, 3, 3)):
        made = bases.make(given_basis, (3, 3))
        assert torch.equal(made, filters.double())
        made.zero_()
    assert filters[0, 0] == 1.1


@pytest.mark.parametrize(
    ("basis", "text"),
    [
        ("wavelet", "'wavelet'"),
        (torch.eye(8), r"shape \(8, 8\)"),
        (torch.eye(9, dtype=torch.int64), "torch.int64"),
        (torch.eye(9, dtype=torch.complex64), "torch.complex64"),
        (torch.full((9, 9), math.nan), "NaN"),
        (torch.ones(9, 9), "linearly dependent"),
        (torch.eye(9) * torch.tensor([0.0] + [1.0] * 8), "filter 0 has norm 0"),
        (torch.eye(9) + 1e5, "linearly dependent, or nearly so"),
    ],
)
def test_bad_bases_are_refused(basis: object, text: str) -> None:
    with pytest.raises(BasisError, match=text):
        bases.make(basis, (3, 3))  # type: ignore[arg-type]


def test_the_scale_of_filters_is_no_ill_condition() -> None:
    bases.make(torch.eye(9) * torch.logspace(-6, 6, 9)[:, None], (3, 3))


@given(
    out=st.integers(1, 9),
    channels=st.integers(1, 9),
    kernel=st.sampled_from(KERNELS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    channels_last=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_compose_equals_the_slow_sum(
    out: int, channels: int, kernel: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> None:
    n = math.prod(kernel)
    coefficients, basis = torch.randn(out, channels, *kernel, dtype=dtype), torch.randn(n, n, dtype=dtype)
    if channels_last and len(kernel) > 1:
        memory_format = torch.channels_last if len(kernel) == 2 else torch.channels_last_3d
        coefficients = coefficients.contiguous(memory_format=memory_format)
    composed = bases.compose(coefficients, basis)
    torch.testing.assert_close(composed, slow(coefficients, basis))
    assert composed.shape == coefficients.shape and composed.stride() == coefficients.stride()
    assert torch.equal(bases.compose(coefficients, torch.eye(n, dtype=dtype)), coefficients)


def test_compose_takes_any_strides() -> None:
    coefficients = torch.randn(3, 3, 4, 5).permute(3, 2, 1, 0)
    basis = torch.randn(9, 9)
    torch.testing.assert_close(bases.compose(coefficients, basis), slow(coefficients, basis))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_compose(memory_format: torch.memory_format) -> None:
    coefficients = torch.randn(3, 2, 2, 2, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    basis = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(bases.compose, (coefficients, basis), check_forward_ad=True)
    assert gradgradcheck(bases.compose, (coefficients, basis))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_fast_float32_gradients_are_those_of_float64(memory_format: torch.memory_format) -> None:
    coefficients = torch.randn(64, 48, 3, 3).contiguous(memory_format=memory_format)
    basis, weight_gradient = torch.randn(9, 9), torch.randn(64, 48, 3, 3)
    found, expected = [], []
    for dtype, gradients in ((torch.float32, found), (torch.float64, expected)):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (coefficients, basis)]
        composed = bases.compose(*inputs) if dtype == torch.float32 else slow(*inputs)
        gradients += torch.autograd.grad(composed, inputs, weight_gradient.to(dtype))
    for fast, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(fast.double(), exact, rtol=1e-4, atol=1e-3)


def test_second_derivatives_and_transforms_of_the_fast_path() -> None:
    coefficients, basis = torch.randn(4, 3, 3, 3), torch.randn(9, 9)
    many = torch.func.vmap(bases.compose, in_dims=(0, None))(torch.randn(5, 4, 3, 3, 3), basis)
    assert many.shape == (5, 4, 3, 3, 3)
    tangent = torch.randn_like(basis)
    with forward_ad.dual_level():
        dual = bases.compose(coefficients, forward_ad.make_dual(basis, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, slow(coefficients, tangent))


def test_transform_undoes_compose_in_place_a_few_rows_at_a_time() -> None:
    weight, basis = torch.randn(13, 3, 3, 3), bases.make("orthonormal", (3, 3))
    coefficients = weight.clone()
    storage = coefficients.data_ptr()
    assert bases.transform_(coefficients, bases.inverse(basis), rows_at_once=7) is coefficients
    assert coefficients.data_ptr() == storage
    torch.testing.assert_close(slow(coefficients, basis.float()), weight)
