"""Averagedness, contraction and monotonicity against closed forms and slope patterns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import firmly as fm
from firmly.certificates import averagedness
from firmly.certificates.averagedness import composed_alpha, expansion_alpha, virtual_layers
from firmly.certificates.forward_backward import virtual_network_bound
from firmly.errors import ShapeError, VerificationError
from firmly.linear import Convolution, Dense
from firmly.prox import L2, Box

from .systems import Net, double


def symmetric(eigenvalues, seed: int = 0) -> torch.Tensor:
    values = torch.tensor(eigenvalues, **double)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), **double))
    return Q[0] * values @ Q[0].T


def matrix_net(matrix: torch.Tensor) -> nn.Module:
    A = Dense(matrix)
    return Net(A, A)


# -- closed forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eigenvalues", [(0.9, 0.1, -0.4), (-0.2, -0.9, -0.5)])
def test_symmetric_matrices(eigenvalues):
    """Eigenvalues in [m, L], L < 1: alpha = (1 - m) / 2, contraction max(|m|, |L|), monotonicity m."""
    found = averagedness(matrix_net(symmetric(eigenvalues)), shape=(3,))
    low = min(eigenvalues)
    assert found.alpha == pytest.approx((1 - low) / 2, abs=2e-4)
    assert found.alpha >= (1 - low) / 2 * (1 - 1e-6)
    assert found.lower == pytest.approx((1 - low) / 2, abs=1e-3)
    assert found.contraction == pytest.approx(max(map(abs, eigenvalues)))
    assert found.monotonicity == pytest.approx(low, abs=1e-5)
    assert "only fixed point" in found.converges


def test_rotation():
    """r times a rotation by w: |r e^iw - (1 - a)| <= a."""
    r, w = 0.9, 1.0
    R = r * torch.tensor([[math.cos(w), -math.sin(w)], [math.sin(w), math.cos(w)]], **double)
    found = averagedness(matrix_net(R), shape=(2,))
    needed = (1 - 2 * r * math.cos(w) + r**2) / (2 - 2 * r * math.cos(w))
    assert found.alpha == pytest.approx(needed, abs=2e-4)
    assert found.monotonicity == pytest.approx(r * math.cos(w), abs=0.05)
    assert found.monotonicity <= r * math.cos(w) + 1e-9


@pytest.mark.parametrize("t", [0.5, 1.0, 1.9])
def test_s9_one_forward_backward_layer(t):
    """2 / (4 - t) from the composition against (t + 2) / 4 from the expansion, for any prox and spectrum in [0, 1]."""
    A = Dense(torch.linalg.cholesky(symmetric((1.0, 0.5, 1e-6))).T.contiguous())
    net = fm.unroll(fm.algorithms.ForwardBackward(A, L2(0.1), step_size=t), depth=1, learn=())
    found = averagedness(net)
    assert found.alphas["composition"] == pytest.approx(2 / (4 - t), abs=1e-5)
    assert found.alphas["expansion"] == pytest.approx((t + 2) / 4, abs=1e-5)
    assert found.alphas["inequality"] <= 2 / (4 - t) + 3e-4
    assert found.lower <= found.alpha <= min(found.alphas.values())
    found.verify(net)


# -- soundness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_no_slope_pattern_needs_more(seed):
    """x -> W2 D (W1 x) for every diagonal D in {0, 1}: its alpha is at most the one that was proved."""
    torch.manual_seed(seed)
    n = 3
    W1, W2 = (torch.randn(n, n, **double) for _ in range(2))
    W1, W2 = W1 / torch.linalg.matrix_norm(W1, 2), 0.9 * W2 / torch.linalg.matrix_norm(W2, 2)
    first, second = Dense(W1), Dense(W2)
    found = averagedness(Net(lambda x: second(torch.relu(first(x))), first, second), shape=(n,))
    patterns = [torch.tensor([(k >> i) & 1 for i in range(n)], **double) for k in range(2**n)]
    jacobians = torch.stack([W2 @ torch.diag(p) @ W1 for p in patterns])
    eye = torch.eye(n, **double)
    grid = torch.linspace(0, 1, 2001, **double)
    worst = torch.stack([torch.linalg.matrix_norm(jacobians - (1 - a) * eye, 2).max() - a for a in grid])
    needed = float(grid[int((worst <= 0).nonzero()[0])]) - 1 / 2000
    assert needed <= found.alpha <= 1
    assert found.contraction >= float(torch.linalg.matrix_norm(jacobians, 2).max())
    inner = torch.linalg.eigvalsh((jacobians + jacobians.mT) / 2).min()
    assert found.monotonicity <= float(inner) + 1e-9


def test_image_network_verifies_and_is_bound_to_its_weights():
    blur = Convolution(torch.ones(3, 3, **double) / 9, (1, 8, 8))
    net, other = (
        fm.unroll(fm.algorithms.ForwardBackward(blur, Box(0, 1), step_size=s), depth=2, learn=()) for s in (1.0, 0.7)
    )
    found = averagedness(net)
    assert found.alphas["inequality"] <= found.alphas["composition"] <= found.alphas["expansion"]
    found.verify(net)
    with pytest.raises(VerificationError):
        found.verify(other)


def test_expansive_maps_are_not_averaged():
    found = averagedness(matrix_net(symmetric((1.5, 0.5))), shape=(2,))
    assert found.alpha == math.inf
    assert found.certificate is None
    assert "not proved" in found.converges
    assert found.monotonicity == pytest.approx(0.5, abs=1e-5)


def test_minus_identity_is_nonexpansive_and_no_more():
    assert averagedness(matrix_net(symmetric((-1.0, -1.0))), shape=(2,)).alpha == pytest.approx(1.0, abs=2e-4)


def test_shapes_must_agree():
    with pytest.raises(ShapeError, match="averagedness compares"):
        averagedness(matrix_net(torch.ones(2, 3, **double)), shape=(3,))


# -- the virtual network with leakage ------------------------------------------------------------------------------


@pytest.mark.parametrize("leak", [1.0, 0.8])
def test_virtual_network(leak):
    """The closed form of the notes, 2.3: with h and r of every eigenvalue, |U - k Id|^2 = (h + sqrt(h^2 - 4 r)) / 2."""
    b, t, m = torch.tensor([1.0, 0.25, 0.01], **double), 0.9, 2
    beta, steps = (1 - t * b).expand(m, 3), torch.full((m,), t, **double)
    eta = leak ** torch.arange(m + 1, dtype=torch.float64)
    theta = 2 ** (m - 1) * virtual_network_bound(beta, steps, eta, output="state")
    B, e = beta.prod(0), eta[m] / eta[0]
    lt = steps * eta[0] / eta[:-1]
    response = lt[1] * (eta[1] / eta[0]) + lt[0] * beta[1]

    def norm(k):
        h, r = (B - k) ** 2 + response**2 + (e - k) ** 2, (B - k) ** 2 * (e - k) ** 2
        return (0.5 * (h + (h**2 - 4 * r).clamp(min=0).sqrt())).max().sqrt()

    found = expansion_alpha(*virtual_layers(beta, steps, eta))
    grid = torch.linspace(0.5, 1, 5001, **double)
    holds = [bool(norm(2**m * (1 - a)) - norm(0.0) + 2 * theta <= 2**m * a) for a in grid]
    expected = float(grid[holds.index(True)]) if True in holds else math.inf
    assert found == (math.inf if expected == math.inf else pytest.approx(expected, abs=2e-4))


def test_virtual_network_with_small_steps_is_averaged():
    beta, steps = torch.full((1, 2), 0.2, **double), torch.full((1,), 0.05, **double)
    weights, slopes = virtual_layers(beta, steps, torch.tensor([1.0, 0.5], **double))
    assert expansion_alpha(weights, slopes) < 1
    assert composed_alpha(weights, slopes) < 1
