"""Bounds of BregmaNets on boxes: sampled Jacobians never exceed them, in both coordinates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import firmly as fm
from firmly.errors import ConditionError, NotCertifiable
from firmly.networks import BregmaNet
from firmly.networks.bregman_lipschitz import OnBox, bounds_on_box, ranges_of
from firmly.prox import legendre
from firmly.prox.known_slope import with_slope
from firmly.prox.prior import Slope

NAMES = ["sigmoid", "tanh", "atan", "isru", "asinh", "softplus", "bent", "leaky_relu"]


def disturbed(net: nn.Module, seed: int, size: float) -> Any:
    generator = torch.Generator().manual_seed(seed)
    net = net.double()
    for p in net.parameters():
        p.data += size * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return net


def sampled(net: nn.Module, low: Tensor, high: Tensor, count: int = 60) -> float:
    shape = net.inputs["data"]  # type: ignore[index]
    corners = torch.randint(0, 2, (count // 3, *shape)).double()
    points = low + (high - low) * torch.cat([torch.rand(count, *shape, dtype=torch.float64), corners])
    x = points.requires_grad_(True)
    outputs = net(x).flatten(1)
    rows = [torch.autograd.grad(outputs[:, i].sum(), x, retain_graph=True)[0] for i in range(outputs.shape[1])]
    return float(torch.linalg.matrix_norm(torch.stack(rows, 1).flatten(2), 2).max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("features", [(4, 4, 4), (4, 3, 5)])
@pytest.mark.parametrize("seed", [0, 1])
def test_closed_forms_hold(name, features, seed):
    torch.manual_seed(seed)
    nets = {form: BregmaNet(features, activation=name, form=form).double() for form in ("primal", "dual")}
    disturbed(nets["primal"], seed, 0.4)
    nets["dual"].load_state_dict(nets["primal"].state_dict())
    pair = nets["primal"].activation
    low, high = (torch.full((), end, dtype=torch.float64) for end in (-1.5, 0.8))
    dual = bounds_on_box(nets["dual"], low, high)
    primal = bounds_on_box(nets["primal"], pair(low), pair(high))
    assert dual.primal == pytest.approx(primal.primal, rel=1e-9)
    assert sampled(nets["dual"], low, high) <= dual.dual * (1 + 1e-12)
    assert sampled(nets["primal"], pair(low), pair(high)) <= primal.primal * (1 + 1e-12)


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "atan"])
def test_single_layers_on_their_whole_domain(name):
    """Theory notes, check B5: 20 random layers each, and the bound is not far off for the best of them."""
    best = 0.0
    for seed in range(20):
        torch.manual_seed(seed)
        net = disturbed(BregmaNet(4, 1, name, form="primal"), seed, 0.1)
        bound = bounds_on_box(net)
        width = (net.activation.domain[1] - net.activation.domain[0]) / 2
        low, high = net.activation.domain[0] + 1e-6 * width, net.activation.domain[1] - 1e-6 * width
        found = sampled(net, torch.tensor(low), torch.tensor(high), count=60)
        assert found <= bound.primal
        norm = float(torch.linalg.matrix_norm(net.layers[0].linear.weight.detach(), 2))
        radius = width * net.layers[0].linear.weight.detach().abs().sum(1)
        centre = sum(net.activation.domain) / 2 * net.layers[0].linear.weight.detach().sum(1)
        push = (centre + net.layers[0].bias.detach()).abs() + radius
        formula = float(net.activation.ratio(push).max()) + net.activation.lipschitz * norm
        assert bound.primal <= formula * (1 + 1e-8)
        assert bound.primal >= formula * (1 - 1e-8) or bound.layers[0].leaving < net.activation.lipschitz
        best = max(best, found / bound.primal)
    assert best > 0.5


@pytest.mark.parametrize("name", NAMES)
def test_ranges_contain_all_values(name):
    net = disturbed(BregmaNet((3, 3, 2, 4), activation=name), 3, 0.3)
    ranges = ranges_of(net, -2.0, 1.0)
    u = torch.cat([3 * torch.rand(200, 3, dtype=torch.float64) - 2, torch.tensor([[-2.0] * 3, [1.0] * 3]).double()])
    for layer, (low, high) in zip([*net.layers, None], ranges):
        assert bool((u >= low).all() and (u <= high).all())
        u = u if layer is None else layer(u)


def test_ranges_of_convolutions_and_of_one_point():
    net = disturbed(BregmaNet((2, 3), activation="tanh", spatial=(4, 4)), 0, 0.3)
    u = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    low, high = ranges_of(net, u[0], u[0])[-1]
    assert torch.allclose(low, net(u)[0], atol=1e-6) and torch.allclose(high, net(u)[0], atol=1e-6)
    assert bool((low <= net(u)[0]).all() and (net(u)[0] <= high).all())
    bound = bounds_on_box(net, u[0] - 0.1, u[0] + 0.1)
    assert sampled(net, u[0] - 0.1, u[0] + 0.1, count=12) <= bound.dual
    invertible = BregmaNet(2, 2, "tanh", invertible=True, spatial=(3, 3)).double()
    assert sampled(invertible, torch.tensor(-1.0), torch.tensor(1.0), count=12) <= bounds_on_box(invertible, -1, 1).dual


def test_what_has_no_bound():
    net = BregmaNet(3, 2, "asinh")
    assert bounds_on_box(net).primal == math.inf > bounds_on_box(net).dual
    assert bounds_on_box(net, -2.0, 2.0).primal < math.inf
    with pytest.raises(NotCertifiable, match="bounded box"):
        bounds_on_box(BregmaNet(3, 2, "exp"))
    assert bounds_on_box(BregmaNet(3, 2, "exp"), -1.0, 1.0).dual < math.inf
    with pytest.raises(ConditionError, match="low <= high"):
        bounds_on_box(net, 1.0, -1.0)
    with pytest.raises(ConditionError, match="holds no input"):
        bounds_on_box(BregmaNet(3, 2, "tanh", form="primal"), 1.0, 2.0)
    with pytest.raises(ConditionError, match="low <= high"):
        OnBox(net, math.nan, 1.0)
    net.layers[0].activation = legendre("tanh")
    with pytest.raises(NotCertifiable, match="with the activation Asinh"):
        bounds_on_box(net, -1.0, 1.0)


def test_one_sided_activations_need_one_side():
    net = BregmaNet(3, 1, "softplus", form="primal").double()
    net.layers[0].linear.weight.data = -torch.rand(3, 3, dtype=torch.float64)
    bound = bounds_on_box(net)  # W x < 0 for every x > 0
    assert bound.layers[0].ratio == pytest.approx(1.0)
    assert sampled(net, torch.tensor(0.01), torch.tensor(5.0)) <= bound.primal


@pytest.mark.parametrize("name", ["tanh", "atan", "softplus", "bent"])
@pytest.mark.parametrize("form", ["primal", "mixed"])
def test_the_engine_on_a_box(name, form):
    net = disturbed(BregmaNet((3, 2, 3), activation=name, form=form), 1, 0.2)
    low, high = (torch.full((), end, dtype=torch.float64) for end in (-1.0, 1.0))
    if form == "primal":
        low, high = net.activation(low), net.activation(high)
    boxed = OnBox(net, low, high)
    certificate = fm.certify(boxed, budget_s=3)
    inside = low + (high - low) * torch.rand(20, 3, dtype=torch.float64)
    assert torch.allclose(boxed(inside), net(inside), rtol=1e-12)
    assert max(sampled(net, low, high), certificate.lower) <= certificate.upper


def test_the_engine_is_tighter_and_follows_the_weights():
    net = disturbed(BregmaNet(4, 4, "tanh", form="primal"), 2, 0.1)
    boxed = OnBox(net, -0.7, 0.7)
    first = fm.certify(boxed, budget_s=3).upper
    assert first < 0.5 * bounds_on_box(net, -0.7, 0.7).primal
    net.layers[0].bias.data += 3.0
    assert fm.certify(boxed, budget_s=3).upper != first
    with pytest.raises(NotCertifiable, match="no upper bound"):
        fm.certify(OnBox(net, -1.0, 1.0))


def test_known_slopes_are_recorded():
    class Net(nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            return with_slope(torch.tanh, Slope(0.0, 0.5), u + 2.0)

    certificate = fm.certify(Net(), shape=(2,))
    assert certificate.upper == pytest.approx(0.5)


def test_saturated_boxes():
    """Slopes that underflow on both sides of a quotient, and ranges around the zeros of inverses."""
    net = disturbed(BregmaNet(3, 2, "tanh"), 0, 0.1)
    bound = bounds_on_box(net, 400.0, 401.0)
    assert 1.0 <= bound.dual <= 1.0 + 1e-9
    assert math.isfinite(bound.primal)
    for name in ("sigmoid", "softplus", "bent"):
        pair = legendre(name)
        net = disturbed(BregmaNet(2, 1, name, form="primal"), 0, 0.1)
        x = pair(torch.tensor([0.0, 1e-9], dtype=torch.float64))
        (low, high), *_ = ranges_of(net, x, x)
        assert bool((low <= torch.tensor([0.0, 1e-9])).all() and (high >= torch.tensor([0.0, 1e-9])).all())
        assert float((high - low).max()) < 1e-11
    with pytest.raises(NotCertifiable):
        bounds_on_box(BregmaNet(2, 1, "exp"), 800.0, 801.0)
