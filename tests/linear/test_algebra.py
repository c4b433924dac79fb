"""Maps built from maps, resolvents, and maps that are positive semidefinite by construction."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import firmly.linear as linear
from firmly.errors import ConditionError, DataError, NotDiagonal, ShapeError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A = linear.Convolution(normal(3, 3, seed=1), (1, 5, 4), "zero")
B = linear.Convolution(normal(3, 3, seed=2), (1, 5, 4))


def test_operators_are_matrix_operations() -> None:
    a, b = A.matrix(), B.matrix()
    torch.testing.assert_close((A @ B).matrix(), a @ b)
    torch.testing.assert_close((A + B).matrix(), a + b)
    torch.testing.assert_close((2.5 * A).matrix(), 2.5 * a)
    torch.testing.assert_close(linear.Stack([A, B]).matrix(), torch.cat([a, b]))
    torch.testing.assert_close((A @ B).T.matrix(), (a @ b).T)
    assert A.T.T is A
    assert (A @ B).T.T is not A


def test_maps_that_do_not_fit_are_refused() -> None:
    other = linear.Dense(normal(3, 4))
    for build in (lambda: A @ other, lambda: A + other, lambda: linear.Stack([A, other])):
        with pytest.raises(ShapeError):
            build()
    with pytest.raises(ShapeError, match="one real number"):
        linear.Scale(torch.ones(2), A)
    with pytest.raises(ShapeError):
        linear.Convolution(normal(2, 3, 3, 3), (2, 8, 8))
    with pytest.raises(ShapeError):
        linear.Blur(normal(2, 1, 3, 3), (1, 8, 8))
    with pytest.raises(ShapeError, match="multiples of 8"):
        linear.Wavelet("haar", (1, 12, 16), 3)
    with pytest.raises(DataError, match="0 and 1"):
        linear.Mask(torch.tensor([0.0, 0.5]))
    with pytest.raises(ValueError, match="unknown padding"):
        linear.Convolution(normal(3, 3), (1, 8, 8), "same")


def test_factors_learn_and_move() -> None:
    factor = nn.Parameter(torch.tensor(2.0))
    scaled = linear.Scale(factor, A)
    assert dict(scaled.named_parameters())["factor"] is factor
    scaled(normal(1, 1, 5, 4)).sum().backward()
    assert factor.grad is not None


def test_norms_of_learnable_maps() -> None:
    """Silent: torch warns when a learnable scalar is read carelessly, and warnings are errors here."""
    scalar = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    kernel = nn.Parameter(normal(2, 1, 3, 3))
    for shape in ((1, 6, 5), (1, 64, 64)):
        for padding in ("circular", "zero", "reflect"):
            a = linear.Convolution(kernel, shape, padding)
            for learnable in (a, linear.Scale(scalar, a), a.T @ a, linear.Resolvent(a, scalar), linear.Stack([a, a])):
                assert 0 < learnable.norm().lower <= learnable.norm().upper
    assert linear.Diagonal(nn.Parameter(normal(1, 5, 4))).norm().upper > 0
    assert linear.singular_basis(linear.Diagonal(scalar, (1, 5, 4))).blocks == 2


def test_a_copy_is_its_own_map() -> None:
    kernel = nn.Parameter(normal(3, 3))
    a = linear.Convolution(kernel, (1, 5, 4))
    assert a.T.T is a
    b = copy.deepcopy(a)
    assert b.T.T is b
    with torch.no_grad():
        kernel.zero_()
        assert float(b(normal(1, 1, 5, 4)).abs().sum()) > 0
        assert float(b.T(normal(1, 1, 5, 4)).abs().sum()) > 0


@pytest.mark.parametrize(
    "of",
    [
        A,
        B,
        linear.Dense(normal(3, 6)),
        linear.Mask(normal(1, 4, 4) > 0),
        linear.Convolution(normal(3, 2, 3, 3), (2, 4, 4)),
        linear.FourierSampling(normal(4, 4) > 0),
        0.5 * linear.Mask(normal(1, 4, 4) > 0),
        linear.Gradient((1, 5, 4), "circular") @ B,
    ],
    ids=repr,
)
def test_resolvent_inverts(of: linear.LinearMap) -> None:
    resolvent = linear.Resolvent(of, 0.3)
    x = normal(2, *of.domain).to(torch.complex128 if of.is_complex else torch.float64)
    z = resolvent(x)
    torch.testing.assert_close(of.T(of(z)) + 0.3 * z, x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("padding", ["circular", "zero"])
def test_resolvent_is_differentiable(padding: str) -> None:
    def solve(kernel: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return linear.Resolvent(linear.Convolution(kernel, (1, 3, 4), padding), weight)(x)

    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(solve, (normal(3, 3).requires_grad_(), weight, normal(2, 1, 3, 4).requires_grad_()))


def test_resolvent_follows_its_map() -> None:
    a = linear.Dense(normal(3, 4))
    resolvent = linear.Resolvent(a, 1.0)
    x = normal(1, 4)
    resolvent(x)
    a.weight.data.mul_(2)
    z = resolvent(x)
    torch.testing.assert_close(a.T(a(z)) + z, x)


def test_resolvent_refuses() -> None:
    for weight in (0.0, -1.0, float("nan"), torch.ones(2)):
        with pytest.raises(ConditionError, match="positive"):
            linear.Resolvent(A, weight)
    large = linear.Convolution(normal(3, 3), (1, 64, 64), "zero")
    with pytest.raises(NotDiagonal, match=r"only A and A\.T"):
        linear.Resolvent(large, 1.0)(normal(1, 1, 64, 64))
    bracket = linear.Resolvent(large, 0.5).norm()
    assert bracket.lower <= bracket.upper == pytest.approx(2.0)


def test_gram_maps_are_recognised() -> None:
    mask = linear.Mask(normal(1, 5, 4) > 0)
    identity = linear.Identity((1, 5, 4))
    for positive in (
        A.T @ A,
        A @ A.T,
        A.T @ mask @ A,
        A.T @ (B.T @ B) @ A,
        0.5 * (A.T @ A) + identity,
        linear.Resolvent(A, 1.0),
        mask,
    ):
        assert linear.is_gram(positive)
        assert float(torch.linalg.eigvalsh(positive.matrix()).min()) >= -1e-12
    for other in (A, A @ A, A.T @ B, -1.0 * (A.T @ A), A @ mask @ A, linear.Diagonal(-torch.ones(1, 5, 4))):
        assert not linear.is_gram(other)


def test_blur_kernels() -> None:
    for blur in (
        linear.Blur.gaussian(1.6, (3, 32, 32)),
        linear.Blur.motion(9.0, 30.0, (1, 32, 32)),
        linear.Blur.gaussian(1.0, (1, 16)),
    ):
        assert float(blur.kernel.sum()) == pytest.approx(1.0)
        assert bool((blur.kernel >= 0).all())
        assert blur.norm().upper == pytest.approx(1.0)
    horizontal = linear.Blur.motion(6.0, 0.0, (1, 16, 16)).kernel
    centre = horizontal.shape[0] // 2
    assert float(horizontal[centre].sum()) == pytest.approx(1.0)
    torch.testing.assert_close(horizontal, horizontal.flip(0, 1))
    torch.testing.assert_close(linear.Blur.motion(6.0, 90.0, (1, 16, 16)).kernel, horizontal.T)
    for width in (0.0, -1.0):
        with pytest.raises(ConditionError):
            linear.Blur.gaussian(width, (1, 8, 8))
