"""Log-determinants of invertible Bregman layers: exact ones, estimates, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from firmly.errors import ConditionError, NotDiagonal, SettingsError
from firmly.linear import Compose, Dense
from firmly.networks import bregman_log_det
from firmly.networks.bregman_inverse import inverse
from firmly.networks.bregman_invertible import Residual
from firmly.networks.bregman_log_det import estimate_log_det, log_det, series_log_det
from firmly.networks.bregman_weights import Triangular, invertible_weight
from firmly.prox.legendre import Legendre, legendre

TANH = legendre("tanh")


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def layer_of(shape, activation: Legendre, gain: float = 2.0, margin: float = 0.1, **options) -> Residual:
    W = invertible_weight(shape, activation.lipschitz, margin, gain, **options)
    bias = torch.randn(W.domain[0], *[1] * (len(W.domain) - 1))
    return Residual(W, activation, nn.Parameter(bias))


def distance(first: Tensor, second: Tensor) -> float:
    return float((first - second).detach().abs().max())


def determinants(layer: nn.Module, u: Tensor) -> Tensor:
    """log |det| of the Jacobian of u -> u + g(u), by autograd."""
    n = u[0].numel()
    J = torch.stack([torch.autograd.functional.jacobian(lambda x: x + layer(x), row[None]).reshape(n, n) for row in u])
    return torch.linalg.slogdet(J)[1]


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "scaled_tanh", "atan", "isru", "asinh", "softplus", "bent"])
def test_log_det_against_autograd(name: str):
    layer = layer_of(7, legendre(name), gain=3.0)
    u = torch.randn(5, 7)
    assert distance(log_det(layer, u), determinants(layer, u)) < 1e-10


def wide_layer() -> Residual:
    K, P = torch.randn(30, 3), torch.randn(3, 3)
    P = P @ P.mT + 4 * (P - P.mT)
    return Residual(Compose(Dense(P), Dense(K.mT.contiguous())), TANH, 0.0, Dense(K), torch.randn(30))


def test_log_det_of_low_rank_wide_and_convolutional_layers():
    low_rank = layer_of(20, TANH, rank=2, gain=3.0)
    triangular = Residual(Triangular(torch.randn(6, 6), torch.randn(6), 1.0), TANH)
    convolution = layer_of((2, 4, 4), TANH)
    for layer in (low_rank, triangular, wide_layer(), convolution):
        shape = layer.outer.codomain
        u = torch.randn(3, *shape)
        assert distance(log_det(layer, u), determinants(layer, u)) < 1e-10
        assert distance(inverse(layer, u + layer(u)), u) < 1e-11


def test_the_determinant_is_formed_where_it_is_narrowest(monkeypatch: pytest.MonkeyPatch):
    sizes = []
    real = torch.linalg.slogdet
    monkeypatch.setattr(torch.linalg, "slogdet", lambda J: sizes.append(J.shape[-1]) or real(J))
    log_det(layer_of(20, TANH, rank=2), torch.randn(3, 20))
    log_det(wide_layer(), torch.randn(3, 3))
    assert sizes == [6, 3]


def test_large_convolutions_are_exact_only_where_they_are_diagonal(monkeypatch: pytest.MonkeyPatch):
    layer = layer_of((2, 6, 6), TANH)
    constant, varying = torch.randn(3, 2, 1, 1).expand(3, 2, 6, 6), torch.randn(3, 2, 6, 6)
    exact = log_det(layer, constant)
    monkeypatch.setattr(bregman_log_det, "LARGEST_MATRIX", 16)
    assert torch.allclose(log_det(layer, constant), exact, atol=1e-10)
    with pytest.raises(NotDiagonal, match="estimate_log_det"):
        log_det(layer, varying)
    with pytest.raises(NotDiagonal, match="no gradient in u"):
        log_det(layer, constant.clone().requires_grad_())


def test_gradients_of_log_det():
    layer = layer_of(3, TANH)
    u = torch.randn(2, 3, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u, *_: log_det(layer, u), (u, *layer.parameters()))


def within(estimate: Tensor, error: Tensor, exact: Tensor) -> bool:
    return bool(((estimate - exact).abs() < 4.5 * error).all())


def test_the_estimate_is_unbiased_beyond_contractions():
    layer = layer_of(6, TANH, gain=1.5)
    assert layer.outer.norm().lower > 1.5
    u = torch.randn(3, 6)
    exact = log_det(layer, u)
    estimate = estimate_log_det(layer, u, 600, torch.Generator().manual_seed(1))
    assert within(estimate.value, estimate.standard_error, exact)
    assert float(estimate.standard_error.max()) < 0.3
    weight = layer.outer.of.A.weight
    expected = torch.autograd.grad(exact.sum(), weight)[0]
    batches = [estimate_log_det(layer, u, 20, torch.Generator().manual_seed(k)) for k in range(30)]
    found = torch.stack([torch.autograd.grad(b.value.sum(), weight)[0] for b in batches])
    assert within(found.mean(0), found.std(0) / math.sqrt(len(found)), expected)


def test_the_gradient_of_the_estimate_is_taken_once():
    """It reaches u, also where u itself depends on the same weight, and refuses to be differentiated again."""
    layer = Residual(Dense(nn.Parameter(torch.tensor([[0.8]]))), TANH)
    weight, generator = layer.outer.weight, torch.Generator().manual_seed(0)
    u = torch.tensor([[0.3]])

    def of_weight(w: Tensor) -> Tensor:
        return torch.log1p(w * TANH.derivative(u + w * torch.tanh(u)))

    exact = float(torch.autograd.functional.jacobian(of_weight, weight.detach()))
    for call in (log_det, lambda *args: estimate_log_det(*args, 4, generator).value):  # one entry: signs make no noise
        gradient = torch.autograd.grad(call(layer, u + layer(u)).sum(), weight, create_graph=True)[0]
        assert float(gradient.detach()) == pytest.approx(exact, rel=1e-12)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), weight)


def test_the_roulette_series_is_unbiased_and_only_for_contractions():
    W = torch.randn(5, 5)
    layer = Residual(Dense(nn.Parameter(0.7 * W / torch.linalg.matrix_norm(W, 2))), TANH)
    u = 0.3 * torch.randn(3, 5)
    exact = log_det(layer, u)
    estimate = series_log_det(layer, u, 3000, 2, torch.Generator().manual_seed(1))
    assert within(estimate.value, estimate.standard_error, exact)
    (expected,) = torch.autograd.grad(exact.sum(), layer.outer.weight)
    (gradient,) = torch.autograd.grad(estimate.value.sum(), layer.outer.weight)
    assert distance(gradient, expected) < 0.1 * float(expected.abs().max())
    with pytest.raises(ConditionError, match="estimate_log_det"):
        series_log_det(layer_of(5, TANH), u)


def test_an_estimate_needs_two_probes():
    with pytest.raises(SettingsError, match="2 probes"):
        estimate_log_det(layer_of(3, TANH), torch.zeros(1, 3), probes=1)
