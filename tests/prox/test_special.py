"""What single priors promise beyond the conformance class: closed forms, refusals, certified accuracy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import firmly.prox as fp
from firmly.errors import ConditionError, DataError, NotConverged, NotDifferentiable, ShapeError

entries = st.lists(st.floats(-5, 5), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(entries, st.floats(0.1, 4))
def test_simplex_satisfies_its_optimality_conditions(values: list[float], total: float):
    """x = max(z - theta, 0) for one number theta, and the entries sum to the total."""
    z = torch.tensor([values], dtype=torch.float64)
    x = fp.Simplex(total).prox(z)
    assert x.min() >= 0
    torch.testing.assert_close(x.sum(), torch.tensor(total, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    theta = (z - x)[x > 0]
    assert theta.max() - theta.min() <= 1e-12 * (1 + z.abs().max())
    assert (z[x == 0] <= theta.mean() + 1e-12 * (1 + z.abs().max())).all()


@settings(max_examples=200, deadline=None)
@given(entries, st.floats(0.1, 4))
def test_l1_ball(values: list[float], radius: float):
    z = torch.tensor([values], dtype=torch.float64)
    x = fp.L1Ball(radius).prox(z)
    if z.abs().sum() <= radius:
        assert torch.equal(x, z)
    else:
        torch.testing.assert_close(x.abs().sum(), torch.tensor(radius, dtype=torch.float64), rtol=1e-12, atol=1e-12)
        assert (x * z >= 0).all()


def test_closed_forms():
    z = torch.tensor([[3.0, -0.5, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(fp.L1(1.0).prox(z, 0.6), torch.tensor([[2.4, 0.0, 0.4]], dtype=torch.float64))
    torch.testing.assert_close(fp.MCP(1.0, 2.0).prox(z, 1.0), torch.tensor([[3.0, 0.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(fp.SCAD(1.0, 3.7).prox(z, 1.0)[0, 0], torch.tensor((2.7 * 3 - 3.7) / 1.7).double())
    poisson = fp.KullbackLeibler(torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(poisson.prox(z), torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64))


def test_weakly_convex_steps_are_refused():
    z = torch.randn(1, 4)
    for prior, step in ((fp.MCP(0.3, 2.0), 2.0), (fp.SCAD(0.3, 3.0), 2.1)):
        for given_step in (step, torch.tensor(step)):
            with pytest.raises(ConditionError, match="single-valued"):
                prior.prox(z, given_step)
            with pytest.raises(ConditionError, match="single-valued"):
                prior.slope_at(given_step)
    assert fp.MCP(0.3, 2.0).slope_at(1.0).high == pytest.approx(2.0)


@pytest.mark.parametrize("make", [fp.L1, fp.ElasticNet, fp.L2, fp.SquaredL2, fp.GroupL1, fp.Nuclear, fp.MCP, fp.SCAD])
def test_a_negative_weight_is_refused(make: type[fp.Prior]):
    with pytest.raises(ConditionError, match="not negative"):
        make(-0.1)  # type: ignore[call-arg]
    weight = nn.Parameter(torch.tensor(0.1))
    prior = make(weight)  # type: ignore[call-arg]
    assert len(list(prior.parameters())) == 1
    weight.data.fill_(-0.1)  # training went too far: a bound would be wrong
    with pytest.raises(ConditionError, match="not negative"):
        prior.slope_at(1.0)


def test_bad_arguments():
    with pytest.raises(ConditionError, match="low <= high"):
        fp.Box(1.0, 0.0)
    with pytest.raises(ConditionError, match="a > 2"):
        fp.SCAD(1.0, 2.0)
    with pytest.raises(DataError, match="counts"):
        fp.KullbackLeibler(torch.tensor([1.0, -1.0]))
    with pytest.raises(ShapeError, match="square"):
        fp.LogDet().prox(torch.randn(1, 2, 3))
    with pytest.raises(ConditionError, match="positive"):
        fp.ChannelThreshold(2, 0.0)


def test_constraints_are_infinite_outside():
    outside = torch.tensor([[0.5, 0.6, -0.2]])
    for prior in (fp.Box(0.0, 1.0), fp.NonNegative(), fp.Simplex(), fp.L2Ball(0.5), fp.L1Ball(1.0)):
        assert prior.value(outside).item() == torch.inf
        assert prior.value(prior.prox(outside)).item() == 0.0


def test_weights_reach_their_gradient():
    weight = torch.tensor([0.1, 0.2], requires_grad=True)
    fp.L1(weight * 2).prox(torch.tensor([[1.0, -1.0]])).sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([-2.0, 2.0]))


def test_nuclear_gradient_at_equal_singular_values():
    """The naive gradient of an SVD is infinite here."""
    z = torch.eye(3, dtype=torch.float64)[None].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fp.Nuclear(0.4).prox(x), (z,))
    assert torch.autograd.gradcheck(lambda x: fp.LogDet(0.4).prox(x), (z,))


@pytest.mark.parametrize("prior", [fp.Nuclear(0.4), fp.LogDet(0.4), fp.VonNeumann(0.4)], ids=lambda p: type(p).__name__)
def test_spectral_maps_refuse_a_second_derivative(prior):
    """Under a linear loss too, where the gradient that comes in is a constant."""
    z = torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True)
    for loss in (torch.sum, lambda x: x.square().sum()):
        (first,) = torch.autograd.grad(loss(prior.prox(z)), z, create_graph=True)
        with pytest.raises(NotDifferentiable, match="differentiated once"):
            torch.autograd.grad(first.square().sum() + z.sum(), z)


class TestTV:
    @pytest.mark.parametrize("isotropic", [True, False])
    def test_certified_accuracy(self, isotropic: bool):
        z = torch.rand(2, 1, 9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        exact = fp.TV(0.1, isotropic, accuracy=1e-7, max_iterations=100000).prox(z)
        for accuracy in (1e-2, 1e-4):
            rough = fp.TV(0.1, isotropic, accuracy=accuracy).prox(z)
            assert ((rough - exact).square().mean((1, 2, 3)).sqrt() <= accuracy + 1e-7).all()

    @pytest.mark.parametrize("isotropic", [True, False])
    def test_gradient(self, isotropic: bool):
        z = torch.rand(2, 1, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        step = torch.tensor(0.15, dtype=torch.float64, requires_grad=True)
        prior = fp.TV(1.0, isotropic, accuracy=1e-7, max_iterations=50000)
        assert torch.autograd.gradcheck(prior.prox, (z, step), eps=1e-5, atol=1e-3)

    def test_one_dimension_by_the_taut_string(self):
        """Two blocks move towards each other by t / length."""
        z = torch.tensor([[[0.0, 0.0, 4.0, 4.0, 4.0]]], dtype=torch.float64)
        expected = torch.tensor([[[0.3, 0.3, 3.8, 3.8, 3.8]]], dtype=torch.float64)
        found = fp.TV(0.6, accuracy=1e-7, max_iterations=100000).prox(z)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    def test_large_weights_give_the_mean(self):
        z = torch.rand(1, 2, 4, 4, dtype=torch.float64)
        mean = z.mean((2, 3), keepdim=True).expand_as(z)
        torch.testing.assert_close(fp.TV(10.0, accuracy=1e-6).prox(z), mean, rtol=0, atol=1e-4)

    def test_what_cannot_be_certified_raises(self):
        with pytest.raises(NotConverged, match="max_iterations"):
            fp.TV(1.0, accuracy=1e-8, max_iterations=20).prox(torch.rand(1, 1, 8, 8))
        with pytest.raises(DataError, match="finite"):
            fp.TV(1.0).prox(torch.full((1, 1, 4, 4), torch.nan))
