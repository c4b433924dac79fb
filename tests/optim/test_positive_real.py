"""The closed forms of positive realness against the Kalman-Yakubovich-Popov inequality, by semidefinite programs."""

from __future__ import annotations

import math

import clarabel
import numpy as np
import pytest
from scipy import sparse

from firmly.optim import AdaptationGain, presets


def realisation(gain):
    """(A, B, C, D) of H: states are the last two filtered gradients."""
    (c1, c2), (d1, d2) = gain.zeros, gain.poles
    return np.array([[d1, d2], [1.0, 0.0]]), np.array([[1.0], [0.0]]), np.array([[c1 + d1, c2 + d2]]), np.array([[1.0]])


def with_integrator(gain):
    """A realisation of H / (1 - z^-1): one more state, the sum of all outputs so far."""
    A, B, C, D = realisation(gain)
    return np.block([[A, np.zeros((2, 1))], [C, np.ones((1, 1))]]), np.vstack([B, D]), np.append(C, [[1.0]], 1), D


def inequality(P, system):
    """[[P - A'PA, C' - A'PB], [C - B'PA, D + D' - B'PB]]."""
    A, B, C, D = system
    return np.block([[P - A.T @ P @ A, C.T - A.T @ P @ B], [C - B.T @ P @ A, D + D.T - B.T @ P @ B]])


def triangle(M):
    """The upper triangle by columns, off the diagonal times sqrt 2: the cone of clarabel."""
    return np.array([M[i, j] * (1 if i == j else math.sqrt(2)) for j in range(len(M)) for i in range(j + 1)])


def kyp(system):
    """The greatest t <= 1 and a P >= 0 for which the inequality is at least t e e', e the last unit vector."""
    n = len(system[0])
    units = []
    for i, j in zip(*np.tril_indices(n)):
        units.append(np.zeros((n, n)))
        units[-1][i, j] = units[-1][j, i] = 1.0
    constant = inequality(np.zeros((n, n)), system)
    last = np.zeros((n + 1, n + 1))
    last[n, n] = 1.0
    columns = [np.concatenate([-triangle(inequality(E, system) - constant), -triangle(E), [0.0]]) for E in units]
    columns.append(np.concatenate([triangle(last), np.zeros(n * (n + 1) // 2), [1.0]]))
    offsets = np.concatenate([triangle(constant), np.zeros(n * (n + 1) // 2), [1.0]])
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    cones = [clarabel.PSDTriangleConeT(n + 1), clarabel.PSDTriangleConeT(n), clarabel.NonnegativeConeT(1)]
    unknowns = len(units) + 1
    solution = clarabel.DefaultSolver(
        sparse.csc_matrix((unknowns, unknowns)), np.append(np.zeros(len(units)), -1.0),
        sparse.csc_matrix(np.array(columns).T), offsets, cones, settings,
    ).solve()  # fmt: skip
    x = np.array(solution.x)
    return x[-1], sum(value * unit for value, unit in zip(x, units))


def random_gains(count, margin):
    """Half of them with the property, all of them clearly with or without it."""
    draw, kept = np.random.default_rng(0), {True: 0, False: 0}
    while sum(kept.values()) < count:
        gain = AdaptationGain(tuple(draw.uniform(-1, 1, 2)), tuple(draw.uniform(-0.9, 0.9, 2)))
        value = margin(gain)
        if gain.stable and 1e-3 < abs(value) < math.inf and kept[value > 0] < count / 2:
            kept[value > 0] += 1
            yield gain


def test_strictly_positive_real_as_the_inequality_says():
    for gain in random_gains(60, AdaptationGain.spr_margin):
        system = realisation(gain)
        t, P = kyp(system)
        assert (t > 1e-6) == gain.spr()
        if gain.spr():
            assert np.linalg.eigvalsh(P)[0] > -1e-7
            assert np.linalg.eigvalsh(inequality(P, system))[0] > -1e-6


def test_positive_real_with_the_integrator_as_the_inequality_says():
    """The integrator has a pole on the circle, so that nothing strict can be asked: solvable iff positive real."""
    for gain in random_gains(30, AdaptationGain.pr_margin):
        t, P = kyp(with_integrator(gain))
        solvable = t > -1e-6 and np.linalg.eigvalsh(inequality(P, with_integrator(gain)))[0] > -1e-5
        assert solvable == gain.pr()


@pytest.mark.parametrize(
    ("filter", "limit"), [(presets.heavy_ball, 1 / 3), (presets.nesterov, 1 / 2)], ids=["heavy ball", "Nesterov"]
)
def test_limits_of_momentum_to_nine_digits(filter, limit):
    low, high = 0.0, 1.0
    while high - low > 1e-13:
        middle = (low + high) / 2
        low, high = (middle, high) if filter(middle).gain.pr() else (low, middle)
    assert low == pytest.approx(limit, abs=1e-9)


@pytest.mark.parametrize("proportional", [0.0, 0.3, 2.0, 50.0])
@pytest.mark.parametrize("derivative", [0.0, 0.4, 10.0])
def test_pid_steps_without_momentum_are_always_positive_real(proportional, derivative):
    gain = presets.integral_proportional_derivative(proportional, derivative).gain
    assert gain.pr_margin() == pytest.approx((1 + 2 * proportional) / (1 + proportional + derivative), rel=1e-9)


def test_no_positive_real_filter_amplifies_more_than_twice_and_tustin_nearly_does():
    assert presets.tustin(1 - 1e-9).gain.dc_gain() == pytest.approx(2)
    draw = np.random.default_rng(1)
    for zeros, poles in zip(draw.uniform(-1, 1, (4000, 2)), draw.uniform(-1, 1, (4000, 2))):
        gain = AdaptationGain(tuple(zeros), tuple(poles))
        assert not (gain.pr() and gain.dc_gain() > 2)


def test_bode_integral_of_random_filters_without_zeros_outside():
    """The mean of ln |H| is zero: what is amplified at low frequencies is attenuated at high ones."""
    draw = np.random.default_rng(2)
    w = (np.arange(20_000) + 0.5) * math.pi / 20_000
    for zeros, poles in zip(draw.uniform(-0.6, 0.6, (40, 2)), draw.uniform(-0.45, 0.45, (40, 2))):
        gain = AdaptationGain(tuple(zeros), tuple(poles))
        if abs(np.roots([1, *zeros])).max() < 0.98:
            assert abs(np.log(gain.response(list(w)).magnitude).mean()) < 1e-4
