"""Normalising flows of invertible Bregman layers: likelihoods, samples, certificates, training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import firmly as fm
from firmly.errors import ConditionError, DataError, SettingsError, ShapeError
from firmly.lab.flow_data import PLANE, table_split
from firmly.lab.flows import FlowSettings, compare, fit_density, fit_table, flow_of, gaussian_likelihood, interval
from firmly.lab.run_folder import RunFolder
from firmly.networks.bregman_flow import Affine, BregmanFlow, InverseMatrix, WideBregmanLayer
from firmly.networks.bregman_inverse import Inverse
from firmly.networks.bregman_invertible import invertibility
from firmly.networks.bregman_log_det import log_det

CONDITIONS = ["one-sided", "contraction"]


def random_flow(features: int = 3, depth: int = 3, width: int = 20, **options) -> BregmanFlow:
    """A flow with weights that are far from their start."""
    generator = torch.Generator().manual_seed(0)
    flow = BregmanFlow(features, depth, width, generator=generator, **options).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return flow


def points(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("activation", ["tanh", "softplus", "sigmoid"])
def test_the_log_determinant_is_that_of_autograd(condition, activation: str):
    flow, x = random_flow(condition=condition, activation=activation), points(4, 3)
    J = torch.stack([torch.autograd.functional.jacobian(flow, row[None]).reshape(3, 3) for row in x])
    assert torch.allclose(flow.log_det(x), torch.linalg.slogdet(J)[1], atol=1e-9)
    z, total = flow.encode(x)
    assert torch.allclose(z, flow(x), atol=1e-12)
    assert torch.allclose(flow.log_prob(x), total - 0.5 * z.square().sum(1) - 1.5 * math.log(2 * math.pi), atol=1e-12)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_samples_are_the_inverse(condition):
    flow, x = random_flow(condition=condition), points(50, 3)
    assert torch.allclose(flow.inverse(flow(x)), x, atol=1e-9)
    sample = flow.sample(10, torch.Generator().manual_seed(3))
    z = torch.randn(10, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.allclose(flow(sample), z, atol=1e-8)


def test_the_density_integrates_to_one():
    flow = BregmanFlow(2, 2, 10, generator=torch.Generator().manual_seed(2)).double()
    side = torch.linspace(-8, 8, 401, dtype=torch.float64)
    total = flow.log_prob(torch.cartesian_prod(side, side)).exp().sum() * (side[1] - side[0]) ** 2
    assert float(total.detach()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_wide_layers_are_proved_whatever_they_learn(condition):
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        layer = WideBregmanLayer(4, 30, "scaled_tanh", condition, 0.1, generator).double()
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        proof = invertibility(layer)
        assert proof.margin >= 0.1 - 1e-8
        assert proof.condition == condition
        u = points(6, 4)
        v, total = layer.with_log_det(u)
        assert torch.allclose(v, layer(u), rtol=1e-12, atol=1e-12)
        assert torch.allclose(total, log_det(layer, u), atol=1e-10)
        assert torch.allclose(layer.inverse(v), u, atol=1e-8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    flow, x = random_flow().cuda(), points(20, 3).cuda()
    assert torch.allclose(flow.inverse(flow(x)), x, atol=1e-9)
    assert torch.allclose(flow.log_prob(x).cpu(), flow.cpu().log_prob(x.cpu()), atol=1e-9)
    assert flow.inverse_lipschitz() > 0


def test_gradients_are_finite_at_zero_weights():
    layer = WideBregmanLayer(3, 5).double()
    with torch.no_grad():
        layer.V.zero_()
    layer.with_log_det(points(4, 3))[1].sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())


def test_gradients_of_the_inverse_reach_every_weight():
    layer = WideBregmanLayer(2, 3, generator=torch.Generator().manual_seed(0)).double()
    v = points(1, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, *_: layer.inverse(v), (v, *layer.parameters()))


def test_the_inverse_of_a_flow_is_certified():
    flow = BregmanFlow(2, 2, 8, generator=torch.Generator().manual_seed(0)).double()
    flow.start_at(points(100, 2))
    cert = fm.certify(Inverse(flow), shape=(2,))
    fm.verify(cert, Inverse(flow))
    assert cert.lower <= cert.upper <= flow.inverse_lipschitz()
    J = torch.stack([torch.autograd.functional.jacobian(flow, row[None]).reshape(2, 2) for row in points(40, 2)])
    assert float(torch.linalg.matrix_norm(torch.linalg.inv(J), 2).max()) <= cert.upper


def test_affine_layers():
    layer = Affine(3).double()
    x = 5 * points(200, 3) + 2
    layer.whiten(x)
    out = layer(x)
    assert torch.allclose(out.mean(0), torch.zeros(3, dtype=x.dtype), atol=1e-12)
    assert torch.allclose(out.std(0), torch.ones(3, dtype=x.dtype), atol=1e-12)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(points(*p.shape))
    assert torch.allclose(layer.inverse(layer(x)), x, atol=1e-10)
    assert torch.allclose(layer.with_log_det(x)[1], torch.linalg.slogdet(layer.matrix())[1].expand(200), atol=1e-12)
    inverse_map = InverseMatrix(fm.linear.Dense(layer.matrix().detach()))
    assert torch.allclose(inverse_map.T(x), x @ torch.linalg.inv(layer.matrix()), atol=1e-10)
    exact = float(1 / torch.linalg.svdvals(layer.matrix().detach())[-1])
    assert exact * (1 - 1e-12) <= inverse_map.norm().upper <= exact * (1 + 1e-9)


def test_refusals():
    with pytest.raises(ConditionError, match="margin"):
        WideBregmanLayer(2, 4, margin=1.0)
    with pytest.raises(ConditionError, match="slopes"):
        WideBregmanLayer(2, 4, "exp")
    with pytest.raises(SettingsError, match="condition"):
        WideBregmanLayer(2, 4, condition="none")
    with pytest.raises(SettingsError, match="depth"):
        BregmanFlow(2, 0, 4)
    flow = BregmanFlow(2, 1, 4)
    with pytest.raises(ShapeError, match="takes"):
        flow.log_prob(torch.zeros(3, 5))
    with pytest.raises(DataError, match="two or more"):
        flow.start_at(torch.zeros(1, 2))


@pytest.mark.parametrize("density", PLANE, ids=lambda d: d.name)
def test_the_densities_of_the_plane(density):
    """They integrate to one, and their points have the entropy that the density says."""
    side = torch.linspace(-5, 5, 141, dtype=torch.float64) + 1e-4
    grid = torch.cartesian_prod(side, side)
    log_prob = torch.cat([density.log_prob(part) for part in grid.split(4000)])
    area = float(side[1] - side[0]) ** 2
    assert float(log_prob.exp().sum()) * area == pytest.approx(1, abs=0.02)
    entropy = -float(torch.where(log_prob > -50, log_prob.exp() * log_prob, 0.0).sum()) * area
    drawn = -float(density.log_prob(density.sample(4000, torch.Generator().manual_seed(0))).mean())
    assert drawn == pytest.approx(entropy, abs=0.08)


def test_training_raises_the_likelihood_and_resumes(tmp_path):
    settings = FlowSettings(depth=2, width=8, steps=100, batch=64, test=1000, seeds=1)
    trained = fit_density(PLANE[0], "one-sided", settings, 0, RunFolder(tmp_path))
    start = flow_of(2, "one-sided", settings, 0)
    start.start_at(PLANE[0].sample(64, torch.Generator().manual_seed(0)))
    test = PLANE[0].sample(1000, torch.Generator().manual_seed(10_000))
    assert trained.test > float(start.log_prob(test).mean().detach()) + 0.1
    again = fit_density(PLANE[0], "one-sided", settings, 0, RunFolder(tmp_path))  # from its last checkpoint
    assert again.test == trained.test


def test_tables(tmp_path):
    pytest.importorskip("sklearn")
    split = table_split("wine", 0)
    assert [tuple(part.shape) for part in split] == [(106, 13), (36, 13), (36, 13)]
    assert torch.allclose(split.train.std(0), torch.ones(13, dtype=torch.float64))
    with pytest.raises(SettingsError, match="wine"):
        table_split("cars", 0)
    settings = FlowSettings(depth=1, width=4, steps=40, batch=64, seeds=1, decays=(0.0, 5.0))
    trained = fit_table("wine", "one-sided", settings, 0, RunFolder(tmp_path))
    assert -25 < trained.test < -10
    assert -25 < gaussian_likelihood("wine", 0) < -10


def test_a_comparison(tmp_path):
    settings = FlowSettings(depth=1, width=4, steps=20, batch=32, test=500, seeds=2)
    found = compare(PLANE[2], settings, RunFolder(tmp_path))
    assert found.reference.mean == pytest.approx(-math.log(32))
    assert found.gain.mean == pytest.approx(found.ours.mean - found.twin.mean)
    assert max(found.ours.mean, found.twin.mean) < found.reference.mean
    assert [flow.layers[1].condition for flow in found.flows] == CONDITIONS


def test_intervals():
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / math.sqrt(3)))
    assert interval([1.0]).half == math.inf


def test_the_twin_has_no_fewer_parameters():
    for features in (2, 13):
        ours, twin = (flow_of(features, c, FlowSettings(), 0) for c in CONDITIONS)
        count = [sum(p.numel() for p in flow.parameters()) for flow in (ours, twin)]
        assert count[0] <= count[1] <= 1.1 * count[0]
