"""Spectral entropies and robust precision matrices: closed forms, scikit-learn, noise, descent."""

from __future__ import annotations

import pytest
import torch
from scipy.special import lambertw
from sklearn.covariance import graphical_lasso
from torch.autograd import gradcheck

import firmly as fm
from firmly.errors import ConditionError, DataError, SettingsError
from firmly.prox import L1, MCP, LogDet, NoisyLogDet, VonNeumann, Zero
from firmly.robust import SpectralDouglasRachford, robust_precision

f64 = torch.float64


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


def sparse_precision(n: int = 8) -> torch.Tensor:
    C = torch.eye(n, dtype=f64) * 2 + torch.diag_embed(torch.full((n - 1,), 0.8, dtype=f64), 1)
    return C.triu() + C.triu(1).T


def samples(precision: torch.Tensor, count: int, noise: float = 0.0, seed: int = 0) -> torch.Tensor:
    x = randn(count, len(precision), seed=seed) @ torch.linalg.cholesky(torch.linalg.inv(precision)).T
    x = x + noise**0.5 * randn(*x.shape, seed=seed + 1)
    return (x.T @ x / count).unsqueeze(0)


def test_von_neumann_is_lambert():
    for gamma in (0.05, 1.0, 30.0):
        s = torch.linspace(-8, 8, 33, dtype=f64)
        found = VonNeumann(gamma).prox(torch.diag_embed(s).unsqueeze(0))[0].diagonal()
        inside = ((s / gamma - 1) < 600).numpy()
        expected = gamma * lambertw((s / gamma - 1).clamp(max=600).exp().numpy() / gamma).real
        assert found.numpy()[inside] == pytest.approx(expected[inside], rel=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("prior", [VonNeumann(0.3), NoisyLogDet(0.3, 0.7), NoisyLogDet(2.0, 50.0)], ids=str)
def test_the_prox_is_stationary_at_any_scale(prior, scale):
    s = scale * torch.linspace(-3, 3, 41, dtype=f64)
    for step in (1e-8, 1.0, 1e4):
        x = prior.prox(torch.diag_embed(s).unsqueeze(0), step)[0].diagonal()
        gamma = step * prior.weight
        if isinstance(prior, VonNeumann):
            slope = gamma * (x.clamp(min=1e-300).log() + 1)
        else:
            slope = -gamma / (x * (1 + prior.noise_variance * x))
        positive = x > 1e-290  # below, the root is too small for a double
        size = torch.maximum(slope.abs(), s.abs()) + x
        assert bool(x.isfinite().all()) and bool((x >= 0).all())
        assert float(((x - s + slope).abs() / size)[positive].max()) < 1e-11


def test_no_noise_is_the_log_determinant():
    z = randn(3, 5, 5)
    assert torch.allclose(NoisyLogDet(0.7).prox(z, 1.3), LogDet(0.7).prox(z, 1.3), atol=1e-13)
    positive = z @ z.mT + torch.eye(5, dtype=f64)
    assert torch.allclose(NoisyLogDet(0.7).value(positive), LogDet(0.7).value(positive))


@pytest.mark.parametrize("make", [VonNeumann, lambda w: NoisyLogDet(w, 0.4)], ids=["von neumann", "noisy"])
def test_gradients_reach_weights_and_repeated_eigenvalues(make):
    weight = torch.tensor(0.6, dtype=f64, requires_grad=True)
    z = torch.stack([torch.eye(3, dtype=f64), randn(3, 3)]).requires_grad_()
    assert gradcheck(lambda z, w: make(w).prox(z), (z, weight))


def test_the_graphical_lasso_of_scikit_learn():
    S, weight = samples(sparse_precision(), 200), 0.08
    off = weight * (1 - torch.eye(8, dtype=f64))
    algorithm = SpectralDouglasRachford(LogDet(), L1(off), 8)
    found = fm.solve(algorithm, S, tol=1e-12)
    assert found.converged
    _, expected = graphical_lasso(S[0].numpy(), weight, tol=1e-10, enet_tol=1e-12, max_iter=1000)
    assert found.x[0].numpy() == pytest.approx(expected, abs=1e-6)
    # the duality gap: W = S + U, |U| <= weight off the diagonal, U = 0 on it
    W = S + (torch.linalg.inv(found.x) - S).clamp(-off, off)
    dual = torch.logdet(W) + 8
    primal = -torch.logdet(found.x) + (S * found.x).sum((1, 2)) + (off * found.x.abs()).sum((1, 2))
    assert float((primal - dual).abs().max()) < 1e-8
    assert torch.allclose(robust_precision(S, L1(off), tol=1e-8).matrix, found.x, atol=1e-6)


def test_other_entropies():
    S = samples(sparse_precision(), 100)
    # without a prior, von Neumann's entropy is stationary at exp(-1 - S)
    found = fm.solve(SpectralDouglasRachford(VonNeumann(), Zero(), 8), S, tol=1e-12)
    assert torch.allclose(found.x, torch.linalg.matrix_exp(-torch.eye(8, dtype=f64) - S), atol=1e-9)


def test_unrolled_and_implicit():
    S = samples(sparse_precision(), 200).requires_grad_()
    algorithm = SpectralDouglasRachford(LogDet(), L1(torch.tensor(0.05, dtype=f64, requires_grad=True)), 8)
    solution = fm.solve(algorithm, S.detach(), tol=1e-11).x
    net = fm.unroll(algorithm, depth=120, learn=("step_size",))
    assert torch.allclose(net(S), solution, atol=1e-4)
    layer = fm.implicit(algorithm, tol=1e-11)(S)
    slope = torch.autograd.grad(layer.diagonal(dim1=1, dim2=2).sum(), S)[0]
    bump = torch.zeros_like(S)
    bump[0, 0, 1] = bump[0, 1, 0] = 1e-5
    with torch.no_grad():
        ends = [fm.solve(algorithm, S + sign * bump, tol=1e-12).x.diagonal(dim1=1, dim2=2).sum() for sign in (1, -1)]
    assert float((slope * bump).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2, rel=1e-4)


def test_noise_is_accounted_for():
    truth, noise = sparse_precision(), 0.3
    S = samples(truth, 2000, noise)
    off = 0.01 * (1 - torch.eye(8, dtype=f64))
    aware, unaware = robust_precision(S, L1(off), noise), robust_precision(S, L1(off))
    for result in (aware, unaware):
        values = torch.stack(result.objectives)
        assert bool((values[1:] <= values[:-1] + 1e-9).all())
        assert float(torch.linalg.eigvalsh(result.matrix).min()) > 0
    error = [
        float(torch.linalg.matrix_norm(r.matrix - truth) / torch.linalg.matrix_norm(truth)) for r in (aware, unaware)
    ]
    assert error[0] < 0.15 < 0.35 < error[1]


def test_bad_input_is_refused():
    S = samples(sparse_precision(), 50)
    with pytest.raises(DataError):
        robust_precision(S[0], L1(0.1))
    with pytest.raises(DataError):
        robust_precision(randn(1, 4, 4), L1(0.1))
    with pytest.raises(SettingsError):
        robust_precision(S, L1(0.1), -1.0)
    with pytest.raises(ConditionError):
        NoisyLogDet(1.0, -1.0)
    with pytest.raises(ConditionError):
        fm.solve(SpectralDouglasRachford(LogDet(), MCP(0.5, 3.0), 8, relaxation=2.5), S)
    with pytest.raises(ConditionError):
        fm.solve(SpectralDouglasRachford(LogDet(), MCP(0.5, 3.0), 8), S)
