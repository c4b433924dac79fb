"""The conditions of a dynamic adaptation gain in closed form, against grids, roots and the table of known filters."""

from __future__ import annotations

import math

import numpy as np
import pytest

from firmly.errors import ConditionError, SettingsError
from firmly.optim import AdaptationGain, nearest_gain, presets

GRID = np.linspace(1e-6, math.pi, 4001)


def random_gains(count, seed=0):
    draw = np.random.default_rng(seed)
    for _ in range(count):
        d2 = draw.uniform(-1, 1)
        d1 = draw.uniform(d2 - 1, 1 - d2)
        yield AdaptationGain((draw.uniform(-1.5, 1.5), draw.uniform(-1, 1)), (d1, d2))


def on_circle(gain, w=GRID):
    q = np.exp(-1j * w)
    (c1, c2), (d1, d2) = gain.zeros, gain.poles
    denominator = 1 - d1 * q - d2 * q * q
    return (1 + c1 * q + c2 * q * q) / denominator, abs(denominator) ** 2, 1 - q


def test_margins_are_those_of_a_grid():
    for gain in random_gains(3000):
        H, modulus, difference = on_circle(gain)
        assert gain.spr_margin() == pytest.approx((H.real * modulus).min(), abs=1e-5)
        if 1 + sum(gain.zeros) > 0:
            assert gain.pr_margin() == pytest.approx((2 * (H / difference).real * modulus).min(), abs=1e-5)


def test_positive_real_filters_amplify_at_most_twice():
    gains = [gain for gain in random_gains(3000, seed=1) if gain.pr()]
    assert len(gains) > 50
    assert max(gain.dc_gain() for gain in gains) <= 2


def test_sector_limit_and_shortage_are_those_of_a_fine_grid():
    fine = np.concatenate([np.geomspace(1e-4, math.pi, 20_000), np.linspace(1e-4, math.pi, 20_000)])
    for gain in random_gains(100, seed=2):
        if 1 + sum(gain.zeros) > 0 and abs(gain.poles[0]) < 0.9 - gain.poles[1] and abs(gain.poles[1]) < 0.9:
            H, _, difference = on_circle(gain, fine)
            assert gain.sector_limit(2.0) == pytest.approx(
                0.5 / (-np.exp(-1j * fine) * H / difference).real.max(), rel=1e-4
            )
            assert gain.shortage() == pytest.approx(max(0, -(H / difference).real.min()), rel=1e-4, abs=1e-6)


def spectral_radius(gain, k):
    (c1, c2), (d1, d2) = gain.zeros, gain.poles
    return abs(np.roots([1, -1 - d1 + k, d1 - d2 + k * c1, d2 + k * c2])).max()


def test_quadratic_limit_is_where_a_root_leaves_the_circle():
    for gain in random_gains(1000, seed=3):
        if 1 + sum(gain.zeros) > 1e-3:
            limit = gain.quadratic_limit()
            assert all(spectral_radius(gain, limit * k) < 1 for k in (0.01, 0.3, 0.7, 1 - 1e-4))
            assert spectral_radius(gain, limit * (1 + 1e-4)) > 1
            assert gain.sector_limit() <= limit * (1 + 1e-9)


@pytest.mark.parametrize(
    ("gain", "sector"),
    [
        (AdaptationGain(), 2.0),
        (presets.heavy_ball(1 / 3).gain, 2 / 3),
        (presets.heavy_ball(0.5).gain, 1 / 3),
        (presets.heavy_ball(0.9).gain, 0.0105),
        (presets.nesterov(0.5).gain, 0.75),
        (presets.nesterov(0.9).gain, 0.0221),
        (AdaptationGain((-0.5,)), 4 / 3),
        (AdaptationGain((0.9,)), 0.54),
    ],
)
def test_sector_limits_of_known_methods(gain, sector):
    assert gain.sector_limit() == pytest.approx(sector, rel=5e-3)


def test_quadratic_limits_of_first_order_in_closed_form():
    draw = np.random.default_rng(4)
    for c, d in draw.uniform(-1, 1, (1000, 2)):
        limit = min(2 * (1 + d) / (1 - c), (1 - d) / c if c > 0 else math.inf)
        assert AdaptationGain((c,), (d,)).quadratic_limit(3.0) == pytest.approx(limit / 3, rel=1e-9)


@pytest.mark.parametrize(("preset", "most"), [(presets.heavy_ball, 1 / 3), (presets.nesterov, 1 / 2)])
def test_momentum_is_positive_real_up_to_a_third_and_nesterov_up_to_a_half(preset, most):
    assert preset(most - 1e-9).gain.pr()
    assert not preset(most + 1e-9).gain.pr()


def test_what_is_gained_at_low_frequencies_is_lost_at_high_ones():
    for gain in (presets.heavy_ball(0.9).gain, AdaptationGain((0.5, 0.2), (0.5, 0.25)), presets.nesterov(0.5).gain):
        w = (np.arange(20_000) + 0.5) * math.pi / 20_000
        assert abs(np.log(abs(on_circle(gain, w)[0])).mean()) < 1e-4


def test_response_is_the_quotient():
    gain = AdaptationGain((0.5, 0.2), (0.5, 0.25))
    response = gain.response([0.1, 1.0, math.pi])
    H = on_circle(gain, np.array(response.frequency))[0]
    np.testing.assert_allclose(response.magnitude * np.exp(1j * np.array(response.phase)), H, rtol=1e-12)
    assert len(gain.response(integrator=True).frequency) == 200


@pytest.mark.parametrize("asked", ["spr", "pr"])
def test_the_nearest_gain_has_the_property_and_no_random_one_is_nearer(asked):
    wished = AdaptationGain((0.9,), (0.95,))
    found = nearest_gain(wished, asked)
    assert getattr(found, asked)()
    assert found.order == 1
    distance = math.dist((found.zeros[0], found.poles[0]), (0.9, 0.95))
    draw = np.random.default_rng(5)
    for c, d in np.array([0.9, 0.95]) + draw.uniform(-1, 1, (20_000, 2)) * 1.1 * distance:
        gain = AdaptationGain((c,), (d,))
        assert not (getattr(gain, asked)() and math.dist((c, d), (0.9, 0.95)) < distance - 1e-4)


@pytest.mark.parametrize("asked", ["spr", "pr"])
def test_no_search_around_the_nearest_gain_of_second_order_finds_a_nearer_one(asked):
    draw = np.random.default_rng(6)
    for wished in list(random_gains(8, seed=7)):
        found = nearest_gain(wished, asked)
        assert getattr(found, asked)()
        start, best = np.array([*wished.zeros, *wished.poles]), np.array([*found.zeros, *found.poles])
        distance = np.linalg.norm(best - start)
        for scale in (0.5, 0.1, 0.02):
            for point in best + scale * distance * draw.standard_normal((700, 4)):
                if np.linalg.norm(point - start) < distance - 1e-5:
                    assert not getattr(AdaptationGain(tuple(point[:2]), tuple(point[2:])), asked)()


def test_a_gain_that_has_the_property_is_left_alone():
    gain = presets.nesterov(0.4).gain
    assert nearest_gain(gain, "pr") is gain


def test_refusals():
    with pytest.raises(SettingsError, match="DC gain needs"):
        AdaptationGain((), (1.5,)).dc_gain()
    with pytest.raises(SettingsError, match="greatest slope"):
        AdaptationGain().sector_limit(0.0)
    with pytest.raises(SettingsError, match="'spr' or 'pr'"):
        nearest_gain(AdaptationGain(), "stable")
    assert issubclass(ConditionError, ValueError)
