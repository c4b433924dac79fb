"""What every prior promises. Adding a prior is one file in src/firmly/prox and one line in CASES."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

import firmly.prox as fp
from firmly.errors import ConditionError, DataError

SHAPE = (3, 2, 2)


class Case(NamedTuple):
    make: Callable[[], fp.Prior]
    shape: tuple[int, ...] = SHAPE
    steps: tuple[float, ...] = (0.3, 1.0, 2.5)
    convex: bool = True
    smooth: bool = True  # False: gradients are checked elsewhere
    complex_data: bool = True
    tol: float = 1e-10
    scaled: bool = False  # the step is a scale: t^2 g(x / t) in place of t g(x)


def spline(low: float, high: float) -> fp.MonotoneSpline:
    generator = torch.Generator().manual_seed(3)
    knots = fp.LinearSpline(3, knots=7, reach=1.5, low=low, high=high)
    knots.raw.data = low + (high - low) * (1.4 * torch.rand(3, 8, generator=generator) - 0.2)
    return fp.MonotoneSpline(knots)


def counts() -> Tensor:
    return torch.tensor([0.0, 1.0, 4.0, 0.5]).reshape(1, 2, 2)


weights = torch.linspace(0.2, 0.9, 12, dtype=torch.float64).reshape(SHAPE)

CASES = {
    "zero": Case(fp.Zero),
    "l1": Case(lambda: fp.L1(0.4)),
    "l1 weighted": Case(lambda: fp.L1(weights)),
    "elastic net": Case(lambda: fp.ElasticNet(0.3, 0.7)),
    "l2": Case(lambda: fp.L2(0.8)),
    "squared l2": Case(lambda: fp.SquaredL2(0.8)),
    "squared l2 weighted": Case(lambda: fp.SquaredL2(weights)),
    "group l1": Case(lambda: fp.GroupL1(0.6)),
    "mixed norm": Case(lambda: fp.MixedNorm(0.6, orientations=2), (3, 4)),
    "box": Case(lambda: fp.Box(-0.5, 0.8), complex_data=False),
    "nonnegative": Case(fp.NonNegative, complex_data=False),
    "simplex": Case(fp.Simplex, complex_data=False),
    "simplex channels": Case(lambda: fp.Simplex(1.5, dim=1), complex_data=False),
    "l2 ball": Case(lambda: fp.L2Ball(1.1)),
    "l1 ball": Case(lambda: fp.L1Ball(1.7)),
    "huber": Case(lambda: fp.Huber(0.5, 0.9)),
    "kullback-leibler": Case(lambda: fp.KullbackLeibler(counts(), 0.8, background=0.1), complex_data=False),
    "tv isotropic": Case(lambda: fp.TV(0.3, accuracy=1e-6), (1, 4, 3), smooth=False, tol=1e-5),
    "tv anisotropic": Case(lambda: fp.TV(0.3, isotropic=False, accuracy=1e-6), (2, 5), smooth=False, tol=1e-5),
    "tv of signals": Case(lambda: fp.TV1D(0.3), (2, 5), complex_data=False),
    "nuclear": Case(lambda: fp.Nuclear(0.7), (3, 4)),
    "log-determinant": Case(lambda: fp.LogDet(0.5), (3, 3)),
    "log-determinant in noise": Case(lambda: fp.NoisyLogDet(0.5, 0.8), (3, 3)),
    "von neumann": Case(lambda: fp.VonNeumann(0.2), (3, 3)),
    "mcp": Case(lambda: fp.MCP(0.5, 3.0), convex=False),
    "scad": Case(lambda: fp.SCAD(0.5, 4.0), convex=False),
    "channel threshold": Case(lambda: fp.ChannelThreshold(3, torch.tensor([0.2, 0.5, 0.8]))),
    "monotone spline": Case(lambda: spline(0.1, 1.0), complex_data=False, scaled=True),
    "steep spline": Case(lambda: spline(0.2, 1.6), complex_data=False, scaled=True, convex=False),
}


def sample(
    case: Case, batch: int = 4, seed: int = 0, spread: float = 1.5, dtype: torch.dtype = torch.float64
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(batch, *case.shape, dtype=dtype, generator=generator)


def inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.conj() * b).real.flatten(1).sum(1)


def function(case: Case, prior: fp.Prior, x: Tensor, step: float) -> Tensor:
    return step**2 * prior.value(x / step) if case.scaled else step * prior.value(x)


def objective(case: Case, prior: fp.Prior, x: Tensor, z: Tensor, step: float) -> Tensor:
    return inner(x - z, x - z) / 2 + function(case, prior, x, step)


@pytest.fixture(params=[torch.float64, torch.complex128], ids=["real", "complex"])
def dtype(request: pytest.FixtureRequest, case: Case) -> torch.dtype:
    if request.param.is_complex and not case.complex_data:
        pytest.skip("a function of real data")
    return request.param


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
class TestPrior:
    def test_prox_is_optimal_against_perturbations(self, case: Case, dtype: torch.dtype):
        prior = case.make().double()
        for step in case.steps:
            z = sample(case, dtype=dtype)
            p = prior.prox(z, step)
            best = objective(case, prior, p, z, step)
            assert torch.isfinite(best).all()
            for size in (1e-3, 1e-2, 0.1, 1.0):
                for direction in (
                    sample(case, seed=7, dtype=dtype),
                    z - p,
                    -p,
                    prior.prox(sample(case, 4, 9, 1.5, dtype)) - p,
                ):
                    assert (
                        objective(case, prior, p + size * direction, z, step) >= best - case.tol * (1 + best.abs())
                    ).all()

    def test_prox_is_optimal_against_a_minimiser(self, case: Case):
        prior = case.make().double()
        step = case.steps[-1]
        z = sample(case, batch=1, seed=5)
        best = objective(case, prior, prior.prox(z, step), z, step).detach().item()

        def of_array(values: np.ndarray) -> float:
            x = torch.from_numpy(values).reshape(z.shape)
            found = objective(case, prior, x, z, step).detach().item()
            return found if math.isfinite(found) else 1e6

        start = prior.prox(z + 0.1 * sample(case, 1, 6), step).detach()
        found = minimize(of_array, start.flatten().numpy(), method="Powell", options={"maxfev": 1500})
        assert best <= found.fun + case.tol * (1 + abs(best))

    def test_slope_interval(self, case: Case, dtype: torch.dtype):
        """<dv - low dz, high dz - dv> >= 0 on random pairs, near and far."""
        prior = case.make().double()
        for step in case.steps:
            low, high = prior.slope_at(step)
            assert not case.convex or high <= 1 + 1e-12
            for size in (0.01, 0.5, 3.0):
                z = sample(case, batch=200, seed=11, dtype=dtype, spread=2.0)
                dz = size * sample(case, batch=200, seed=12, dtype=dtype)
                dv = prior.prox(z + dz, step) - prior.prox(z, step)
                assert (inner(dv - low * dz, high * dz - dv) >= -case.tol * inner(dz, dz) - 1e-12).all()

    def test_slope_interval_is_tight(self, case: Case):
        """The eigenvalues of Jacobians fill the interval: a smaller one would be wrong."""
        prior = case.make().double()
        low, high = prior.slope_at(case.steps[1])
        slopes = []
        for seed in range(30):
            z = sample(case, batch=1, seed=seed, spread=(0.3, 1.0, 3.0)[seed % 3])
            jacobian = torch.autograd.functional.jacobian(lambda x: prior.prox(x, case.steps[1]), z)
            slopes.append(torch.linalg.eigvalsh(jacobian.reshape(z.numel(), z.numel())))
        found = torch.cat(slopes)
        assert low - 1e-8 <= found.min() <= low + 0.05
        assert high - 0.05 <= found.max() <= high + 1e-8

    def test_moreau(self, case: Case, dtype: torch.dtype):
        """z = prox_{t g}(z) + t prox_{g* / t}(z / t)."""
        if case.scaled or not case.convex:
            pytest.skip("the step is a scale, or the function is not convex")
        prior = case.make().double()
        z = sample(case, dtype=dtype)
        for step in case.steps:
            both = prior.prox(z, step) + step * prior.conjugate_prox(z / step, 1 / step)
            torch.testing.assert_close(both, z, rtol=0, atol=1e-12)

    def test_fenchel_young(self, case: Case, dtype: torch.dtype):
        """u = z - p is a subgradient at p = prox(z): g(x) >= g(p) + <u, x - p> for all x, a brute-force conjugate."""
        if not case.convex:
            pytest.skip("not convex")
        prior = case.make().double()
        z = sample(case, batch=3, dtype=dtype)
        p = prior.prox(z, 1.0)
        for seed in range(40):
            x = prior.prox(sample(case, batch=3, seed=100 + seed, spread=0.5 + seed / 10, dtype=dtype), 1.0)
            gap = prior.value(x) - prior.value(p) - inner(z - p, x - p)
            assert (gap >= -10 * case.tol * (1 + prior.value(x).abs())).all()

    def test_conjugate_prox_by_brute_force(self, case: Case):
        """prox_{g*}(z) lies in the domain of g*, and is optimal for the conjugate computed on a cloud of points."""
        if not case.convex or case.scaled:
            pytest.skip("not convex, or the step is a scale")
        prior = case.make().double()
        z = sample(case, batch=1, seed=3)
        u = prior.conjugate_prox(z)
        cloud = torch.cat([prior.prox(z), prior.prox(sample(case, 2000, 4, 3.0))])
        values = prior.value(cloud)

        def conjugate(v: Tensor) -> Tensor:  # a lower bound of g*, exact at u because the cloud holds its maximiser
            return (inner(v.expand_as(cloud), cloud) - values).max()

        best = inner(u - z, u - z) / 2 + conjugate(u)
        for seed in range(20):
            v = u + 0.1 * sample(case, 1, 50 + seed)
            assert inner(v - z, v - z) / 2 + conjugate(v) >= best - 10 * case.tol

    def test_gradient(self, case: Case):
        if not case.smooth:
            pytest.skip("checked in its own test")
        prior = case.make().double()
        z = sample(case, batch=2, seed=21).requires_grad_()
        step = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(prior.prox, (z, step), eps=1e-7, atol=1e-5)

    def test_batch_is_a_loop(self, case: Case, dtype: torch.dtype):
        prior = case.make().double()
        z = sample(case, dtype=dtype)
        together, values = prior.prox(z, 0.8), prior.value(prior.prox(z, 0.8))
        for i in range(len(z)):
            torch.testing.assert_close(prior.prox(z[i : i + 1], 0.8), together[i : i + 1], rtol=0, atol=10 * case.tol)
            torch.testing.assert_close(prior.value(together[i : i + 1]), values[i : i + 1])
        assert values.shape == (len(z),)

    def test_float32(self, case: Case):
        prior = case.make().float()
        z = sample(case).float()
        p = prior.prox(z, 0.8)
        assert p.dtype == torch.float32
        torch.testing.assert_close(p.double(), case.make().double().prox(z.double(), 0.8), rtol=1e-4, atol=1e-4)

    def test_bad_input(self, case: Case):
        prior = case.make().double()
        for step in (0.0, -1.0, float("nan")):
            with pytest.raises(ConditionError, match="positive"):
                prior.prox(sample(case), step)
            with pytest.raises(ConditionError, match="positive"):
                prior.slope_at(torch.tensor(step))
        if not case.complex_data:
            with pytest.raises(DataError, match="real"):
                prior.prox(sample(case, dtype=torch.complex128))

    def test_state(self, case: Case):
        """Tensors move with the module; a prior can be saved and restored."""
        prior = case.make().double()
        copy = case.make().double()
        copy.load_state_dict(prior.state_dict())
        torch.testing.assert_close(copy.prox(sample(case)), prior.prox(sample(case)))
        assert prior.structure in ("separable", "channel", "group", "whole")
