"""Support selection: the published rule by brute force, the continuous one as a prox with a known constant."""

from __future__ import annotations

import pytest
import torch

from firmly.errors import ConditionError, NotCertifiable
from firmly.networks import Selection
from firmly.networks.support_selection import ContinuousSelection, HardSelection, capped_simplex, hard_selection
from firmly.prox import L1, MCP

N = 9


def codes(batch: int = 40, n: int = N, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uneven() -> tuple[torch.Tensor, torch.Tensor]:
    """Thresholds and a metric that differ from entry to entry."""
    generator = torch.Generator().manual_seed(3)
    return tuple(0.3 + torch.rand(2, N, generator=generator, dtype=torch.float64))  # type: ignore[return-value]


@pytest.mark.parametrize("count", [0, 1, 4, N, N + 3])
def test_published_selection_entry_by_entry(count):
    z, theta = codes(), 0.5
    out = HardSelection(theta, count).prox(z)
    for sample, selected in zip(z, out):
        order = sample.abs().argsort(descending=True)[:count].tolist()
        for i, value in enumerate(sample.tolist()):
            shrunk = max(abs(value) - theta, 0.0) * (1 if value > 0 else -1)
            expected = value if i in order and abs(value) > theta else shrunk
            assert float(selected[i]) == pytest.approx(expected, abs=1e-15)
    counts = torch.arange(40) % (N + 1)
    rows = [hard_selection(z[i : i + 1], theta, int(c)) for i, c in enumerate(counts)]
    assert torch.equal(hard_selection(z, theta, counts), torch.cat(rows))


def test_published_selection_jumps_and_is_refused():
    prior = HardSelection(0.1, 1)
    z = torch.tensor([[1.0, 1.0 - 1e-9, 0.3]], dtype=torch.float64)
    jump = (prior.prox(z) - prior.prox(z.flip(1).roll(-1, 1).flip(1)[:, [1, 0, 2]])).norm()
    other = prior.prox(torch.tensor([[1.0 - 1e-9, 1.0, 0.3]], dtype=torch.float64))
    assert (prior.prox(z) - other).norm() == pytest.approx(2**0.5 * 0.1, rel=1e-6) and jump >= 0
    with pytest.raises(NotCertifiable, match="discontinuous"):
        prior.slope_at(1.0)


def test_published_selection_is_a_prox_of_the_trimmed_l1_norm():
    prior, z = HardSelection(0.4, 3), codes()
    v, generator = HardSelection(0.4, 3).prox(z), torch.Generator().manual_seed(1)
    best = prior.value(v) + 0.5 * (v - z).square().sum(1)
    for size in (0.01, 0.3, 1.0):
        for _ in range(50):
            w = v + size * torch.randn(v.shape, generator=generator, dtype=v.dtype)
            assert bool((prior.value(w) + 0.5 * (w - z).square().sum(1) >= best - 1e-12).all())


@pytest.mark.parametrize("count", [0.0, 1.0, 2.5, 4.0, float(N)])
@pytest.mark.parametrize("ramp", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("scaled", [False, True])
def test_continuous_selection_is_the_prox_of_its_penalty(count, ramp, scaled):
    weight, metric = uneven() if scaled else (0.4, None)
    prior, z = ContinuousSelection(weight, count, ramp, metric), codes(8)
    v, generator = prior.prox(z), torch.Generator().manual_seed(1)
    m = torch.ones(N, dtype=torch.float64) if metric is None else metric

    def objective(x):
        return prior.value(x) + 0.5 * (m * (x - z).square()).sum(1)

    best = objective(v)
    for size in (1e-3, 0.05, 0.5):
        for _ in range(30):
            w = v + size * torch.randn(v.shape, generator=generator, dtype=v.dtype)
            assert bool((objective(w) >= best - 1e-12).all())
    for zeroed in range(N):  # corners of the l1 part
        w = v.clone()
        w[:, zeroed] = 0
        assert bool((objective(w) >= best - 1e-12).all())


def test_continuous_selection_between_its_limits():
    z = codes()
    torch.testing.assert_close(ContinuousSelection(0.4, 0, 1.0).prox(z), L1(0.4).prox(z), atol=1e-15, rtol=0)
    firm = MCP(0.4, concavity=3.0)  # slope 1 / (1 - 1/3) = 1 + 1 / ramp for a ramp of 2
    torch.testing.assert_close(ContinuousSelection(0.4, N, 2.0).prox(z), firm.prox(z), atol=1e-14, rtol=0)
    sharp, hard = ContinuousSelection(0.4, 3, 1e-7).prox(z), HardSelection(0.4, 3).prox(z)
    torch.testing.assert_close(sharp, hard, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        ContinuousSelection(0.2, 3, 1.0).prox(z, 2.0), ContinuousSelection(0.4, 3, 1.0).prox(z), atol=1e-15, rtol=0
    )


@pytest.mark.parametrize("ramp", [0.2, 1.0, 4.0])
def test_slopes_in_the_metric(ramp):
    weight, metric = uneven()
    root = metric.sqrt()
    for prior, scale in (
        (ContinuousSelection(0.4, 3, ramp), 1.0),
        (ContinuousSelection(weight, 3, ramp, metric), root),
    ):
        high = 1 + 1 / ramp
        steepest = 0.0
        for z in codes(30, seed=2):
            jacobian = torch.autograd.functional.jacobian(lambda t, prior=prior: prior.prox(t[None])[0], z)
            inside = scale[:, None] * jacobian / scale if isinstance(scale, torch.Tensor) else jacobian
            torch.testing.assert_close(inside, inside.T, atol=1e-10, rtol=0)
            slopes = torch.linalg.eigvalsh(inside)
            assert slopes.min() >= -1e-10 and slopes.max() <= high + 1e-10
            steepest = max(steepest, float(slopes.max()))
        assert steepest == pytest.approx(high, rel=1e-6)
        z, w = codes(2000, seed=4), codes(2000, seed=5)
        moved = (prior.prox(z) - prior.prox(z + 0.1 * w)) * scale
        assert bool((moved.norm(dim=1) <= (high + 1e-12) * (0.1 * w * scale).norm(dim=1)).all())
        low, bound = prior.slope_at(1.0)
        assert bound >= high and (prior.metric is not None or low == 0.0)


def test_capped_simplex_is_the_projection():
    x, cost = 3 * codes(200, 7), 0.5 + torch.rand(200, 7, dtype=torch.float64)
    for count in (0.0, 0.7, 2.0, 6.5, 7.0, 9.0):
        w = capped_simplex(x, cost, count)
        assert bool(((w >= 0) & (w <= 1)).all()) and bool((w.sum(1) <= count + 1e-12).all())
        low, high = torch.zeros(200, 1, dtype=x.dtype), torch.full((200, 1), 50.0, dtype=x.dtype)
        for _ in range(100):  # bisection for the multiplier
            mu = (low + high) / 2
            over = (x - mu * cost).clamp(0, 1).sum(1, keepdim=True) > count
            low, high = torch.where(over, mu, low), torch.where(over, high, mu)
        torch.testing.assert_close(w, (x - high * cost).clamp(0, 1), atol=1e-10, rtol=0)


def test_gradients_pass_the_selection():
    weight, metric = uneven()
    for seed in range(5):
        z = codes(3, seed=seed).requires_grad_()
        weights = weight.clone().requires_grad_()

        def out(z, weights):
            prior = ContinuousSelection(1.0, 3, 0.8, metric)
            prior.weight = weights
            return prior.prox(z)

        assert torch.autograd.gradcheck(out, (z, weights), atol=1e-7)


def test_ties_and_zeros():
    z = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, -1.0], [0.5, 0.5, 0.5]], dtype=torch.float64)
    out = ContinuousSelection(0.5, 1, 1.0).prox(z)
    torch.testing.assert_close(out[0], torch.zeros(3, dtype=z.dtype))
    torch.testing.assert_close(out[1].abs(), torch.full((3,), 0.5 + 0.5 / 3, dtype=z.dtype))
    assert out.isfinite().all()


def test_rules():
    rule = Selection()
    counts = [rule.prior(k, 500, torch.tensor(0.1)).count for k in (1, 2, 10, 11, 16)]
    assert counts == [6, 12, 60, 65, 65]
    assert isinstance(rule.prior(1, 500, torch.tensor(0.1)), HardSelection)
    assert isinstance(Selection(ramp=0.5).prior(1, 500, torch.tensor(0.1)), ContinuousSelection)
    for bad in ({"ramp": -1.0}, {"ramp": 0.0}, {"ramp": float("inf")}, {"count": -1}):
        with pytest.raises(ConditionError):
            ContinuousSelection(**{"weight": 0.1, "count": 3, "ramp": 1.0, **bad})
    with pytest.raises(ConditionError, match="positive"):
        ContinuousSelection(0.0, 3)
