"""Invertible Bregman layers: proofs and refusals, inverses, log-determinants, certified inverses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import firmly as fm
from firmly.errors import ConditionError, DataError, NotConverged, SettingsError, ShapeError
from firmly.linear import Convolution, Dense, Identity, LinearMap, Monotone, Scale
from firmly.networks.bregman_inverse import Inverse, inverse, jacobian
from firmly.networks.bregman_invertible import Residual, invertibility
from firmly.networks.bregman_log_det import estimate_log_det, log_det
from firmly.networks.bregman_scaling import diagonal_scaling
from firmly.networks.bregman_weights import Triangular, invertible_weight
from firmly.prox.legendre import Legendre, legendre

SMOOTH = ["sigmoid", "tanh", "scaled_tanh", "atan", "isru", "asinh", "softplus", "bent"]
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


# -- proofs and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [-1.5, -1.0 - 1e-9])
def test_a_scalar_tanh_weight_below_minus_one_is_refused(weight: float):
    """It folds the line: the slope 1 + W is negative at zero, and 1 at infinity."""
    layer = Residual(Dense(torch.tensor([[weight]])), TANH)
    with pytest.raises(ConditionError, match=r"lam_min\(sym W\) > -1/L = -1 "):
        invertibility(layer)
    for call in (inverse, log_det, estimate_log_det):
        with pytest.raises(ConditionError):
            call(layer, torch.zeros(1, 1))


def test_the_refusal_says_by_how_much():
    with pytest.raises(
        ConditionError, match=r"lam_min\(sym W\) >= -1\.5, 0\.5 too little; \(a\) \|W\| L = 1\.5 < 1 fails"
    ):
        invertibility(Residual(Dense(torch.tensor([[-1.5]])), TANH))


def test_each_condition_is_found():
    spin = torch.tensor([[0.0, 5.0], [-5.0, 0.0]])
    for W, condition, margin in [
        (0.5 * spin / 5, "contraction", 1.0),
        (spin - 0.5 * torch.eye(2), "one-sided", 0.5),
        (torch.tensor([[-0.5, 0.0], [50.0, 0.1]]), "diagonal", 0.1),
    ]:
        proof = invertibility(Residual(Dense(W), TANH))
        assert proof.condition == condition
        assert margin - 1e-12 <= proof.margin <= margin + 1e-12 or (condition == "diagonal" and 0 < proof.margin < 0.5)


@pytest.mark.parametrize("L", ["tanh", "sigmoid", "scaled_tanh"])
def test_the_margin_is_the_eigenvalue(L: str):
    activation = legendre(L)
    for _ in range(20):
        W = torch.randn(6, 6) + 3 * torch.eye(6) / activation.lipschitz
        exact = 1 + activation.lipschitz * float(torch.linalg.eigvalsh((W + W.mT) / 2)[0])
        layer = Residual(Dense(W), activation)
        if exact > 1e-3:
            assert exact - 1e-10 <= invertibility(layer).margin <= exact + 1e-13
        elif diagonal_scaling(torch.eye(6) + activation.lipschitz * W) is None:
            with pytest.raises(ConditionError):
                invertibility(layer)


def test_what_is_proved_is_true_of_sampled_jacobians():
    """1,000 Jacobians for each of ten layers of every condition: determinants positive, inverses within the bounds."""
    for k in range(30):
        W = torch.randn(5, 5)
        if k % 3 == 0:
            W = 0.9 * W / torch.linalg.matrix_norm(W, 2)
        elif k % 3 == 1:
            W = invertible_weight(5, 1.0, 0.05, gain=3.0).matrix().detach()
        else:
            W = 5 * W.tril(-1) + torch.diag(4 * torch.rand(5) - 0.95)
        proof = invertibility(Residual(Dense(W), TANH))
        assert proof.condition == ("contraction", "one-sided", "diagonal")[k % 3]
        D = torch.rand(1000, 5) ** torch.randint(0, 8, (1000, 1))
        J = torch.eye(5) + W * D[:, None, :]
        assert bool((torch.linalg.det(J) > 0).all())
        back = torch.linalg.inv(J)
        assert bool((torch.linalg.matrix_norm(back, 2) <= proof.lipschitz).all())
        assert bool((torch.linalg.matrix_norm(D[:, :, None] * back, 2) <= proof.activation_lipschitz).all())
        assert bool((torch.linalg.matrix_norm(J, 2) <= proof.forward_lipschitz).all())


def test_a_diagonal_scaling_is_found_for_what_one_hides():
    A = torch.randn(12, 12)
    monotone = A @ A.mT / 12 + 0.3 * torch.eye(12) + 5 * (A - A.mT)
    hidden = monotone / (0.05 + torch.rand(12))[:, None]
    s = diagonal_scaling(hidden)
    assert s is not None
    scaled = s[:, None] * hidden / s
    assert float(torch.linalg.eigvalsh(scaled + scaled.mT)[0]) > 0
    assert diagonal_scaling(-torch.eye(3)) is None
    assert diagonal_scaling(torch.tensor([[1.0, 3.0], [3.0, 1.0]])) is None  # determinant -8: no P-matrix


@pytest.mark.parametrize("upper", [False, True])
def test_triangular_weights(upper: bool):
    W = torch.tril(3 * torch.randn(20, 20), -1) - 0.9 * torch.eye(20)
    layer = Residual(Dense(W.mT.contiguous() if upper else W), TANH)
    assert invertibility(layer).condition == "diagonal"
    u = torch.randn(4, 20)
    assert torch.allclose(log_det(layer, u), torch.log1p(-0.9 * TANH.derivative(u)).sum(1), atol=1e-12)
    with pytest.raises(ConditionError):
        invertibility(Residual(Dense(W - 0.2 * torch.eye(20)), TANH))


def test_layers_that_are_not_invertible_are_refused():
    with pytest.raises(ConditionError, match="clamping, batch normalisation"):
        invertibility(nn.BatchNorm1d(3))
    with pytest.raises(ConditionError, match="not known to be invertible"):
        inverse(nn.Hardtanh(), torch.zeros(1, 3))
    with pytest.raises(ShapeError, match="rectangular layers have no inverse"):
        Residual(Dense(torch.randn(3, 2)), TANH)
    with pytest.raises(ConditionError, match="unbounded slope"):
        invertibility(Residual(Dense(torch.zeros(2, 2)), legendre("exp")))
    with pytest.raises(ConditionError, match="NaN or infinite"):
        invertibility(Residual(Dense(torch.full((2, 2), math.nan)), TANH))
    rectangular = fm.networks.BregmaNet((3, 2), activation="tanh").layers[0]
    with pytest.raises(ConditionError):
        invertibility(rectangular)


def test_the_proof_is_made_anew_when_weights_change():
    layer = Residual(Dense(nn.Parameter(torch.zeros(1, 1))), TANH)
    assert invertibility(layer).margin == pytest.approx(1)
    with torch.no_grad():
        layer.outer.weight.fill_(-1.5)
    with pytest.raises(ConditionError):
        invertibility(layer)
    other = fm.networks.BregmanLayer(Dense(-1.5 * torch.ones(1, 1)), legendre("sigmoid"))
    assert invertibility(other).margin == pytest.approx(1 - 1.5 / 4)
    other.activation = TANH
    with pytest.raises(ConditionError):
        invertibility(other)


# -- inverses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SMOOTH, "leaky_relu"])
def test_round_trip_with_large_weights(name: str):
    activation = legendre(name)
    for shape in (1, 3, 40):
        layer = layer_of(shape, activation, gain=8.0)
        u = 3 * torch.randn(32, shape)
        assert distance(inverse(layer, u + layer(u)), u) < 1e-12


def test_round_trip_of_twenty_layers():
    """|W| L > 3 in every layer, to 1e-10; the count over 100 networks is in the documentation.

    With an unbounded activation the values grow from layer to layer, and the error is relative to them.
    """
    for name in ("tanh", "sigmoid", "softplus"):
        activation = legendre(name)
        layers = [layer_of(16, activation, gain=1.0) for _ in range(20)]
        assert min(layer.outer.norm().lower for layer in layers) * activation.lipschitz > 3
        u = values = torch.randn(16, 16)
        for layer in layers:
            values = values + layer(values)
        size = float(values.detach().abs().max()) if name == "softplus" else 1.0
        for layer in reversed(layers):
            values = inverse(layer, values)
        assert distance(values, u) < 1e-10 * size


def test_the_fixed_point_iteration_diverges_where_newton_converges():
    layer = layer_of(8, TANH, gain=4.0)
    u = torch.randn(4, 8)
    v = u + layer(u)
    picard = v
    for _ in range(200):
        picard = v - layer(picard)
    assert distance(picard, u) > 1
    assert distance(inverse(layer, v), u) < 1e-13


def test_round_trip_of_convolutions_and_single_precision():
    layer = layer_of((2, 12, 12), TANH, gain=3.0)
    assert layer.outer.norm().lower > 3
    u = 2 * torch.randn(3, 2, 12, 12)
    assert distance(inverse(layer, u + layer(u)), u) < 1e-12
    layer, u = layer.float(), u.float()
    back = inverse(layer, u + layer(u))
    assert back.dtype == torch.float32
    assert distance(back, u) < 1e-4


def test_every_element_of_a_batch_is_inverted_alone():
    layer = layer_of(5, TANH, gain=4.0)
    v = torch.randn(6, 5) * torch.logspace(-3, 3, 6)[:, None]
    together = inverse(layer, v)
    assert torch.allclose(together, torch.cat([inverse(layer, row[None]) for row in v]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["tanh", "softplus"])
def test_derivatives_of_the_inverse(name: str):
    layer = layer_of(3, legendre(name))
    v = torch.randn(1, 3, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, *_: inverse(layer, v), (v, *layer.parameters()))
    assert torch.autograd.gradgradcheck(lambda v, *_: inverse(layer, v), (v, *layer.parameters()), fast_mode=True)


def test_derivatives_of_the_inverse_by_krylov_spaces():
    layer = layer_of((2, 12, 12), TANH, gain=1.0)
    v = torch.randn(2, 2, 12, 12, requires_grad=True)
    direction = torch.randn_like(v)
    u = inverse(layer, v)
    (gradient,) = torch.autograd.grad(u, v, direction)
    exact = torch.linalg.solve(jacobian(layer, u.detach()).mT, direction.flatten(1)[:, :, None])[:, :, 0]
    assert torch.allclose(gradient.flatten(1), exact, atol=1e-10)


def test_bad_input_of_the_inverse():
    layer = layer_of(3, TANH)
    with pytest.raises(ShapeError, match="takes"):
        inverse(layer, torch.zeros(2, 4))
    with pytest.raises(DataError, match="NaN"):
        inverse(layer, torch.full((1, 3), math.nan))
    with pytest.raises(NotConverged, match="was not reached for 2 of 2 elements"):
        inverse(layer, 5 * torch.randn(2, 3), max_iterations=1)


@pytest.mark.parametrize("shape", [(4,), (1, 5, 5)])
@pytest.mark.parametrize("name", ["tanh", "scaled_tanh"])
def test_the_inverse_is_certified(shape: tuple[int, ...], name: str):
    layer = layer_of(shape, legendre(name), gain=1.0, margin=0.3)
    net = Inverse(layer)
    cert = fm.certify(net, shape=shape)
    fm.verify(cert, net)
    assert cert.lower <= cert.upper <= invertibility(layer).lipschitz
    u = torch.randn(20, *shape)
    back = torch.linalg.matrix_norm(torch.linalg.inv(jacobian(layer, u)), 2)
    assert float(back.detach().max()) <= cert.upper


def test_the_inverse_in_another_metric_is_certified():
    W = torch.tril(torch.randn(4, 4), -1) + torch.diag(torch.tensor([-0.7, 0.0, 2.0, -0.5]))
    layer = Residual(Dense(W + 2 * torch.tril(torch.ones(4, 4), -1)), TANH)
    proof = invertibility(layer)
    assert proof.condition == "diagonal"
    cert = fm.certify(Inverse(layer), shape=(4,))
    D = torch.rand(5000, 4)
    worst = torch.linalg.matrix_norm(torch.linalg.inv(torch.eye(4) + layer.outer.weight * D[:, None, :]), 2).max()
    assert max(cert.lower, float(worst)) <= cert.upper <= proof.lipschitz


def test_bad_settings():
    with pytest.raises(ConditionError, match="margin"):
        invertible_weight(3, 1.0, margin=0.0)
    with pytest.raises(ConditionError, match="margin"):
        invertible_weight(3, math.inf)
    with pytest.raises(SettingsError, match="rank"):
        invertible_weight((2, 4, 4), 1.0, rank=1)
    with pytest.raises(ConditionError, match="margin"):
        Triangular(torch.zeros(2, 2), torch.zeros(2), 1.0, margin=2.0)


@pytest.mark.parametrize("margin", [0.05, 0.5, 1.0])
def test_invertible_weights_keep_their_margin_whatever_they_learn(margin: float):
    for shape in (5, (2, 5), (1, 4, 4)):
        W = invertible_weight(shape, 0.25, margin, gain=10.0)
        with torch.no_grad():
            for p in W.parameters():
                p.add_(3 * torch.randn_like(p))
        M = W.matrix().detach()
        assert float(torch.linalg.eigvalsh((M + M.mT) / 2)[0]) >= -4 * (1 - margin) - 1e-9
        assert invertibility(Residual(W, legendre("sigmoid"))).margin >= margin - 1e-9


def test_a_monotone_map_by_construction_needs_no_eigenvalues():
    """Convolutions with zeros beyond the border, too large for a matrix, are proved by their form."""
    shape = (1, 60, 60)
    maps = [Convolution(torch.randn(1, 1, 3, 3), shape, "zero") for _ in range(2)]
    W: LinearMap = Scale(-1.0, Monotone(maps[0], 0.2, maps[1]))
    assert invertibility(Residual(W, TANH)).margin == pytest.approx(0.2, abs=1e-12)
    with pytest.raises(ConditionError, match="no eigenvalue bound of Sum"):
        invertibility(Residual(W + (-0.3) * Identity(shape), TANH))
