"""The Lyapunov function falls where it is proved to, and its monitor warns before the loss grows, not without cause."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from firmly.errors import NotCertifiable, SettingsError
from firmly.optim import AdaptationGain, Dag, LyapunovMonitor, StabilityWarning, presets
from firmly.optim.lyapunov import sector_storage

GAINS = [
    AdaptationGain(),
    presets.heavy_ball(0.9).gain,
    presets.nesterov(0.9).gain,
    presets.tustin(0.9).gain,
    presets.pid(5, 10, 0.9).gain,
    AdaptationGain((0.5, 0.2), (0.5, 0.25)),
    AdaptationGain((-0.5, 0.2), (0.8, -0.25)),
]


def gradient_with_slopes(n, least, greatest, seed):
    """x -> least x + B' clip(B x), the gradient of a convex function that is far from quadratic."""
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(2 * n, n, generator=generator, dtype=torch.float64)
    B *= ((greatest - least) / torch.linalg.eigvalsh(B.mT @ B)[-1]) ** 0.5
    return lambda x: least * x + B.mT @ (B @ x).clamp(-0.5, 1)


@pytest.mark.parametrize("gain", GAINS, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_it_falls_for_all_slopes_in_the_interval(gain, decay):
    x = nn.Parameter(torch.linspace(-3, 4, 6, dtype=torch.float64))
    optimiser = Dag([x], 0.9 * gain.sector_limit(), gain.zeros, gain.poles, weight_decay=decay, decoupled=False)
    monitor = LyapunovMonitor(optimiser, window=1)
    assert monitor.slope_limit() == pytest.approx(1.0)
    field = gradient_with_slopes(6, 1e-3, 1.0 - decay, seed=0)
    for _ in range(300):
        x.grad = field(x.detach())
        optimiser.step()
    V = np.array(monitor.history)
    assert (V > 0).all()
    assert (V[1:] <= V[:-1] * (1 + 1e-9)).all()


@pytest.mark.parametrize("gain", GAINS[:2], ids=str)
def test_decay_in_the_gradient_counts_like_the_gradient_of_its_square(gain):
    histories = []
    for by_option in (True, False):
        x = nn.Parameter(torch.linspace(-3, 4, 6, dtype=torch.float64))
        decay = {"weight_decay": 0.5, "decoupled": False} if by_option else {}
        optimiser = Dag([x], 0.5 * gain.sector_limit(), gain.zeros, gain.poles, **decay)
        monitor = LyapunovMonitor(optimiser, window=1)
        for _ in range(5):
            x.grad = x.detach().sin() + (0 if by_option else 0.5 * x.detach())
            optimiser.step()
        histories.append(monitor.history)
    assert histories[0] == pytest.approx(histories[1], rel=1e-12)


def test_it_falls_for_groups_with_different_filters_and_rates():
    x, y = (nn.Parameter(torch.linspace(-3, 4, 3, dtype=torch.float64)) for _ in range(2))
    first, second = GAINS[1], GAINS[5]
    optimiser = Dag(
        [
            {"params": [x], "lr": 0.5 * first.sector_limit(), "poles": first.poles},
            {"params": [y], "lr": 0.9 * second.sector_limit(), "zeros": second.zeros, "poles": second.poles},
        ]
    )
    monitor, field = LyapunovMonitor(optimiser, window=1), gradient_with_slopes(6, 1e-3, 1.0, seed=1)
    for _ in range(300):
        x.grad, y.grad = field(torch.cat([x.detach(), y.detach()])).split(3)
        optimiser.step()
    assert monitor.slope_limit() == pytest.approx(1.0)
    assert (np.diff(monitor.history) <= 1e-9 * np.array(monitor.history[:-1])).all()


@pytest.mark.parametrize(
    "preset",
    [presets.gradient(), presets.heavy_ball(0.9), presets.nesterov(0.9), presets.tustin(0.9),
     presets.integral_proportional(0.5)],
    ids=["gradient", "heavy ball", "Nesterov", "Tustin", "proportional"],
)  # fmt: skip
def test_it_warns_after_the_limit_is_passed_and_before_the_loss_is_back_at_its_start(preset):
    """A noisy quadratic that becomes steeper, and after 2000 steps too steep for its rate."""
    generator = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(50, generator=generator, dtype=torch.float64)  # noqa: E731
    slopes = torch.logspace(-4, 0, 50, dtype=torch.float64)
    p, warned = nn.Parameter(noise() / slopes.sqrt()), []
    optimiser = preset([p], 0.5 * preset.gain.quadratic_limit() / preset.scale)
    LyapunovMonitor(optimiser, alarm=lambda message: warned.append(t))
    losses = []
    for t in range(4000):
        steeper = 1 + t / 2000
        losses.append(0.5 * steeper * float((slopes * p.detach().square()).sum()))
        if losses[-1] > losses[0]:
            break
        p.grad = steeper * slopes * p.detach() + 1e-4 * noise()
        optimiser.step()
    assert losses[-1] > losses[0]
    assert len(warned) == 1
    assert 2000 < warned[0] < t
    assert losses[warned[0]] < losses[0]


@pytest.mark.parametrize(("preset", "lr"), [(presets.gradient(), 0.5), (presets.heavy_ball(0.9), 0.05)])
@pytest.mark.parametrize("batch", [16, 256])
def test_it_is_silent_while_a_network_learns(preset, lr, batch):
    torch.manual_seed(0)
    x = torch.randn(256, 10)
    y = (x[:, 0] * x[:, 1] > 0).long()
    net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2))
    optimiser = preset(net.parameters(), lr=lr)
    monitor = LyapunovMonitor(optimiser)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):
            rows = torch.randperm(256)[:batch]
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()
    assert len(monitor.history) == 30


def test_warnings_schedules_and_the_end():
    p = nn.Parameter(torch.ones(2))
    optimiser = Dag([p], 1.0, poles=(0.5,))
    monitor = LyapunovMonitor(optimiser, window=2)

    def step(size):
        p.grad = torch.full((2,), size)
        optimiser.step()

    for _ in range(40):
        step(1.0)
    level = monitor.history[-1]
    optimiser.param_groups[0]["lr"] = 0.01
    step(1.0), step(1.0)
    assert monitor.history[-1] == pytest.approx(level)
    with pytest.warns(StabilityWarning, match=r"over the last windows of 2 steps\. For slopes of the gradient up to"):
        [step(2.0**k) for k in range(10)]
    with pytest.warns(StabilityWarning, match="inf|nan"):
        [step(size) for size in (1.0, 1.0, float("inf"), 1.0)]
    monitor.detach()
    known = len(monitor.history)
    step(1.0), step(1.0)
    assert len(monitor.history) == known


def test_it_falls_from_wherever_it_starts_to_read():
    """Attached in the middle, and going on from a loaded state."""
    x, gain = nn.Parameter(torch.linspace(-3, 4, 6, dtype=torch.float64)), GAINS[5]
    optimiser, field = (
        Dag([x], 0.9 * gain.sector_limit(), gain.zeros, gain.poles),
        gradient_with_slopes(6, 1e-3, 1.0, 2),
    )

    def step(optimiser, x):
        x.grad = field(x.detach())
        optimiser.step()

    for _ in range(20):
        step(optimiser, x)
    monitor = LyapunovMonitor(optimiser, window=1)
    y = nn.Parameter(x.detach().clone())
    other = Dag([y], 1.0)
    resumed = LyapunovMonitor(other, window=1)
    other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for _ in range(50):
        step(optimiser, x)
        step(other, y)
    assert monitor.history == resumed.history
    assert (np.diff(monitor.history) <= 0).all()


def test_groups_may_stand_still_or_nearly():
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    rates = (0.1, 0.0, 1e-12)
    optimiser = Dag([{"params": [p], "lr": lr} for p, lr in zip(params, rates)], poles=(0.9,))
    monitor = LyapunovMonitor(optimiser, window=1)
    for _ in range(3):
        for p in params:
            p.grad = p.detach().clone()
        optimiser.step()
    assert len(monitor.history) == 3


def test_complex_parameters_and_rests_of_the_model_without_gradients():
    z, still = nn.Parameter(torch.tensor([1 + 2j])), nn.Parameter(torch.ones(3))
    optimiser = Dag([z, still], 0.1, (0.1, 0.1), (0.2, 0.1))
    monitor = LyapunovMonitor(optimiser, window=1)
    for _ in range(5):
        z.grad = z.detach().clone()
        optimiser.step()
    assert len(monitor.history) == 5


def test_refusals():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(SettingsError, match="window"):
        LyapunovMonitor(Dag([p], 0.1), window=0)
    with pytest.raises(SettingsError, match="no positive sector limit"):
        LyapunovMonitor(Dag([p], 0.1, zeros=(-1.0,)))
    gain = presets.heavy_ball(0.5).gain
    with pytest.raises(NotCertifiable, match="no storage function"):
        sector_storage(gain, 1.2 * gain.sector_limit())
