"""Learnable activations: slopes inside the interval by construction, continuous, with their potentials."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firmly.errors import ConditionError, ShapeError
from firmly.prox import Activation, Clip, LinearSpline, MonotoneSpline, huber_slopes


def random_spline(knots: int, low: float, high: float, seed: int = 0, channels: int = 3) -> LinearSpline:
    spline = LinearSpline(channels, knots=knots, reach=1.2, low=low, high=high, slope=high).double()
    generator = torch.Generator().manual_seed(seed)
    spline.raw.data = 3 * torch.randn(spline.raw.shape, generator=generator, dtype=torch.float64)
    return spline


def activations() -> list[Activation]:
    clip = Clip(3, torch.tensor([0.2, 0.5, 1.0])).double()
    return [clip, random_spline(1, 0, 1), random_spline(7, -0.4, 1.3), random_spline(21, 0.2, 2.0)]


points = torch.linspace(-3, 3, 1201, dtype=torch.float64)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([1, 3, 9, 21]), st.floats(-1, 0.9), st.floats(0.05, 2), st.integers(0, 10**6))
def test_slopes_stay_inside(knots: int, low: float, width: float, seed: int):
    spline = random_spline(knots, low, low + width, seed)
    lowest, highest = spline.interval()
    assert (low <= lowest).all()
    assert (highest <= low + width).all()
    z = points.expand(1, 3, -1)
    quotients = spline(z).diff(dim=-1) / z.diff(dim=-1)
    assert (quotients >= lowest[:, None] - 1e-10).all()
    assert (quotients <= highest[:, None] + 1e-10).all()


@pytest.mark.parametrize("activation", activations(), ids=lambda a: type(a).__name__)
def test_activation(activation: Activation):
    z = points.expand(2, 3, -1).clone().requires_grad_()
    phi, psi = activation(z), activation.potential(z)
    lowest, highest = activation.interval()
    quotients = phi.diff(dim=-1) / z.diff(dim=-1)
    torch.testing.assert_close(quotients.amin((0, 2)), lowest, rtol=0, atol=1e-9)  # the interval is exact
    torch.testing.assert_close(quotients.amax((0, 2)), highest, rtol=0, atol=1e-9)
    assert (activation(torch.zeros_like(z)) == 0).all()
    assert (activation.potential(torch.zeros_like(z)) == 0).all()
    (derivative,) = torch.autograd.grad(psi.sum(), z)
    torch.testing.assert_close(derivative, phi)
    away_from_kinks = (z.detach()[:1, :, ::97] + 1e-3).requires_grad_()
    assert torch.autograd.gradcheck(activation, (away_from_kinks,))
    assert torch.autograd.gradcheck(activation.potential, (away_from_kinks,))
    assert torch.isnan(activation(torch.full((1, 3, 2), torch.nan).double())).all()


def test_gradient_of_the_slopes():
    spline = random_spline(5, -0.5, 1.0)
    spline.raw.data = 0.2 * torch.randn(spline.raw.shape, dtype=torch.float64)
    z = torch.randn(2, 3, 5, dtype=torch.float64)

    def of_raw(raw: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(spline, {"raw": raw}, (z,))

    assert torch.autograd.gradcheck(of_raw, (spline.raw.detach().clone().requires_grad_(),))


def test_a_slope_beyond_its_end_is_not_stuck():
    spline = LinearSpline(1, knots=1, slope=1.0)
    spline.raw.data.fill_(1.5)
    spline(torch.tensor([[2.0]])).sum().backward()
    assert spline.raw.grad is not None
    assert (spline.raw.grad[0, 1] > 0).item()  # descent leads back inside: kept
    spline.raw.grad = None
    (-spline(torch.tensor([[2.0]]))).sum().backward()
    assert (spline.raw.grad == 0).all()  # descent leads further outside: dropped


def test_start_values():
    z = torch.linspace(-2, 2, 41).expand(1, 2, -1)
    torch.testing.assert_close(LinearSpline(2, slope=1.0)(z), z)
    torch.testing.assert_close(LinearSpline(2, slope=0.0)(z), 0 * z)
    huber = LinearSpline(2, knots=21, reach=1.0, slope=huber_slopes(0.5))
    torch.testing.assert_close(huber(z), z.clamp(-0.5, 0.5))
    torch.testing.assert_close(Clip(2, 0.5)(z), z.clamp(-0.5, 0.5))
    torch.testing.assert_close(z - huber(z), z.sign() * (z.abs() - 0.5).clamp(min=0))


def test_transforms():
    """Forward mode, vmap and second derivatives pass: the lower bounds of a certificate need them."""
    spline = random_spline(7, -0.2, 1.0)
    z, dz = torch.randn(2, 4, 3, 5, dtype=torch.float64).unbind(0)
    value, tangent = torch.func.jvp(spline, (z,), (dz,))[:2]
    torch.testing.assert_close(value, spline(z))
    torch.testing.assert_close(tangent, (spline(z + 1e-7 * dz) - spline(z)) / 1e-7, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.func.vmap(spline)(torch.stack([z, dz])), torch.stack([spline(z), spline(dz)]))
    pulled = torch.func.vjp(spline, z)[1]
    torch.testing.assert_close((pulled(dz)[0] * dz).sum(), (tangent * dz).sum())


def test_refusals():
    with pytest.raises(ShapeError, match="odd"):
        LinearSpline(2, knots=4)
    with pytest.raises(ConditionError, match="low < high"):
        LinearSpline(2, low=1.0, high=0.0)
    with pytest.raises(ConditionError, match="start inside"):
        LinearSpline(2, slope=1.5)
    with pytest.raises(ShapeError, match="channels"):
        LinearSpline(2)(torch.randn(1, 3, 4))
    with pytest.raises(ConditionError, match="at least 0"):
        MonotoneSpline(LinearSpline(2, low=-0.1))
    with pytest.raises(ConditionError, match="positive"):
        Clip(2, -1.0)
