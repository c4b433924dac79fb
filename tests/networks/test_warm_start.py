"""A warm-started nonexpansive network: its closed form, against theory, shared multipliers and what is attained."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import firmly as fm
from firmly.certificates import gains
from firmly.errors import ConditionError, ShapeError
from firmly.linear import BlockSampling, Dense, Identity, LinearMap
from firmly.networks import WarmStart
from firmly.prox import L1, Clip, GradientStep, Ridge, dct_filters


def sampling() -> BlockSampling:
    return BlockSampling.gaussian(6, (1, 12, 12), torch.Generator().manual_seed(0), block=4)


def network(A: LinearMap, Q: LinearMap, cap: float = 1.0, depth: int = 4, step: float = 0.9) -> WarmStart:
    ridge = Ridge(20 * dct_filters(3, 6), Clip(6, 0.05), cap=cap, zero_mean=True)
    algorithm = fm.algorithms.ForwardBackward(A, GradientStep(ridge), step_size=step)
    learned = ("step_size", "prior")
    return WarmStart(fm.unroll(algorithm, depth, learned, waive=("prior",) if cap > 1 else ()), Q).double()


def fitted() -> tuple[BlockSampling, LinearMap]:
    A = sampling()
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(1, 32, 32, generator=generator).double().cumsum(-1).cumsum(-2) / 200 for _ in range(3)]
    return A, A.linear_inverse(images, 0.02)


def jacobian_norm(net: WarmStart, y: Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(net, y).reshape(144, y.numel())
    return float(torch.linalg.matrix_norm(jacobian, 2))


def test_closed_form_is_the_formula() -> None:
    A, Q = fitted()
    expected = math.sqrt(Q.norm().upper ** 2 + 4 * 0.9 / 1.1)
    assert network(A, Q).closed_form() == pytest.approx(expected, rel=1e-5)
    twice = Dense(2 * torch.eye(5, dtype=torch.float64))
    net = WarmStart(
        fm.unroll(fm.algorithms.ForwardBackward(twice, L1(0.1), step_size=0.3), 3, ()), 0.5 * Identity((5,))
    )
    assert net.closed_form() == pytest.approx(math.sqrt(0.25 + 3 * 0.3 / (2 - 1.2)), rel=1e-8)


@pytest.mark.parametrize("t", [0.2, 0.9, 1.0, 1.7])
def test_what_a_layer_adds_is_the_smallest_possible(t: float) -> None:
    """|(1 - t) a + t b|^2 <= a^2 + c b^2 for all numbers a, b holds from c = t / (2 - t) on."""
    row = torch.tensor([1 - t, t], dtype=torch.float64)
    for c, holds in ((t / (2 - t), True), (0.999 * t / (2 - t), False)):
        form = torch.diag(torch.tensor([1.0, c], dtype=torch.float64)) - torch.outer(row, row)
        assert bool(torch.linalg.eigvalsh(form).min() >= -1e-12) == holds


@pytest.mark.parametrize("cap", [1.0, 1.9])
def test_bounds_are_above_what_is_attained_and_multipliers_below_the_closed_form(cap: float) -> None:
    A, Q = fitted()
    net = network(A, Q, cap)
    with torch.no_grad():
        for k, layer in enumerate(net.network.layers):
            layer.step_size = torch.tensor(0.5 + 0.3 * k, dtype=torch.float64)
    size = Q.norm().upper
    found = gains(net.network, weights={"start": size**2}, budget_s=20.0)
    proved = found.bound({"data": 1.0, "start": size})
    assert proved <= net.closed_form() * (1 + 1e-3)
    found.verify(net.network, ("data", "start"))
    generator = torch.Generator().manual_seed(3)
    for size in (0.01, 1.0, 5.0):
        y = size * torch.randn(1, *A.codomain, dtype=torch.float64, generator=generator)
        assert jacobian_norm(net, y) <= min(proved, net.closed_form())


def test_starts_from_the_linear_reconstruction() -> None:
    A, Q = fitted()
    net = network(A, Q)
    y = torch.randn(2, *A.codomain, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(y), net.network(y, Q(y)), rtol=0, atol=0)


def test_what_is_not_nonexpansive_is_refused() -> None:
    A, Q = fitted()
    with pytest.raises(ShapeError, match="start maps data"):
        WarmStart(network(A, Q).network, A)
    hqs = fm.unroll(fm.algorithms.Hqs(sampling(), L1(0.1)), 2, ())
    with pytest.raises(ConditionError, match="forward-backward"):
        WarmStart(hqs, Q).closed_form()
    algorithm = fm.algorithms.ForwardBackward(A, L1(0.1), step_size=2.5)
    with pytest.raises(ConditionError, match="not nonexpansive"):
        WarmStart(fm.unroll(algorithm, 2, (), waive=("step_size",)), Q).closed_form()
    weakly_convex = fm.algorithms.ForwardBackward(A, fm.prox.MCP(0.1, 3.0), step_size=1.0)
    with pytest.raises(ConditionError, match="not nonexpansive"):
        WarmStart(fm.unroll(weakly_convex, 2, (), waive=("prior",)), Q).closed_form()
