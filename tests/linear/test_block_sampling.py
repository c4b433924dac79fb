"""Block sampling: orthonormal patterns, zero filling, published counts, and the best linear inverse."""

from __future__ import annotations

import pytest
import torch

from firmly.errors import DataError, ShapeError
from firmly.linear import BlockSampling
from firmly.linear.block_sampling import measurements


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def patterns_of(kind: str) -> BlockSampling:
    return getattr(BlockSampling, kind)(20, (1, 16, 24), generator(), block=8)


def test_published_counts() -> None:
    counts = [measurements(r) for r in (0.5, 0.4, 0.3, 0.25, 0.1, 0.04, 0.01)]
    assert counts == [545, 436, 327, 272, 109, 43, 10]
    assert measurements(0.25, 32) == 256
    with pytest.raises(ShapeError, match="ratio"):
        measurements(0.0)


@pytest.mark.parametrize("kind", ["gaussian", "cosine", "hadamard"])
def test_patterns_are_orthonormal_seeded_and_have_norm_one(kind: str) -> None:
    A = patterns_of(kind)
    eye = torch.eye(20, dtype=torch.float64)
    torch.testing.assert_close(A.weight @ A.weight.mT, eye, rtol=0, atol=1e-13)
    torch.testing.assert_close(A.patterns, patterns_of(kind).patterns, rtol=0, atol=0)
    lower, upper = A.norm()
    assert 1 - 1e-10 < lower <= 1 <= upper < 1 + 1e-10
    if kind != "gaussian":
        torch.testing.assert_close(A.patterns[0], torch.full((8, 8), 1 / 8, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["gaussian", "cosine", "hadamard"])
def test_all_patterns_are_a_basis(kind: str) -> None:
    A = getattr(BlockSampling, kind)(64, (1, 8, 8), generator(), block=8)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=generator())
    torch.testing.assert_close(A.T(A(x)), x, rtol=1e-12, atol=1e-12)


def test_data_of_a_block_are_its_inner_products_and_images_are_filled_with_zeros() -> None:
    A = patterns_of("gaussian").on((1, 13, 18))
    x = torch.randn(2, 1, 13, 18, dtype=torch.float64, generator=generator())
    filled = torch.zeros(2, 1, 16, 24, dtype=torch.float64)
    filled[..., :13, :18] = x
    y = A(x)
    assert y.shape == (2, 20, 2, 3)
    for i in range(2):
        for j in range(3):
            block = filled[:, 0, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].flatten(1)
            torch.testing.assert_close(y[:, :, i, j], block @ A.weight.mT)


def test_linear_inverse_minimises_the_squared_error() -> None:
    images = [torch.rand(1, 40, 33, generator=generator(s)).double() for s in range(3)]
    A = BlockSampling.gaussian(6, (1, 8, 12), generator(), block=4)
    for noise in (0.0, 0.3):
        Q = A.linear_inverse(images, noise)
        assert (Q.domain, Q.codomain) == (A.codomain, A.domain)
        blocks = torch.cat([i.unfold(1, 4, 4).unfold(2, 4, 4).reshape(-1, 16) for i in images])
        y = blocks @ A.weight.mT
        expected = torch.linalg.lstsq(
            torch.cat([y, noise * len(y) ** 0.5 * torch.eye(6, dtype=torch.float64)]),
            torch.cat([blocks, torch.zeros(6, 16, dtype=torch.float64)]),
        ).solution
        torch.testing.assert_close(Q.T.weight, expected, rtol=1e-9, atol=1e-9)
    z = torch.randn(2, *A.codomain, dtype=torch.float64, generator=generator())
    torch.testing.assert_close(A(A.linear_inverse(images)(z)), z, rtol=1e-10, atol=1e-10)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ShapeError, match="patterns"):
        BlockSampling(torch.zeros(3, 4, 5), (1, 8, 8))
    with pytest.raises(ShapeError, match="images"):
        BlockSampling(torch.zeros(3, 4, 4), (2, 8, 8))
    with pytest.raises(ShapeError, match="power of two"):
        BlockSampling.hadamard(3, (1, 33, 33), generator(), block=33)
    with pytest.raises(ShapeError, match="1 to 16"):
        BlockSampling.gaussian(17, (1, 8, 8), generator(), block=4)
    with pytest.raises(DataError, match="do not determine"):
        BlockSampling.gaussian(6, (1, 8, 8), generator(), block=4).linear_inverse([torch.ones(1, 8, 8)])
