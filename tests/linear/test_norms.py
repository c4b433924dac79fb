"""Certified norms: published values, brute force, and rounding that is really paid for."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import scipy.sparse
import torch
from torch import Tensor, nn

import firmly.linear as linear
from firmly.errors import NotCertifiable, NotDiagonal
from firmly.linear.norms import is_small, krylov_lower_bound, norm_of_blocks
from firmly.linear.symbol import Symbol


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ONES = torch.ones(3, 3, dtype=torch.float64)


def test_ones_kernel_circular_is_nine() -> None:
    lower, upper = linear.Convolution(ONES, (1, 32, 32)).norm()
    assert lower <= 9 <= upper
    assert upper - lower < 1e-11


def test_ones_kernel_zero_padding() -> None:
    """(1 + 2 cos(pi / 33))^2, where the spectral norm of the reshaped kernel is 3."""
    true = (1 + 2 * math.cos(math.pi / 33)) ** 2
    assert true == pytest.approx(8.945745084817752, abs=1e-14)
    lower, upper = linear.Convolution(ONES[None, None], (1, 32, 32), padding="zero").norm()
    assert lower <= true <= upper
    assert upper - lower < 1e-6
    assert torch.linalg.matrix_norm(ONES.reshape(1, -1), 2) == pytest.approx(3)


def test_random_kernel_circular_against_brute_force() -> None:
    a = linear.Convolution(normal(16, 16, 3, 3), (16, 8, 8))
    true = float(torch.linalg.matrix_norm(a.matrix(), 2))
    lower, upper = a.norm()
    assert lower <= true <= upper
    assert upper - lower < 1e-10
    wide = linear.Convolution(normal(16, 16, 3, 3), (16, 32, 32)).norm()
    assert wide.upper - wide.lower < 1e-9
    assert wide.lower > 1.2 * float(torch.linalg.matrix_norm(normal(16, 16, 3, 3).reshape(16, -1), 2))


@pytest.mark.parametrize("padding, gap", [("zero", 0.02), ("reflect", 0.05)])
def test_large_padded_convolutions(padding: str, gap: float) -> None:
    """Too large for a factorisation: a non-negative separable kernel, whose norm is the square of the 1-D norm."""
    line = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    a = linear.Convolution(line[:, None] * line, (1, 64, 64), padding)
    assert not is_small(a)
    true = float(torch.linalg.matrix_norm(linear.Convolution(line, (1, 64), padding).matrix(), 2)) ** 2
    lower, upper = a.norm()
    assert lower <= true <= upper
    assert upper - lower < gap * true


@pytest.mark.parametrize("padding", ["zero", "reflect"])
def test_large_multichannel_padded_convolutions_are_bounded(padding: str) -> None:
    """The upper bound of the large-map branch also holds where the truth is computable."""
    for seed in range(10):
        a = linear.Convolution(normal(3, 2, 3, 3, seed=seed), (2, 6, 5), padding)
        true = float(torch.linalg.matrix_norm(a.matrix(), 2))
        upper = a._upper()
        assert true <= upper
        assert krylov_lower_bound(a, scale=upper) <= true
        assert upper < (1.6 if padding == "zero" else 3) * true


def test_norm_follows_a_learnable_kernel() -> None:
    """Also through `.data`, which version counters do not see."""
    kernel = nn.Parameter(torch.full((1, 1, 3, 3), 1.0, dtype=torch.float64))
    a = linear.Convolution(kernel, (1, 8, 8), "zero")
    before = a.norm().upper
    kernel.data.mul_(3)
    assert a.norm().upper == pytest.approx(3 * before)
    assert a.norm() == a.norm()


def test_gradient_norms_in_closed_form() -> None:
    lower, upper = linear.Gradient((1, 7)).norm()
    assert lower <= 2 * math.cos(math.pi / 14) <= upper
    for shape in [(1, 6), (1, 5, 8), (2, 3, 4, 5), (1, 1, 4)]:
        for padding in ("neumann", "circular"):
            a = linear.Gradient(shape, padding)
            true = float(torch.linalg.matrix_norm(a.matrix(), 2))
            assert a.norm().upper == pytest.approx(true, rel=1e-12)
            assert a.norm().upper ** 2 <= 4 * (len(shape) - 1) + 1e-12


def test_radon_beyond_factorisation() -> None:
    a = linear.Radon((1, 64, 64), torch.linspace(0, 3.1, 40, dtype=torch.float64))
    assert not is_small(a)
    matrix = scipy.sparse.csr_array((a.values, a.columns, a.starts), shape=(math.prod(a.codomain), 64 * 64))
    true = float(scipy.sparse.linalg.svds(matrix, k=1, return_singular_vectors=False, random_state=0)[0])
    lower, upper = a.norm()
    assert lower <= true * (1 + 1e-9)
    assert true * (1 - 1e-9) <= upper
    assert upper - lower < 1e-6 * true


def test_radon_sums_the_image() -> None:
    """At a multiple of 90 degrees rays go through pixel centres: the data are sums of rows and columns."""
    image = normal(1, 1, 6, 5)
    data = linear.Radon((1, 6, 5), [0.0, math.pi / 2], detectors=7)(image)[0, 0]
    torch.testing.assert_close(data[0, 1:6], image[0, 0].sum(0))
    torch.testing.assert_close(
        data[1],
        torch.nn.functional.pad(image[0, 0].sum(1).flip(0), (0, 1)) * 0.5
        + torch.nn.functional.pad(image[0, 0].sum(1).flip(0), (1, 0)) * 0.5,
    )


def test_wavelet_matches_pywavelets() -> None:
    pywt = pytest.importorskip("pywt")
    image = normal(16, 8)
    for name in ("haar", "db3", "sym5", "coif1"):
        low, (vertical, horizontal, diagonal) = pywt.dwt2(image.numpy(), name, mode="periodization")
        blocks = torch.tensor(low), torch.tensor(horizontal), torch.tensor(vertical), torch.tensor(diagonal)
        expected = torch.cat([torch.cat(blocks[:2], 1), torch.cat(blocks[2:], 1)], 0)
        torch.testing.assert_close(linear.Wavelet(name, (1, 16, 8), 1)(image[None, None])[0, 0], expected)
        w = linear.Wavelet(name, (1, 16, 8), 3).matrix()
        torch.testing.assert_close(w @ w.T, torch.eye(128, dtype=torch.float64), rtol=0, atol=1e-9)


def test_norm_of_products_sums_and_stacks_beyond_factorisation() -> None:
    a = linear.Convolution(normal(3, 3), (1, 64, 64), "zero")
    b = linear.Mask(normal(1, 64, 64) > 0)
    for composed in (b @ a, a + b, linear.Stack([a, b]), linear.Stack([a, b]).T, a.T @ a, -2.0 * a):
        lower, upper = composed.norm()
        assert 0 < lower <= upper < math.inf
    assert (a.T @ a).norm().upper == pytest.approx(a.norm().upper ** 2)


def test_declared_norm_of_a_part_that_is_too_small_is_found() -> None:
    class Wrong(linear.Identity):
        def _norm(self) -> linear.Bracket:
            return linear.Bracket(0.0, 0.1)

        def _symbol(self, basis: linear.Basis) -> Symbol:
            raise NotDiagonal("unknown")

    big = linear.Mask(torch.ones(1, 64, 64))
    with pytest.raises(NotCertifiable, match="too small"):
        (linear.Convolution(ONES, (1, 64, 64), "zero") @ (big @ Wrong((1, 64, 64)))).norm()


def test_values_that_are_not_finite_are_refused() -> None:
    weight = normal(3, 3)
    weight[1, 1] = math.nan
    with pytest.raises(NotCertifiable, match="not finite"):
        linear.Dense(weight).norm()
    with pytest.raises(NotCertifiable, match="not finite"):
        linear.Convolution(weight, (1, 64, 64), "zero").norm()


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1.0, 1e200, 1e306])
def test_norm_of_blocks_on_many_small_matrices(scale: float) -> None:
    for seed in range(50):
        rows, columns = 1 + seed % 4, 1 + seed % 3
        value = normal(5, rows, columns, seed=seed) * scale
        lower, upper = norm_of_blocks(Symbol(value, torch.zeros(1, dtype=torch.float64)))
        true = float(torch.linalg.matrix_norm(value, 2).max())
        assert lower <= true * (1 + 1e-15)
        assert true <= upper * (1 + 1e-15)
        assert upper - lower < 1e-12 * true


def test_rounding_is_paid_for_in_exact_arithmetic() -> None:
    """[[a, b], [b, a]] has norm |a| + |b|, here compared as exact fractions."""
    for seed in range(200):
        a, b = normal(2, seed=seed).tolist()
        lower, upper = linear.Dense(torch.tensor([[a, b], [b, a]], dtype=torch.float64)).norm()
        true = abs(Fraction(a)) + abs(Fraction(b))
        assert Fraction(lower) <= true <= Fraction(upper)


def test_equal_blocks_and_multiple_top_values_terminate() -> None:
    value = (
        torch.eye(100, dtype=torch.float64)[None] * torch.tensor([3.0, 3.0, 1.0], dtype=torch.float64)[:, None, None]
    )
    lower, upper = norm_of_blocks(Symbol(value, torch.zeros(1, dtype=torch.float64)))
    assert lower <= 3 <= upper < 3 + 1e-9
    assert linear.Dense(torch.zeros(3, 4)).norm() == (0.0, 0.0)


def test_copies_of_a_large_matrix_have_its_norm_and_its_singular_values():
    weight = torch.randn(40, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, many = linear.Dense(weight), linear.Dense(weight, copies=60)
    assert many.norm() == one.norm()
    assert torch.equal(linear.singular_basis(many).values, linear.singular_basis(one).values)
    x = torch.randn(2, 60, 90, dtype=torch.float64)
    torch.testing.assert_close(many(x), one(x.flatten(0, 1)).reshape(2, 60, 40))
