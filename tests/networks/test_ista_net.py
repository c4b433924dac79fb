"""ISTA-Net against its formulas and published sizes, with steps that may be held in their range."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import firmly as fm
from firmly.errors import ConditionError, SettingsError, ShapeError
from firmly.linear import BlockSampling, FourierSampling
from firmly.networks import IstaNet, IstaNetPlus


def operator(shape: tuple[int, ...] = (1, 8, 12)) -> BlockSampling:
    return BlockSampling.gaussian(6, shape, torch.Generator().manual_seed(0), block=4)


def network(kind: type[IstaNet], **options) -> IstaNet:
    torch.manual_seed(0)
    A = operator()
    return kind(A, A.T, phases=2, channels=3, **options).double()


def data() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, *operator().codomain, dtype=torch.float64, generator=generator)


def by_hand(net: IstaNet, y: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas of the paper on single blocks of images, and the symmetry term."""
    x, deviation = net.initial(y), torch.zeros((), dtype=torch.float64)
    for phase in net.phases:
        rho, theta = phase.step, phase.prior.weight
        w = [phase.forward_transform[0].weight, phase.forward_transform[2].weight]
        v = [phase.backward_transform[0].weight, phase.backward_transform[2].weight]
        r = x - rho * net.A.T(net.A(x) - y)
        s = F.conv2d(r, phase.lift.weight, padding=1) if isinstance(net, IstaNetPlus) else r
        z = F.conv2d(F.conv2d(s, w[0], padding=1).relu(), w[1], padding=1)
        pair = (F.softshrink(z, float(theta.detach())), z)
        back = [F.conv2d(F.conv2d(c, v[0], padding=1).relu(), v[1], padding=1) for c in pair]
        x = r + F.conv2d(back[0], phase.drop.weight, padding=1) if isinstance(net, IstaNetPlus) else back[0]
        deviation = deviation + (back[1] - s).square().mean()
    return x, deviation


@pytest.mark.parametrize("kind, count", [(IstaNet, 171_090), (IstaNetPlus, 336_978)])
def test_published_parameter_counts(kind: type[IstaNet], count: int) -> None:
    assert sum(p.numel() for p in kind(operator(), operator().T).parameters()) == count


@pytest.mark.parametrize("kind", [IstaNet, IstaNetPlus])
@pytest.mark.parametrize("constrained", [False, True])
def test_forward_and_symmetry_are_the_formulas(kind: type[IstaNet], constrained: bool) -> None:
    net, y = network(kind, constrained=constrained), data()
    x = net(y)
    expected, deviation = by_hand(net, y)
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net.symmetry(), deviation, rtol=1e-12, atol=1e-12)
    with pytest.raises(ConditionError, match="read once"):
        net.symmetry()
    net.eval()(y)
    with pytest.raises(ConditionError, match="training mode"):
        net.symmetry()
    assert net.phases[0].step.item() == pytest.approx(0.5) and net.phases[0].prior.weight.item() == pytest.approx(0.01)


def test_gradients_reach_everything() -> None:
    net = network(IstaNetPlus)
    (net(data()).square().mean() + 0.01 * net.symmetry()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_constrained_steps_stay_in_their_range() -> None:
    net = network(IstaNet, constrained=True)
    optimiser = torch.optim.SGD(net.parameters(), lr=30.0)
    for sign in (1, -1, 1):
        optimiser.zero_grad()
        (sign * sum(p.step + p.prior.weight for p in net.phases)).backward()
        optimiser.step()
        for phase in net.phases:
            assert 0 <= float(phase.step.detach()) <= 2 and float(phase.prior.weight.detach()) >= 0


def test_certified_by_norms_and_a_negative_threshold_is_refused() -> None:
    net = network(IstaNet).eval()
    certificate = fm.certify(net, method="product")
    assert 0 < certificate.lower <= certificate.upper < float("inf")
    with torch.no_grad():
        net.phases[1].prior.weight.fill_(-0.01)
    with pytest.raises(ConditionError, match="not negative"):
        fm.certify(net, method="product")


def test_bad_input_is_refused() -> None:
    A = operator()
    with pytest.raises(ShapeError, match="initialisation"):
        IstaNet(A, A)
    with pytest.raises(SettingsError, match="at least 1"):
        IstaNet(A, A.T, phases=0)
    sampled = FourierSampling(torch.ones(4, 4))
    with pytest.raises(ShapeError, match="real images"):
        IstaNet(sampled, sampled.T)
