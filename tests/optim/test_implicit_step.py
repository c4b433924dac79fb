"""A-posteriori steps: the published table of system identification, and stability for every rate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.optim import AdaptationGain, Dag, ImplicitStep, RecursiveLeastSquares, presets
from firmly.optim.gain_profiles import ConstantTrace, Decreasing, Forgetting, MatrixGain

THETA = torch.tensor([-1.5, 0.7, 1.0, 0.5], dtype=torch.float64)


def observations(count=1999):
    """(phi, y) of y(t+1) = 1.5 y(t) - 0.7 y(t-1) + u(t) + 0.5 u(t-1), where u is a pseudo-random binary sequence."""
    register, y, u = [1] * 9, [0.0, 0.0], []
    for _ in range(count + 1):
        u.append(2.0 * register[8] - 1)
        register = [register[8] ^ register[4], *register[:-1]]
    for now, before in zip(u[1:], u):
        phi = torch.tensor([-y[-1], -y[-2], now, before], dtype=torch.float64)
        y.append(float(phi @ THETA))
        yield phi, y[-1]


DATA = list(observations())
RATES = torch.tensor([0.002, 0.01, 1.0, 100.0], dtype=torch.float64)
STABLE = {  # D and settling time at the first two rates, from the notes of this project
    "integral": (AdaptationGain(), 547.5, 929, 90.9, 211),
    "heavy ball 1/3": (presets.heavy_ball(1 / 3 - 1e-12).gain, 329.8, 595, 56.0, 126),
    "Tustin 0.9": (presets.tustin(0.9).gain, 244.6, 475, 45.5, 94),
    "Nesterov 0.5": (presets.nesterov(0.5 - 1e-12).gain, 383.4, 691, 63.3, 157),
    "integral and proportional": (AdaptationGain((-0.5,)), 1161.9, 1888, 228.7, 438),
}
UNSTABLE = {
    "heavy ball 0.9": (presets.heavy_ball(0.9).gain, 46.2, 67, 49.2, 68),
    "Nesterov 0.9": (presets.nesterov(0.9).gain, 57.3, 81, 34.4, 58),
    "second order": (AdaptationGain((0.5, 0.2), (0.5, 0.25)), 51.4, 94, 33.1, 59),
}


def identify(gain):
    """Squared parameter errors (time, rate), all rates as one batch, and the sums of squared posterior errors."""
    F = RATES[:, None, None] * torch.eye(4, dtype=torch.float64)
    step, path, energy = ImplicitStep(torch.zeros(4, 4, dtype=torch.float64), gain), [], 0.0
    for phi, y in DATA:
        energy = energy + step.update(phi.expand(4, 4), y, F).posterior.square()
        path.append((step.theta - THETA).square().sum(-1))
    return torch.stack(path), energy


@pytest.mark.parametrize("name", [*STABLE, *UNSTABLE])
def test_the_table_of_system_identification(name):
    gain, *expected = {**STABLE, **UNSTABLE}[name]
    path, energy = identify(gain)
    settled = (path < 0.01 * THETA.square().sum()).int().argmax(0)
    found = [float(v) for k in range(2) for v in (path[:, k].sum(), settled[k])]
    assert found == pytest.approx(expected, rel=1e-2)
    assert gain.spr()
    assert gain.pr() == (name in STABLE)
    assert bool((path[-1, 2:] < 1).all() and (energy[2:] < 1e3).all()) == (name in STABLE)
    assert bool((path[:, 2:] > 1e6).any()) == (name in UNSTABLE)


def test_errors_of_integral_steps_are_within_their_bound():
    """f sum eps^2 <= |theta0 - theta|^2 / 2, from the storage function |theta - theta*|^2 / 2."""
    assert bool((RATES * identify(AdaptationGain())[1] <= THETA.square().sum() / 2).all())


@pytest.mark.parametrize("name", [*STABLE, *UNSTABLE])
def test_explicit_steps_at_rate_one_diverge(name):
    theta = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    gain = {**STABLE, **UNSTABLE}[name][0]
    optimiser = Dag([theta], 1.0, gain.zeros, gain.poles)
    for phi, y in DATA[:100]:
        theta.grad = phi * (phi @ theta.detach() - y)
        optimiser.step()
    assert float(theta.detach().norm()) > 1e6


@pytest.mark.parametrize("gain", [AdaptationGain(), AdaptationGain((0.3, 0.1), (0.2, -0.3))])
def test_the_step_solves_its_implicit_equation(gain):
    """theta+ = theta + w, w = v + c1 v- + c2 v-- + d1 w- + d2 w--, v = F phi (y - phi' theta+)."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    root = draw(3, 3)
    F, (c1, c2), (d1, d2) = root @ root.mT, gain.zeros, gain.poles
    step = ImplicitStep(draw(3), gain, leakage=0.1)
    v, w = [torch.zeros(3)] * 2, [torch.zeros(3)] * 2
    for _ in range(20):
        before, phi, y = step.theta, draw(3), float(draw(1))
        errors = step.update(phi, y, F)
        assert float(errors.posterior) == pytest.approx(y - float(step.predict(phi)), abs=1e-12)
        v.append(F @ phi * errors.posterior)
        w.append(v[-1] + c1 * v[-2] + c2 * v[-3] + d1 * w[-1] + d2 * w[-2])
        torch.testing.assert_close(step.theta, 0.9 * before + w[-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gain", [AdaptationGain(), presets.tustin(0.9).gain])
@pytest.mark.parametrize("profile", [Decreasing(), Forgetting(0.95), ConstantTrace()], ids=str)
def test_a_gain_known_by_its_products_is_its_matrix(gain, profile):
    """The matrix follows the law of F itself, not that of its factor."""
    F = MatrixGain(10 * torch.eye(4, dtype=torch.float64), profile)
    by_products, dense = (ImplicitStep(torch.zeros(4, dtype=torch.float64), gain) for _ in range(2))
    matrix = F.matrix
    for t, (phi, y) in enumerate(DATA[:200]):
        first, second = by_products.update(phi, y, F), dense.update(phi, y, matrix)
        torch.testing.assert_close(first.posterior, second.posterior, rtol=1e-9, atol=1e-9)
        keep, ratio = profile.weights(t)
        v = matrix @ phi
        less = matrix - torch.outer(v, v) / (ratio + phi @ v)
        trace = matrix.trace() if keep is None else torch.tensor(F.ceiling)
        matrix = less / min(1.0, max(keep or 0.0, float(less.trace() / trace)))
        F.update(phi)
    torch.testing.assert_close(by_products.theta, dense.theta, rtol=1e-8, atol=1e-8)


def test_recursive_least_squares_is_the_integral_step():
    F, step = MatrixGain(1e3 * torch.eye(4, dtype=torch.float64)), ImplicitStep(torch.zeros(4, dtype=torch.float64))
    estimator = RecursiveLeastSquares(start=1e3, intercept=False)
    for phi, y in DATA[:200]:
        step.update(phi, y, F)
        F.update(phi)
    estimator.partial_fit(torch.stack([phi for phi, _ in DATA[:200]]), [y for _, y in DATA[:200]])
    torch.testing.assert_close(step.theta, estimator.coef_, rtol=1e-9, atol=1e-9)


def test_filters_help_gains_that_decrease_not_gains_that_forget():
    """A plant that jumps at half time, noise of 0.1: the integral of the squared errors of the parameters."""
    jumped = torch.tensor([-1.2, 0.5, 1.0, 0.5], dtype=torch.float64)
    noise = 0.1 * torch.randn(1999, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def integral(gain, profile):
        F = MatrixGain(1e3 * torch.eye(4, dtype=torch.float64), profile, ceiling=1e9)
        step, y, total = ImplicitStep(torch.zeros(4, dtype=torch.float64), gain), [0.0, 0.0], 0.0
        for t, (phi, _) in enumerate(DATA):
            true = THETA if t < 1000 else jumped
            phi = torch.cat([torch.tensor([-y[-1], -y[-2]], dtype=torch.float64), phi[2:]])
            y.append(float(phi @ true + noise[t]))
            step.update(phi, y[-1], F)
            F.update(phi)
            total += float((step.theta - true).square().sum())
        return total

    tustin, heavy = presets.tustin(0.9).gain, presets.heavy_ball(1 / 3).gain
    slow, fast = integral(AdaptationGain(), Decreasing()), integral(AdaptationGain(), Forgetting(0.98))
    assert integral(tustin, Decreasing()) < 0.95 * slow and fast < 0.2 * slow
    assert integral(heavy, Forgetting(0.98)) > fast


def test_no_matrix_is_made_of_products():
    class Diagonal:
        def direction(self, phi):
            return weights * phi

    weights = torch.linspace(0.1, 1, 100_000, dtype=torch.float64)  # a matrix would have 80 GB
    step = ImplicitStep(torch.zeros_like(weights), presets.tustin(0.9).gain)
    phi = torch.ones_like(weights)
    assert float(step.update(phi, 1.0, Diagonal()).posterior) == pytest.approx(1 / (1 + float(weights.sum())))


def test_a_shortage_of_positivity_allows_small_rates():
    """One parameter, phi = 1: theta = H / (1 - z^-1) f eps, stable where f shortage < 1."""
    gain = presets.heavy_ball(0.9).gain
    alternating = lambda t: torch.tensor([1.0 if t % 7 < 4 else -1.0], dtype=torch.float64)  # noqa: E731
    step = ImplicitStep(torch.zeros(1, dtype=torch.float64), gain)
    rate = 0.99 / gain.shortage()
    for t in range(4000):
        errors = step.update(alternating(t), 3 * float(alternating(t)), rate)
    assert abs(float(errors.posterior)) < 1e-10


def test_batches_and_regressors_without_excitation():
    step = ImplicitStep(torch.ones(2, 3))
    step.update(torch.zeros(2, 3), torch.ones(2), 5.0)
    assert torch.equal(step.theta, torch.ones(2, 3))
    assert step.update(torch.ones(2, 3), torch.tensor([4.0, 3.0]), 0.5).posterior.tolist() == pytest.approx([0.4, 0])


class Wide:
    def direction(self, phi):
        return phi[0]


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (SettingsError, "leakage", lambda: ImplicitStep(torch.zeros(2), leakage=1.0)),
        (SettingsError, "given poles", lambda: ImplicitStep(torch.zeros(2), AdaptationGain((), (1.0,)))),
        (ShapeError, "real tensor", lambda: ImplicitStep(torch.zeros(()))),
        (ShapeError, "phi has the shape", lambda: ImplicitStep(torch.zeros(2)).update(torch.zeros(3), 0.0, 1.0)),
        (ShapeError, "y has the shape", lambda: ImplicitStep(torch.zeros(2)).update(torch.zeros(2), torch.zeros(4), 1)),
        (SettingsError, "positive and finite", lambda: ImplicitStep(torch.zeros(2)).update(torch.zeros(2), 0.0, -1.0)),
        (
            ShapeError, "a direction has the shape",
            lambda: ImplicitStep(torch.zeros(2, 2)).update(torch.zeros(2, 2), torch.zeros(2), Wide()),
        ),
        (DataError, "not finite", lambda: ImplicitStep(torch.zeros(2)).update(torch.ones(2), math.nan, 1.0)),
        (DataError, "not finite", lambda: ImplicitStep(torch.zeros(2)).update(math.inf * torch.ones(2), 0.0, 1.0)),
        (DataError, "definite", lambda: ImplicitStep(torch.zeros(2)).update(torch.ones(2), 0.0, -torch.eye(2))),
        (ShapeError, "or a matrix", lambda: ImplicitStep(torch.zeros(2)).update(torch.zeros(2), 0.0, torch.eye(3))),
    ],
)  # fmt: skip
def test_refusals(error, message, call):
    with pytest.raises(error, match=message):
        call()
