"""Recursive least squares beside batch least squares, and its gain without excitation."""

from __future__ import annotations

import math

import pytest
import torch

from firmly.errors import ConditionError, DataError, SettingsError, ShapeError
from firmly.optim import RecursiveLeastSquares
from firmly.optim.gain_profiles import (
    Constant,
    ConstantTrace,
    Decreasing,
    Forgetting,
    MatrixGain,
    VariableForgetting,
)

PROFILES = [
    Decreasing(),
    Forgetting(0.95),
    VariableForgetting(0.95, 0.97),
    ConstantTrace(),
    ConstantTrace(2.0, decreasing=30),
    Constant(),
]
THETA = torch.tensor([-1.5, 0.7, 1.0, 0.5], dtype=torch.float64)
generator = torch.Generator().manual_seed(0)
X = torch.randn(120, 3, generator=generator, dtype=torch.float64)
Y = X @ torch.randn(3, 2, generator=generator, dtype=torch.float64) + torch.randn(120, 2, generator=generator)


def plant(count):
    """The plant of the identification table: regressors and outputs."""
    register, y, u = [1] * 9, [0.0, 0.0], []
    for _ in range(count + 1):
        u.append(2.0 * register[8] - 1)
        register = [register[8] ^ register[4], *register[:-1]]
    rows = []
    for now, before in zip(u[1:], u):
        rows.append([-y[-1], -y[-2], now, before])
        y.append(sum(a * float(b) for a, b in zip(rows[-1], THETA)))
    return torch.tensor(rows, dtype=torch.float64), torch.tensor(y[2:], dtype=torch.float64)


def test_identifies_a_plant_without_noise_in_200_steps():
    model = RecursiveLeastSquares(intercept=False, start=1e6).partial_fit(*plant(200))
    assert float((model.coef_ - THETA).abs().max()) < 1e-7
    assert float((model.coef_ - THETA).abs().max()) == pytest.approx(5.3e-9, rel=0.5)  # the penalty |theta|^2 / start


@pytest.mark.parametrize("factor", [1.0, 0.97, 0.8])
def test_is_weighted_least_squares(factor):
    model = RecursiveLeastSquares(Forgetting(factor), start=10.0, ceiling=1e9)
    phi = torch.cat([X, torch.ones_like(X[:, :1])], 1)
    for t in range(0, 120, 40):  # in three parts
        model.partial_fit(X[t : t + 40], Y[t : t + 40])
    w = factor ** torch.arange(119, -1, -1.0, dtype=torch.float64)[:, None]
    information = phi.mT @ (w * phi) + factor**119 * torch.eye(4, dtype=torch.float64) / 10
    expected = torch.linalg.solve(information, phi.mT @ (w * Y))
    torch.testing.assert_close(model.coef_, expected[:3].mT, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.intercept_, expected[3], rtol=0, atol=1e-10)
    assert model.gain_ is not None
    torch.testing.assert_close(model.gain_.matrix, torch.linalg.inv(factor * information), rtol=1e-9, atol=0)
    torch.testing.assert_close(model.predict(X), phi @ expected, rtol=0, atol=1e-9)


def test_predictions_come_before_learning():
    model, again = RecursiveLeastSquares(Forgetting(0.9)), RecursiveLeastSquares(Forgetting(0.9))
    made = model.learn(X[:20], Y[:20, 0])
    assert made[0] == 0 and made.shape == (20,)
    again.partial_fit(X[:19], Y[:19, 0])
    assert float(made[19]) == pytest.approx(float(again.predict(X[19:20])), abs=1e-12)


@pytest.mark.parametrize("profile", PROFILES, ids=repr)
@pytest.mark.parametrize("regressor", ["zero", "tiny", "one direction", "growing"])
def test_the_gain_stays_bounded_without_excitation(profile, regressor):
    gain = MatrixGain(100 * torch.eye(4, dtype=torch.float64), profile)
    direction = torch.tensor([1.0, -2, 0.5, 3], dtype=torch.float64)
    for t in range(3000):
        size = {"zero": 0.0, "tiny": 1e-9, "one direction": 1.0, "growing": 1.01**t if t < 1500 else 0.0}[regressor]
        gain.update(size * direction)
        assert gain.trace() <= 400 * (1 + 1e-9)
    values = torch.linalg.eigvalsh(gain.matrix)
    assert bool(values.isfinite().all()) and float(values.min()) >= -1e-12 * float(values.max())


def test_unbounded_forgetting_would_wind_up():
    gain = MatrixGain(torch.eye(2, dtype=torch.float64), Forgetting(0.95), ceiling=1e300)
    for _ in range(3000):
        gain.update(torch.zeros(2, dtype=torch.float64))
    assert gain.trace() > 1e60


@pytest.mark.parametrize("profile", [ConstantTrace(), ConstantTrace(0.7)])
def test_constant_trace(profile):
    gain = MatrixGain(torch.diag(torch.tensor([1.0, 2, 3], dtype=torch.float64)), profile)
    for x in X:
        before, phi = gain.matrix, x
        gain.update(phi)
        k = before @ phi
        remains = before - torch.outer(k, k) / (profile.ratio + phi @ k)
        torch.testing.assert_close(gain.matrix, remains * 6 / remains.trace(), rtol=1e-9, atol=1e-12)
        assert gain.trace() == pytest.approx(6, rel=1e-12)


def test_other_blocks_count_as_noise():
    """F+ = (F - F phi phi' F / (1 + others + phi' F phi)) / keep."""
    A = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    F, phi = A @ A.mT, torch.tensor([1.0, -2, 0.5, 3], dtype=torch.float64)
    F = (F + F.mT) / 2
    gain = MatrixGain(F, Forgetting(0.9), ceiling=1e9)
    gain.update(phi, others=7.0)
    expected = (F - torch.outer(F @ phi, F @ phi) / (8 + phi @ F @ phi)) / 0.9
    torch.testing.assert_close(gain.matrix, expected, rtol=1e-12, atol=1e-12)


def test_profiles():
    assert [VariableForgetting(0.95, 0.9).weights(t).keep for t in (0, 1, 2)] == pytest.approx([0.95, 0.955, 0.9595])
    late = ConstantTrace(decreasing=2)
    assert [late.weights(t).keep for t in (0, 1, 2)] == [1, 1, None]
    gain = MatrixGain(torch.eye(3, dtype=torch.float64), Constant())
    gain.update(X[0])
    assert torch.equal(gain.matrix, torch.eye(3, dtype=torch.float64))


def test_a_parameter_jump_is_followed_by_forgetting_only():
    phi, _ = plant(2000)
    jumped = torch.where(torch.arange(2000)[:, None] < 1000, THETA, -THETA)
    y = (phi * jumped).sum(1) + 0.1 * torch.randn(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors = {}
    for name, profile in (("forgetting", Forgetting(0.98)), ("decreasing", Decreasing()), ("trace", ConstantTrace())):
        model = RecursiveLeastSquares(profile, start=100.0, intercept=False).partial_fit(phi, y)
        errors[name] = float((model.coef_ + THETA).norm())
    assert errors["forgetting"] < 0.1 and errors["trace"] < 0.3 and errors["decreasing"] > 0.5


@pytest.mark.parametrize("profile", PROFILES, ids=repr)
def test_state_continues(profile):
    whole = RecursiveLeastSquares(profile).partial_fit(X, Y)
    first = RecursiveLeastSquares(profile).partial_fit(X[:50], Y[:50])
    second = RecursiveLeastSquares(profile)
    second.load_state_dict(first.state_dict())
    second.partial_fit(X[50:], Y[50:])
    torch.testing.assert_close(second.coef_, whole.coef_, rtol=0, atol=0)
    assert second.predict(X.numpy()).shape == (120, 2)


def test_refusals():
    model = RecursiveLeastSquares()
    with pytest.raises(ConditionError, match="partial_fit"):
        model.predict(X)
    with pytest.raises(ConditionError):
        model.state_dict()
    model.partial_fit(X.tolist(), Y[:, 0].tolist())
    for bad_x, bad_y in ((X[:, :2], Y[:, 0]), (X, Y), (X, Y[:5, 0]), (X[0], Y[0, 0])):
        with pytest.raises(ShapeError):
            model.partial_fit(bad_x, bad_y)
    before = model.coef_.clone()
    with pytest.raises(DataError, match="finite"):
        model.partial_fit(X, Y[:, 0] * math.nan)
    assert torch.equal(model.coef_, before)
    with pytest.raises(DataError):
        model.partial_fit(X * 1j, Y[:, 0])
    for make in (
        lambda: RecursiveLeastSquares(start=0.0),
        lambda: Forgetting(0.0),
        lambda: VariableForgetting(1.1),
        lambda: ConstantTrace(0.5),
        lambda: MatrixGain(-torch.eye(2)),
        lambda: MatrixGain(torch.tensor([[1.0, 0.5], [0.0, 1.0]])),
        lambda: MatrixGain(torch.eye(2), ceiling=0.0),
    ):
        with pytest.raises(SettingsError):
            make()
    with pytest.raises(ShapeError):
        MatrixGain(torch.ones(2, 3))
    gain = MatrixGain(torch.eye(2))
    with pytest.raises(ShapeError):
        gain.update(torch.ones(3))
    with pytest.raises(DataError):
        gain.update(torch.tensor([math.inf, 0.0]))


def test_lists_of_numbers_keep_their_digits():
    model = RecursiveLeastSquares(intercept=False, start=1e12).partial_fit([[1.0], [1.0]], [0.1, 0.1])
    assert float(model.coef_[0]) == pytest.approx(0.1, abs=1e-12)
    assert float(model.predict([[3.0]])[0]) == pytest.approx(0.3, abs=1e-11)
    with pytest.raises(DataError, match="real numbers"):
        model.predict([[1j]])
