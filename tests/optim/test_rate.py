"""Certified rates: known values, storage functions that verify, and never better than what happens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from firmly.errors import ConditionError, NotCertifiable, SettingsError
from firmly.optim import AdaptationGain, Dag, Rate, certified_rate, presets, verified
from firmly.optim.rate import _storage


def tuned(name, kappa):
    """(preset, its learning rate) for L = 1, m = 1 / kappa, as the papers tune them."""
    s, m = math.sqrt(kappa), 1 / kappa
    r = 1 - 1 / s
    return {
        "gradient": (presets.gradient(), 1.0),
        "optimal gradient": (presets.gradient(), 2 / (1 + m)),
        "nesterov": (presets.nesterov((s - 1) / (s + 1)), 1.0),
        "triple": (presets.triple_momentum(r * r / (2 - r), r * r / ((1 + r) * (2 - r))), 1 + r),
        "heavy ball": (presets.heavy_ball(((s - 1) / (s + 1)) ** 2), 4 / (1 + math.sqrt(m)) ** 2),
    }[name]


@pytest.mark.parametrize(
    ("name", "kappa", "rho"),
    [
        ("gradient", 10, 0.9),
        ("gradient", 100, 0.99),
        ("gradient", 1e6, 1 - 1e-6),
        ("optimal gradient", 10, 9 / 11),
        ("optimal gradient", 100, 99 / 101),
        ("nesterov", 10, 0.751822),
        ("nesterov", 100, 0.927934),
        ("triple", 10, 1 - 1 / math.sqrt(10)),
        ("triple", 100, 0.9),
        ("heavy ball", 10, 0.860409),
    ],
)
def test_known_rates(name, kappa, rho):
    preset, lr = tuned(name, kappa)
    rate = certified_rate(preset.gain, lr * preset.scale, 1 / kappa, 1)
    assert rate.rho == pytest.approx(rho, abs=2.1e-4)
    assert verified(rate, preset.gain, lr * preset.scale, 1 / kappa, 1)
    assert not verified(
        rate._replace(rho=rate.rho - 1e-3 * (1 - rate.rho)), preset.gain, lr * preset.scale, 1 / kappa, 1
    )


def test_a_smaller_constant_is_not_verified():
    gain = presets.nesterov(0.5).gain
    rate = certified_rate(gain, 0.5, 0.1, 1)
    assert verified(rate, gain, 0.5, 0.1, 1) and rate.constant > 1.1
    for constant in (0.999 * rate.constant, 1.0, 0.0, -rate.constant, math.inf):
        assert not verified(rate._replace(constant=constant), gain, 0.5, 0.1, 1)
    assert verified(rate._replace(constant=2 * rate.constant), gain, 0.5, 0.1, 1)


def test_a_weight_above_the_square_of_the_rate_is_not_verified():
    """The matrix inequality has a solution there, but the constraint that it uses holds up to rho^2 only."""
    gain = presets.nesterov(0.5).gain
    rho = certified_rate(gain, 1.3, 0.1, 1).rho + 0.01
    storage = _storage(gain, 1.3, 0.1, rho, rho**2 + 0.03)
    spectrum = np.linalg.eigvalsh(storage)
    assert spectrum[0] > 0
    rate = Rate(rho, rho**2 + 0.03, storage, 1.01 * math.sqrt(spectrum[-1] / spectrum[0]))
    assert not verified(rate, gain, 1.3, 0.1, 1)


def test_heavy_ball_has_no_rate_at_large_condition_numbers():
    preset, lr = tuned("heavy ball", 100)
    with pytest.raises(NotCertifiable, match="no rate below 1"):
        certified_rate(preset.gain, lr, 0.01, 1)


def random_designs(count):
    draw = np.random.default_rng(0)
    while count:
        gain = AdaptationGain(
            (draw.uniform(-0.9, 0.9), draw.uniform(-0.3, 0.3)), (draw.uniform(-0.5, 0.9), draw.uniform(-0.3, 0.3))
        )
        if gain.stable and 1 + sum(gain.zeros) > 0:
            yield gain, draw.uniform(0.05, 0.9) * gain.sector_limit(), draw.uniform(0.01, 0.9)
            count -= 1


def test_no_quadratic_is_slower():
    proved = 0
    for gain, lr, m in random_designs(40):
        try:
            rho = certified_rate(gain, lr, m, 1).rho
        except NotCertifiable:
            continue
        proved += 1
        (c1, c2), (d1, d2) = gain.zeros, gain.poles
        for k in np.linspace(m, 1, 50) * lr:
            assert abs(np.roots([1, -1 - d1 + k, d1 - d2 + k * c1, d2 + k * c2])).max() <= rho
    assert proved > 20


def test_no_convex_function_with_kinks_in_its_slope_is_slower():
    """f' = m x + (1 - m) max(0, x - 1/2) + ..., far from quadratic; distances stay below constant rho^t."""
    for gain, lr, m in random_designs(15):
        try:
            rate = certified_rate(gain, lr, m, 1)
        except NotCertifiable:
            continue
        x = nn.Parameter(torch.tensor([3.0, -2.0, 0.1], dtype=torch.float64))
        optimiser, start = Dag([x], lr, gain.zeros, gain.poles), float(x.detach().norm())
        for t in range(200):
            assert float(x.detach().norm()) <= rate.constant * rate.rho**t * start + 1e-12
            x.grad = m * x.detach() + (1 - m) * (torch.relu(x.detach() - 0.5) - torch.relu(-x.detach() - 0.01))
            optimiser.step()


def test_rates_of_an_optimiser():
    p = nn.Parameter(torch.ones(2))
    preset, lr = tuned("nesterov", 10)
    assert preset([p], lr / 5).rate(0.5, 5.0) == pytest.approx(0.751822, abs=1e-5)
    with pytest.raises(ConditionError, match="one learning rate without weight decay"):
        preset([p], lr, weight_decay=0.1).rate(0.1, 1.0)
    with pytest.raises(ConditionError, match="of functions that are minimised"):
        preset([p], lr, maximize=True).rate(0.1, 1.0)
    with pytest.raises(SettingsError, match="0 < m <= L"):
        preset([p], lr).rate(2.0, 1.0)
