"""Numbers that theory predicts for the iterations, computed from the steps themselves."""

from __future__ import annotations

import math

import pytest
import torch

from firmly.algorithms import ChambollePock, CondatVu, DouglasRachford, ForwardBackward, HeavyBall, Hqs, Tikhonov
from firmly.algorithms.algorithm import Algorithm
from firmly.algorithms.heavy_ball import HeavyBallState
from firmly.linear import Dense, Identity
from firmly.prox import NonNegative, Prior, SquaredL2, Zero

from .problems import data  # noqa: F401  (also sets the number of threads)

double = {"dtype": torch.float64}


def diagonal(spectrum: torch.Tensor) -> Dense:
    """A with A*A = diag(spectrum)."""
    return Dense(torch.diag(spectrum.sqrt()))


def state_matrix(algorithm: Algorithm, wrt: tuple[int, ...] | None = None) -> torch.Tensor:
    """The matrix of the linear part of the step on the flattened state (of the parts in `wrt`), from unit vectors."""
    y = torch.zeros(1, *algorithm.data_shape, **double)
    zero = algorithm.start(y)
    kept = range(len(zero)) if wrt is None else wrt
    columns = []
    for part in kept:
        for entry in range(zero[part].numel()):
            parts = [p.clone() for p in zero]
            parts[part].view(-1)[entry] = 1.0
            after = algorithm.step(type(zero)(*parts), y, 0)
            columns.append(torch.cat([after[i].flatten() for i in kept]))
    return torch.stack(columns, dim=1)


def norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


class Slopes(Prior):
    """A separable linear 'prox' with chosen slopes in [0, 1]: the extreme points of all firmly nonexpansive ones."""

    def __init__(self, slopes: torch.Tensor):
        super().__init__()
        self.slopes = slopes

    def _prox(self, z, step):
        return self.slopes * z


def all_slopes(n: int) -> list[torch.Tensor]:
    return [torch.tensor([(i >> j) & 1 for j in range(n)], **double) for i in range(2**n)]


def test_s6_proximal_gradient_contracts_by_the_tight_factor():
    """max(|1 - t mu|, |1 - t L|): 0.9 for t = 1.9 / L, L = 1, mu = 0.1; two steps squared 0.9^4 = 0.6561."""
    A = diagonal(torch.tensor([0.1, 0.55, 1.0], **double))
    steps = [norm(state_matrix(ForwardBackward(A, Slopes(s), step_size=1.9))) for s in all_slopes(3)]
    assert max(steps) == pytest.approx(0.9, abs=1e-12)
    worst = torch.linalg.matrix_power(state_matrix(ForwardBackward(A, Zero(), step_size=1.9)), 2)
    assert norm(worst) ** 2 == pytest.approx(0.6561, abs=1e-12)


@pytest.mark.parametrize("mu", [0.02, 0.1, 0.5])
def test_s6_douglas_rachford_contracts_by_the_factor_of_giselsson_and_boyd(mu):
    """(1 + delta) / 2 with delta = (1 - t mu) / (1 + t mu) at t = 1 / sqrt(mu L), attained by slopes 0 and 1."""
    spectrum = torch.tensor([mu, 0.7, 1.0], **double)
    t = 1 / math.sqrt(mu)
    delta = max((1 - t * mu) / (1 + t * mu), (t - 1) / (t + 1))
    norms = [
        norm(state_matrix(DouglasRachford(diagonal(spectrum), Slopes(s), step_size=t), wrt=(0,))) for s in all_slopes(3)
    ]
    assert max(norms) == pytest.approx((1 + delta) / 2, abs=1e-12)


def test_s6_hqs_amplifies_data_by_at_most_half_the_root_of_tau():
    """sup_s tau s / (1 + tau s^2) = sqrt(tau) / 2 for tau = 1 / penalty, at s = 1 / sqrt(tau)."""
    tau = 2.0
    spectrum = torch.cat([torch.linspace(0, 2, 50, **double), torch.tensor([1 / tau], **double)])
    algorithm = Hqs(diagonal(spectrum), NonNegative(), penalty=1 / tau)
    gains = algorithm.start(torch.eye(len(spectrum), **double)).x
    assert norm(gains) == pytest.approx(0.70710678, abs=1e-8)


def test_s7_heavy_ball_transient():
    """L = 1, mu = 0.1 at the optimal tuning: the worst norm over the spectrum of the k-th power of the step matrix."""
    L, mu = 1.0, 0.1
    step = 4 / (math.sqrt(L) + math.sqrt(mu)) ** 2
    rate = (math.sqrt(L) - math.sqrt(mu)) / (math.sqrt(L) + math.sqrt(mu))
    assert (step, rate**2, rate) == pytest.approx((2.308862, 0.269874, 0.519494), abs=1e-6)
    spectrum = torch.linspace(mu, L, 401, **double)
    algorithm = HeavyBall(diagonal(spectrum), step_size=step, momentum=rate**2)
    assert all(c.holds for c in algorithm.conditions())

    ones, zero = torch.ones(401, **double), torch.zeros(2, 401, **double)
    state = HeavyBallState(torch.stack([ones, 0 * ones]), torch.stack([0 * ones, ones]))  # entries do not mix
    worst = {}
    for k in range(1, 11):
        state = algorithm.step(state, zero, k)
        powers = torch.stack([state.x, state.previous]).permute(2, 0, 1)  # (eigenvalue, row, column)
        worst[k] = float(torch.linalg.matrix_norm(powers, 2).max())
    expected = {1: 1.455314, 2: 1.372450, 3: 1.046892, 5: 0.465512, 10: 0.035052}
    assert {k: worst[k] for k in expected} == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("t", [0.3, 1.0, 1.9])
def test_s9_one_forward_backward_layer_is_averaged(t):
    """alpha = 2 / (4 - t) for the composition, t = lam L: T = (1 - alpha) I + alpha N with N nonexpansive."""
    A = diagonal(torch.tensor([0.0, 0.3, 1.0], **double))
    alpha = 2 / (4 - t)
    for slopes in all_slopes(3):
        step = state_matrix(ForwardBackward(A, Slopes(slopes), step_size=t))
        assert norm((step - (1 - alpha) * torch.eye(3, **double)) / alpha) <= 1 + 1e-12


def random_dense(rows: int, columns: int, generator: torch.Generator) -> Dense:
    return Dense(torch.randn(rows, columns, generator=generator, **double))


@pytest.mark.parametrize("seed", range(20))
def test_s9_condat_vu_is_averaged_in_its_metric(seed):
    """1/delta-averaged in P = [[1/t, -K'], [-K, 1/s]], delta = 2 - (L/2) / (1/t - s |K|^2), at random steps."""
    generator = torch.Generator().manual_seed(seed)
    A, K = random_dense(3, 4, generator), random_dense(5, 4, generator)
    share = torch.rand(3, generator=generator, **double)
    L, square = A.norm().upper ** 2, K.norm().upper ** 2
    t = float(share[0]) * 2 / L
    s = float(share[1]) * (1 / t - L / 2) / square
    algorithm = CondatVu(A, SquaredL2(3 * float(share[2])), K, step_size=t, dual_step=s, constraint=SquaredL2(0.1))
    assert all(c.holds for c in algorithm.conditions())
    metric = primal_dual_metric(K, t, s)
    alpha = 1 / (2 - (L / 2) / (1 / t - s * square))
    recentred = (state_matrix(algorithm) - (1 - alpha) * torch.eye(9, **double)) / alpha
    assert metric_norm(recentred, metric) <= 1 + 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_chambolle_pock_is_firmly_nonexpansive_in_its_metric(seed):
    generator = torch.Generator().manual_seed(seed)
    A, K = random_dense(3, 4, generator), random_dense(5, 4, generator)
    algorithm = ChambollePock(A, SquaredL2(0.5), K, step_size=0.3)
    metric = primal_dual_metric(K, algorithm.step_size, algorithm.dual_step)
    assert metric_norm(2 * state_matrix(algorithm) - torch.eye(9, **double), metric) <= 1 + 1e-9


def primal_dual_metric(K: Dense, t: float, s: float) -> torch.Tensor:
    rows, columns = K.matrix().shape
    top = torch.cat([torch.eye(columns, **double) / t, -K.matrix().mT], dim=1)
    return torch.cat([top, torch.cat([-K.matrix(), torch.eye(rows, **double) / s], dim=1)])


def metric_norm(matrix: torch.Tensor, metric: torch.Tensor) -> float:
    root = torch.linalg.cholesky(metric).mT  # |v|_P = |root v|
    return norm(root @ matrix @ torch.linalg.inv(root))


def test_heavy_ball_learns_its_momentum_alone_inside_the_rule():
    """A step above 2/L needs momentum: 2 (1 + b) / L > t for a quadratic."""
    A = diagonal(torch.tensor([0.1, 1.0], **double))
    algorithm = HeavyBall(A, Tikhonov(0.0 * Identity((2,))), step_size=2.4, momentum=0.5)
    rule = algorithm.rule("momentum")
    assert (rule.low, rule.high) == pytest.approx((0.2, 1.0), abs=1e-6)
