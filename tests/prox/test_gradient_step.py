"""The gradient step on a ridge: a prox of its own function, with slopes in [1 - kappa, 1].

Its function is found by iteration, too slow for the minimiser of the conformance tests.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from firmly.errors import ConditionError
from firmly.prox import Clip, GradientStep, LinearSpline, Ridge


def normal(seed: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(6, 1, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def prior(cap: float) -> GradientStep:
    kernel = torch.tensor([[1.0, -1.0], [0.3, 0.2]], dtype=torch.float64).reshape(2, 1, 1, 2)
    return GradientStep(Ridge(5 * kernel, Clip(2, 0.4), cap=cap, zero_mean=True)).double()


@pytest.mark.parametrize("step", [0.3, 1.0, 2.5])
def test_prox_minimises_its_own_function(step: float) -> None:
    g, z = prior(0.5), normal(0)

    def objective(x: Tensor) -> Tensor:
        return (x - z).square().flatten(1).sum(1) / 2 + step**2 * g.value(x / step)

    p = g.prox(z, step)
    best = objective(p)
    for seed in range(1, 6):
        for size in (1e-3, 0.1, 1.0):
            assert (objective(p + normal(seed, size)) >= best - 1e-12).all()


@pytest.mark.parametrize("cap", [0.5, 1.0, 1.9])
def test_slopes_fill_their_interval(cap: float) -> None:
    g = prior(cap)
    low, high = g.slope_at(0.7)
    slopes = []
    for seed in range(20):
        z = normal(seed, (0.02, 0.3, 1.0)[seed % 3])[:1]
        jacobian = torch.autograd.functional.jacobian(lambda x: g.prox(x, 0.7), z).reshape(8, 8)
        slopes.append(torch.linalg.eigvalsh(jacobian))
        dz = normal(seed + 100, 0.5)
        dv = g.prox(normal(seed) + dz, 0.7) - g.prox(normal(seed), 0.7)
        assert (((dv - low * dz) * (high * dz - dv)).flatten(1).sum(1) >= -1e-12).all()
    found = torch.cat(slopes)
    assert low - 1e-12 <= found.min() <= low + 0.02
    assert high - 1e-9 <= found.max() <= high + 1e-12


def test_gradients_reach_the_filters_and_the_step() -> None:
    g, step = prior(0.8), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(g.prox, (normal(3, 0.2)[:2].requires_grad_(), step), eps=1e-7, atol=1e-5)
    g.prox(normal(3)).sum().backward()
    assert all(p.grad is not None for p in g.parameters())


def test_bad_input_is_refused() -> None:
    kernel = torch.ones(1, 1, 2, 2)
    with pytest.raises(ConditionError, match="convex"):
        GradientStep(Ridge(kernel, LinearSpline(1, low=-0.5)))
    with pytest.raises(ConditionError, match="positive"):
        prior(0.5).slope_at(0.0)
    with pytest.raises(ConditionError, match="kappa < 1"):
        prior(1.9).value(normal(0))
