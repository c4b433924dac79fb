"""Monotone layers on several grids: the equation by plain convolutions, margin, gradients, bounds, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.func import functional_call

import firmly as fm
from firmly.errors import ConditionError, SettingsError, ShapeError
from firmly.linear import Convolution, Tier, Tiers, from_phases, phases
from firmly.networks import MonotoneLayer, MultiscaleMonotoneLayer
from firmly.prox import L1

double = {"dtype": torch.float64}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **double)


def made(*args, **settings) -> MultiscaleMonotoneLayer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = MultiscaleMonotoneLayer(*args, **settings).double()
        torch.nn.init.normal_(layer.stacked.bias.values)
    return layer


CASES = {
    "two scales": made(1, (2, 3), (4, 6), 0.5),
    "three scales, 1-D": made(2, (2, 1, 3), (12,), 0.3, kernel_size=4),
    "soft threshold": made(1, (2, 2), (4, 4), 0.7, prior=L1(0.2)),
    "one scale": made(2, (3,), (3, 4), 0.5),
    "many channels": made(1, (2, 4), (4, 2), 0.5, kernel_size=5),
}


def inputs(layer: MultiscaleMonotoneLayer, batch: int = 2) -> torch.Tensor:
    channels = layer.stacked.input_map.tiers[0][0].channels
    spatial = [n * layer.tiers[0].scale for n in layer.stacked.loop.domain[1:]]
    return normal(batch, channels, *spatial, seed=1)


def strided(kernel: torch.Tensor, x: torch.Tensor, stride: int) -> torch.Tensor:
    """The circular convolution of x, of which every `stride`-th entry along each axis is kept."""
    return Convolution(kernel.detach(), x.shape[1:])(x)[(..., *[slice(None, None, stride)] * (x.dim() - 2))]


@pytest.mark.parametrize("name", CASES)
class TestScales:
    def test_solves_the_equation_of_plain_convolutions(self, name):
        """W is written out tier by tier, and A*A by the adjoint of the strided convolutions."""
        layer = CASES[name]
        x = inputs(layer)
        z = [part.detach().requires_grad_() for part in layer(x)]
        A, B = layer.stacked.loop.A, layer.stacked.loop.B
        count = len(z)
        Az = []
        for i in range(count):
            value = strided(getattr(A, f"kernel_{i}_{i}"), z[i], 1)
            if i:
                value = value + strided(getattr(A, f"kernel_{i}_{i - 1}"), z[i - 1], 2)
            Az.append(value)
        AtA = torch.autograd.grad(sum(0.5 * part.square().sum() for part in Az), z)
        channel = layer.stacked.bias.values.detach().split([t.channels for t in layer.tiers])
        U = layer.stacked.input_map.kernel_0_0
        for i in range(count):
            K = Convolution(getattr(B, f"kernel_{i}_{i}").detach(), z[i].shape[1:])
            m = float(layer.stacked.loop.margin)
            entering = (1 - m) * z[i] - AtA[i] + K(z[i]) - K.T(z[i])
            entering = entering + channel[i].reshape(-1, *[1] * (x.dim() - 2))
            if i == 0:
                entering = entering + strided(U, x, 1)
            torch.testing.assert_close(layer.stacked.prior.prox(entering, 1.0), z[i], rtol=0, atol=1e-9)

    def test_monotone_for_any_weights(self, name):
        loop = CASES[name].stacked.loop
        W = loop.matrix().detach()
        smallest = float(torch.linalg.eigvalsh(torch.eye(len(W), **double) - 0.5 * (W + W.T))[0])
        assert smallest >= float(loop.margin) - 1e-12

    def test_gradients_against_finite_differences(self, name):
        layer = CASES[name]
        names = [n for n, _ in layer.named_parameters()]
        values = [p.detach().clone().requires_grad_() for p in layer.parameters()]

        def run(x, *parameters):
            return functional_call(layer, dict(zip(names, parameters)), (x,))

        assert torch.autograd.gradcheck(run, (inputs(layer, 1).requires_grad_(), *values), fast_mode=True)

    def test_gradient_equals_that_of_many_unrolled_iterations(self, name):
        layer = CASES[name].stacked
        x = phases(inputs(CASES[name]), CASES[name].tiers[0].scale).requires_grad_()
        weights = normal(2, *layer.loop.domain, seed=3)
        (implicit,) = torch.autograd.grad((layer(x) * weights).sum(), x)
        algorithm, w = layer.algorithm(), layer.input_map(x) + layer.bias()
        state = algorithm.start(w)
        for k in range(200):
            state = algorithm.step(state, w, k)
        (unrolled,) = torch.autograd.grad((algorithm.read(state) * weights).sum(), x)
        torch.testing.assert_close(implicit, unrolled, rtol=0, atol=1e-9)

    def test_jacobians_stay_below_the_bound(self, name):
        layer = CASES[name]
        bound = layer.stacked.lipschitz_bound()
        for seed in range(2):
            x = inputs(layer, 1) + normal(*inputs(layer, 1).shape, seed=seed + 5)
            J = torch.autograd.functional.jacobian(lambda x: torch.cat([z.flatten() for z in layer(x)]), x)
            assert float(torch.linalg.matrix_norm(J.reshape(-1, x.numel()), 2)) <= bound


def test_certified_tighter_than_the_published_bound():
    layer = made(1, (1, 2), (4, 2), 0.5)
    cert = fm.certify(layer.stacked)
    fm.verify(cert, layer.stacked)
    assert cert.lower <= cert.upper < layer.stacked.lipschitz_bound()
    x = inputs(layer, 1)
    J = torch.autograd.functional.jacobian(lambda x: torch.cat([z.flatten() for z in layer(x)]), x)
    assert float(torch.linalg.matrix_norm(J.reshape(-1, x.numel()), 2)) <= cert.upper


def test_single_precision_trains():
    torch.manual_seed(0)
    layer = MultiscaleMonotoneLayer(1, (4, 6), (8, 8))
    optimiser = torch.optim.Adam(layer.parameters(), lr=3e-2)
    x, target = normal(8, 1, 8, 8).float(), normal(8, 6, 4, 4).float()
    losses = []
    for _ in range(15):
        loss = (layer(x)[1] - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert layer(x)[0].dtype == torch.float32 and losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_phases_are_subgrids(axes):
    grid, scale = (3, 2, 2)[:axes], 2
    x = normal(2, 3, *(n * scale for n in grid))
    p = phases(x, scale)
    assert torch.equal(from_phases(p, scale), x)
    for place, start in enumerate(itertools.product(range(scale), repeat=axes)):
        sub = x[(slice(None), slice(None), *(slice(s, None, scale) for s in start))]
        assert torch.equal(p[:, place :: scale**axes], sub)
    if axes == 2:
        assert torch.equal(p, torch.nn.functional.pixel_unshuffle(x, scale))


@pytest.mark.parametrize("sizes", [(3,), (4,), (1, 5), (3, 4)])
def test_tiers_are_strided_convolutions(sizes):
    """Every block, also over several scales at once, against the convolution on the fine grid."""
    axes = len(sizes)
    grid = (3, 2)[:axes]
    tiers = [Tier(2, 4), Tier(3, 2), Tier(1, 1)]
    keys = [(0, 0), (1, 0), (2, 0), (1, 1), (2, 1)]
    kernels = {(i, j): normal(tiers[i].channels, tiers[j].channels, *sizes, seed=i + 3 * j) for i, j in keys}
    T = Tiers(kernels, tiers, tiers, grid)
    x = [normal(2, t.channels, *(n * t.scale for n in grid), seed=7) for t in tiers]
    expected = [torch.zeros_like(part) for part in x]
    for (i, j), kernel in kernels.items():
        expected[i] = expected[i] + strided(kernel, x[j], tiers[j].scale // tiers[i].scale)
    found = T(torch.cat([phases(part, t.scale) for part, t in zip(x, tiers)], 1))
    stacked = torch.cat([phases(part, t.scale) for part, t in zip(expected, tiers)], 1)
    torch.testing.assert_close(found, stacked, rtol=0, atol=1e-12)


def test_layers_of_any_maps():
    one = CASES["two scales"].stacked
    same = MonotoneLayer.of(one.input_map, one.loop, one.bias)
    x = normal(1, *one.input_map.domain)
    assert torch.equal(same(x), one(x)) and same.inputs == one.inputs
    with pytest.raises(ShapeError, match="the input map leads there"):
        MonotoneLayer.of(one.loop, one.input_map, one.bias)


def test_bad_settings_are_refused():
    with pytest.raises(ShapeError, match="cannot be halved 2 times"):
        MultiscaleMonotoneLayer(1, (2, 2, 2), (8, 6))
    with pytest.raises(SettingsError, match="at least one tier"):
        MultiscaleMonotoneLayer(1, (), (8, 8))
    with pytest.raises(SettingsError, match="at least 1"):
        MultiscaleMonotoneLayer(1, (2, 0), (8, 8))
    with pytest.raises(ConditionError, match="margin"):
        MultiscaleMonotoneLayer(1, (2, 2), (8, 8), margin=0.0)
    tiers = [Tier(2, 2), Tier(3, 1)]
    with pytest.raises(ShapeError, match="from scale 1 to 2, which does not divide"):
        Tiers({(0, 1): normal(2, 3, 3)}, tiers, tiers, (4,))
    with pytest.raises(ShapeError, match=r"block \(1, 0\) takes a kernel \(3, 2, \*size\)"):
        Tiers({(1, 0): normal(2, 3, 3)}, tiers, tiers, (4,))
    with pytest.raises(ShapeError, match="of 2 x 2 tiers"):
        Tiers({(2, 0): normal(2, 3, 3)}, tiers, tiers, (4,))
    with pytest.raises(ShapeError, match="at least one block"):
        Tiers({}, tiers, tiers, (4,))
