"""Certified rates beside performance estimation and their promise of time."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch

from firmly.errors import NotCertifiable
from firmly.optim import AdaptationGain, certified_rate, presets, verified


def performance_of_gradient_descent(lr, m, L, steps):
    """The greatest |x_n - x*| for |x_0 - x*| = 1 over all m-strongly convex, L-smooth functions, by PEPit."""
    pepit = pytest.importorskip("PEPit", reason="the peer PEPit is in the extra 'bench'")
    from PEPit.functions import SmoothStronglyConvexFunction

    problem = pepit.PEP()
    f = problem.declare_function(SmoothStronglyConvexFunction, mu=m, L=L)
    minimiser, start = f.stationary_point(), problem.set_initial_point()
    problem.set_initial_condition((start - minimiser) ** 2 <= 1)
    x = start
    for _ in range(steps):
        x = x - lr * f.gradient(x)
    problem.set_performance_metric((x - minimiser) ** 2)
    return math.sqrt(problem.solve(verbose=0))


@pytest.mark.parametrize(("lr", "m"), [(2 / 1.1, 0.1), (1.0, 0.1), (1.5, 0.3)])
def test_gradient_steps_as_performance_estimation_says(lr, m):
    rate = certified_rate(AdaptationGain(), lr, m, 1.0)
    assert rate.rho == pytest.approx(performance_of_gradient_descent(lr, m, 1.0, 1), abs=1e-6)
    assert rate.rho**3 == pytest.approx(performance_of_gradient_descent(lr, m, 1.0, 3), abs=1e-5)


@pytest.mark.parametrize("kappa", [2, 10, 1e3, 1e5])
@pytest.mark.parametrize("L", [1e-4, 1.0, 1e6])
def test_rates_do_not_depend_on_units_and_take_less_than_two_seconds(kappa, L):
    s = math.sqrt(kappa)
    method = presets.nesterov((s - 1) / (s + 1))
    started = time.process_time()
    rate = certified_rate(method.gain, method.scale / L, L / kappa, L)
    assert time.process_time() - started < 2
    assert rate.rho <= math.sqrt(1 - 1 / s)
    assert verified(rate, method.gain, method.scale / L, L / kappa, L)
    assert rate.rho == pytest.approx(certified_rate(method.gain, method.scale, 1 / kappa, 1.0).rho, rel=1e-6)


@pytest.mark.parametrize("kappa", [10, 100, 1e4])
def test_rates_are_never_below_the_slowest_quadratic(kappa):
    s, m = math.sqrt(kappa), 1 / kappa
    r = 1 - 1 / s
    for method, lr in (
        (presets.gradient(), 1.0),
        (presets.nesterov((s - 1) / (s + 1)), 1.0),
        (presets.triple_momentum(r * r / (2 - r), r * r / ((1 + r) * (2 - r))), 1 + r),
    ):
        (c1, _), (d1, _) = method.gain.zeros, method.gain.poles
        slopes = np.geomspace(m, 1, 400) * lr * method.scale
        slowest = max(abs(np.roots([1, k - 1 - d1, d1 + k * c1])).max() for k in slopes)
        assert certified_rate(method.gain, lr * method.scale, m, 1.0).rho >= slowest


def test_no_rate_is_proved_where_heavy_ball_cycles():
    """m = 1, L = 25, Polyak's tuning: f' is 25 x, x + 24, 25 x - 24 on x < 1, x < 2, x >= 2 (Lessard et al.)."""
    method, lr = presets.heavy_ball(4 / 9), 1 / 9
    with pytest.raises(NotCertifiable):
        certified_rate(method.gain, lr, 1.0, 25.0)
    x = torch.nn.Parameter(torch.tensor(3.3, dtype=torch.float64))
    optimiser, path = method([x], lr), []
    for _ in range(600):
        v = x.detach()
        x.grad = torch.where(v < 1, 25 * v, torch.where(v < 2, v + 24, 25 * v - 24))
        optimiser.step()
        path.append(float(x.detach()))
    assert path[-3:] == pytest.approx(path[-6:-3], abs=1e-9)
    assert max(map(abs, path[-3:])) > 0.5


def test_what_was_changed_is_not_verified():
    gain = presets.nesterov(0.5).gain
    rate = certified_rate(gain, 1.0, 0.1, 1.0)
    assert verified(rate, gain, 1.0, 0.1, 1.0)
    assert not verified(rate._replace(storage=-rate.storage), gain, 1.0, 0.1, 1.0)
    assert not verified(rate._replace(storage=rate.storage + np.triu(np.ones(3), 1)), gain, 1.0, 0.1, 1.0)
    assert not verified(rate._replace(weight=rate.rho**2 + 1e-3), gain, 1.0, 0.1, 1.0)
    assert not verified(rate, gain, 1.5, 0.1, 1.0)
    assert not verified(rate, gain, 1.0, 0.05, 1.0)
