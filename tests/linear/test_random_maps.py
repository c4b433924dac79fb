"""Random expressions of maps: what is claimed of them (norm, symbols, positivity) against their matrices."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import firmly.linear as linear
from firmly.errors import NotDiagonal
from firmly.linear import FourierBasis, LinearMap
from firmly.linear.norms import krylov_lower_bound

SHAPE = (1, 4, 3)


def expression(rng: random.Random, depth: int) -> LinearMap:
    """A random map from SHAPE to SHAPE; operands are shared, so that Gram maps and singular bases arise."""
    leaves = _leaves(rng.randrange(3))
    if depth == 0:
        return rng.choice(leaves)
    a, b = expression(rng, depth - 1), expression(rng, rng.randrange(depth))
    build = [
        lambda: a @ b,
        lambda: a + b,
        lambda: a.T @ a,
        lambda: a.T @ b @ a,
        lambda: rng.uniform(-2, 2) * a,
        lambda: a.T,
        lambda: linear.Stack([a, b]).T @ linear.Stack([b, a]),
        lambda: linear.Resolvent(a, rng.uniform(0.1, 2)),
    ]
    return rng.choice(build)()


def _leaves(seed: int) -> list[LinearMap]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return [
        linear.Identity(SHAPE),
        linear.Convolution(normal(3, 3), SHAPE),
        linear.Convolution(normal(2, 3), SHAPE),
        linear.Convolution(normal(3, 3), SHAPE, "zero"),
        linear.Convolution(normal(3, 3), SHAPE, "reflect"),
        linear.Mask(normal(*SHAPE) > 0),
        linear.Diagonal(normal(*SHAPE)),
        linear.Gradient(SHAPE).T @ linear.Gradient(SHAPE),
        linear.Gradient(SHAPE, "circular").T @ linear.Gradient(SHAPE, "circular"),
    ]


@pytest.mark.parametrize("seed", range(150))
def test_random_expression(seed: int) -> None:
    rng = random.Random(seed)
    a = expression(rng, depth=3)
    matrix = a.matrix()
    true = float(torch.linalg.matrix_norm(matrix, 2))
    slack = 1e-11 * (true + 1)
    lower, upper = a.norm()
    assert lower <= true + slack
    assert true <= upper + slack
    if isinstance(a, linear.Compose | linear.Sum):
        loose = a._upper()
        assert true <= loose + slack
        assert krylov_lower_bound(a, scale=loose) <= true
    dense = a.symbol(linear.DenseBasis())
    assert float(torch.linalg.matrix_norm(dense.value[0] - matrix, 2)) <= float(dense.error) + slack
    try:
        symbol = a.symbol(FourierBasis(SHAPE[1:], full=True))
    except NotDiagonal:
        return
    transform = torch.fft.fftn(torch.eye(12, dtype=torch.complex128).reshape(12, 4, 3), dim=(1, 2), norm="ortho")
    transform = transform.reshape(12, 12).T
    acted = transform @ matrix.to(torch.complex128) @ transform.mH
    expected = torch.diag(symbol.value.expand(12, -1, -1).flatten().to(torch.complex128))
    assert float((acted - expected).abs().max()) <= slack


@pytest.mark.parametrize("seed", range(100))
def test_gram_maps_are_positive_semidefinite(seed: int) -> None:
    a = expression(random.Random(1000 + seed), depth=2)
    if linear.is_gram(a):
        matrix = a.matrix()
        size = float(torch.linalg.matrix_norm(matrix)) + 1
        assert float((matrix - matrix.T).abs().max()) <= 1e-12 * size
        assert float(torch.linalg.eigvalsh((matrix + matrix.T) / 2).min()) >= -1e-12 * size


@pytest.mark.parametrize("seed", range(60))
def test_singular_symbols_hold_or_are_refused(seed: int) -> None:
    """A polynomial in K and K* that keeps the domain has exactly the eigenvalues that its singular symbol says."""
    rng = random.Random(2000 + seed)
    k = rng.choice(_leaves(seed)[1:5])
    words: list[LinearMap] = [k, k.T, linear.Identity(SHAPE)]
    a = rng.choice(words)
    for _ in range(rng.randrange(1, 5)):
        word = rng.choice(words)
        a = rng.choice([linear.Compose(a, word), linear.Compose(word, a), linear.Sum(a, word)])
    basis = linear.singular_basis(k)
    try:
        symbol = a.symbol(basis)
    except NotDiagonal:
        return
    claimed, error = symbol.value.flatten().abs(), symbol.error + 1e-10
    for value in torch.linalg.svdvals(a.matrix()):
        assert float(((claimed - value).abs() - error).min()) <= 0
