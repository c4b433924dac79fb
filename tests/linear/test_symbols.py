"""Symbols: their algebra, their coordinates, and the bounds of their errors against exact arithmetic."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor, nn

import firmly.linear as linear
from firmly.errors import NotDiagonal
from firmly.linear import DenseBasis, FourierBasis, SingularBasis
from firmly.linear.symbol import Symbol

EXACT = mpmath.mp.clone()
EXACT.dps = 40


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact_matrix(value: Tensor) -> mpmath.matrix:
    return EXACT.matrix([[EXACT.mpmathify(entry) for entry in row] for row in value.tolist()])


def distance(value: Tensor, exact: mpmath.matrix) -> float:
    """Frobenius distance, an upper bound of the spectral one."""
    return float(EXACT.norm(exact_matrix(value) - exact))


@pytest.mark.parametrize("complex_values", [False, True])
def test_error_bounds_of_products_sums_and_inverses(complex_values: bool) -> None:
    dtype = torch.complex128 if complex_values else torch.float64
    for seed in range(20):
        x, y, e, f = (normal(4, 4, seed=10 * seed + i, dtype=dtype) for i in range(4))
        small = 1e-9
        first = Symbol(x[None], torch.linalg.matrix_norm(small * e).reshape(1) * 1.01)
        second = Symbol(y[None], torch.linalg.matrix_norm(small * f).reshape(1) * 1.01)
        true_first = exact_matrix(x) + small * exact_matrix(e)
        true_second = exact_matrix(y) + small * exact_matrix(f)
        for symbol, true in [
            (first @ second, true_first * true_second),
            (first + second, true_first + true_second),
            (first.scale(0.3), EXACT.mpmathify(0.3) * true_first),
            (first.inverse(), true_first**-1),
            (first.H, true_first.H),
        ]:
            assert distance(symbol.value[0], true) <= 2 * float(symbol.error[0])  # spectral <= Frobenius <= 2 spectral
            assert float(symbol.error[0]) < 1e-4


def test_inverse_of_an_almost_singular_block_has_no_finite_error() -> None:
    block = torch.tensor([[[1.0, 1.0], [1.0, 1.0 + 1e-15]]], dtype=torch.float64)
    assert Symbol(block, torch.zeros(1, dtype=torch.float64)).inverse().error.isinf()


@pytest.mark.parametrize("size", [7, 30, 97])
def test_error_bound_of_fourier_symbols(size: int) -> None:
    kernel = normal(5)
    a = linear.Convolution(kernel, (1, size))
    symbol = a.symbol(FourierBasis((size,)))
    for f in range(size // 2 + 1):
        true = sum(
            EXACT.mpf(k) * EXACT.expjpi(EXACT.mpf(2 * f * (j - 2)) / size) for j, k in enumerate(kernel.tolist())
        )
        assert abs(EXACT.mpmathify(complex(symbol.value[f, 0, 0])) - true) <= symbol.error[0].item()
    assert symbol.error[0] < 1e-12


def test_coordinates_that_differ_do_not_meet() -> None:
    """The sum of the identity and a Fourier sampling is diagonal in no basis: accepting it would be unsound."""
    sampling = linear.FourierSampling(torch.ones(4, 4))
    blur = linear.Convolution(normal(3, 3), (1, 4, 4))
    identity = linear.Identity((1, 4, 4))
    basis = FourierBasis((4, 4), full=True)
    (sampling.T @ sampling + blur).symbol(basis)
    (sampling @ blur).symbol(basis)
    (sampling @ identity + sampling).symbol(basis)
    for wrong in (
        sampling + identity,
        identity + sampling,
        identity @ sampling + identity,
        blur @ sampling,
        sampling @ sampling,
        linear.Stack([identity, blur, sampling]),
        linear.Resolvent(sampling @ sampling, 1.0),
    ):
        with pytest.raises(NotDiagonal):
            wrong.symbol(basis)


def test_identity_plus_operator_is_not_diagonal_in_its_singular_vectors() -> None:
    k = linear.Dense(normal(4, 4))
    basis = linear.singular_basis(k)
    identity = linear.Identity((4,))
    assert (k.T @ k + identity).symbol(basis).rows == "right"
    for wrong in (k + identity, identity + k, identity @ k + identity, k @ k, k + k.T):
        with pytest.raises(NotDiagonal):
            wrong.symbol(basis)


def test_stack_is_not_one_number_in_a_singular_basis() -> None:
    k = linear.Dense(normal(8, 4))
    with pytest.raises(NotDiagonal):
        linear.Stack([linear.Identity((4,)), linear.Identity((4,))]).symbol(linear.singular_basis(k))


def test_asymmetric_sampling_needs_all_frequencies() -> None:
    mask = torch.zeros(4, 5)
    mask[1, 2] = 1
    a = linear.FourierSampling(mask)
    with pytest.raises(NotDiagonal, match="full=True"):
        a.symbol(FourierBasis((4, 5)))
    mask[3, 3] = 1
    linear.FourierSampling(mask).symbol(FourierBasis((4, 5)))


def test_padded_convolutions_are_not_diagonal() -> None:
    for padding in ("zero", "reflect"):
        with pytest.raises(NotDiagonal, match="circular"):
            linear.Convolution(normal(3, 3), (1, 4, 4), padding).symbol(FourierBasis((4, 4)))
    with pytest.raises(NotDiagonal):
        linear.Convolution(normal(3, 3), (1, 4, 4)).symbol(FourierBasis((4, 6)))


def test_symbols_are_differentiable_in_the_weights() -> None:
    kernel = nn.Parameter(normal(2, 1, 3, 3))
    weight = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
    basis = FourierBasis((4, 4))

    def response(kernel: Tensor, weight: Tensor) -> Tensor:
        a = linear.Convolution(kernel, (1, 4, 4))
        return torch.view_as_real(linear.Resolvent(a, weight).symbol(basis).value.to(torch.complex128))

    assert torch.autograd.gradcheck(response, (kernel, weight))
    matrix = linear.Convolution(kernel, (1, 4, 4), "zero").symbol(DenseBasis()).value
    assert matrix.requires_grad


@pytest.mark.parametrize(
    "operator",
    [
        linear.Dense(normal(5, 7)),
        linear.Dense(normal(4, 4, dtype=torch.complex128)),
        linear.Convolution(normal(3, 3), (1, 6, 5)),
        linear.Convolution(normal(3, 2, 3, 3), (2, 5, 4)),
        linear.Convolution(normal(3, 3), (1, 6, 5), "zero"),
        linear.Mask(normal(1, 4, 4) > 0),
        linear.FourierSampling(normal(4, 4) > 0),
        linear.Gradient((1, 5, 4)),
    ],
    ids=repr,
)
def test_singular_basis_covers_the_spectrum(operator: linear.LinearMap) -> None:
    true = torch.linalg.svdvals(operator.matrix())
    for basis in (linear.singular_basis(operator), linear.singular_basis(operator, cells=10)):
        assert isinstance(basis, SingularBasis)
        outside = ((true[:, None] - basis.values).abs() - basis.radius).min(dim=1).values
        assert bool((outside <= 1e-13 * true.max()).all())
        assert float((basis.values - basis.radius).min()) <= 0  # null spaces
    assert float(linear.singular_basis(operator).radius.max()) < 1e-8


def test_singular_symbols_of_polynomials() -> None:
    k = linear.Dense(normal(6, 4))
    basis = linear.singular_basis(k)
    polynomial = linear.Identity((4,)) + -0.2 * (k.T @ k)
    values = polynomial.symbol(basis).value.flatten()
    true = torch.linalg.eigvalsh(polynomial.matrix())
    assert all(float((values - t).abs().min()) < 1e-12 for t in true)
    resolvent = linear.Resolvent(k, 0.5).symbol(basis)
    torch.testing.assert_close(resolvent.value.flatten(), 1 / (basis.values**2 + 0.5))
    wide = linear.singular_basis(k, cells=3)
    symbol = (k.T @ k).symbol(wide)
    inside = torch.linspace(0, k.norm().upper, 100, dtype=torch.float64)
    cell = ((inside[:, None] - wide.values).abs() - wide.radius).argmin(1)
    assert bool(((inside**2 - symbol.value[cell, 0, 0]).abs() <= symbol.error[cell]).all())


def test_searches_carry_no_error() -> None:
    assert linear.Convolution(normal(3, 3), (1, 4, 4)).symbol(FourierBasis((4, 4), track=False)).error is None
    stack = linear.Stack([linear.Identity((1, 4, 4)), linear.Convolution(normal(3, 3), (1, 4, 4))])
    assert stack.symbol(FourierBasis((4, 4), track=False)).error is None
    assert math.isfinite(float(stack.symbol(FourierBasis((4, 4))).error.max()))
