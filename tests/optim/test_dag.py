"""`Dag` takes the steps of the methods that it generalises, and behaves as an optimiser of PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from firmly.errors import ConditionError, SettingsError
from firmly.optim import AdaptationGain, Dag, presets

generator = torch.Generator().manual_seed(0)
X = torch.randn(30, 10, generator=generator, dtype=torch.float64)
Y = torch.randn(30, generator=generator, dtype=torch.float64)
LR = 0.2 / float(torch.linalg.matrix_norm(X, 2)) ** 2
START = torch.randn(10, generator=generator, dtype=torch.float64)


def gradient(p):
    return X.mT @ (X @ p - Y)


def trajectory(make, steps=200, **options):
    p = nn.Parameter(START.clone())
    optimiser, path = make([p], **options), []
    for _ in range(steps):
        p.grad = gradient(p.detach())
        optimiser.step()
        path.append(p.detach().clone())
    return torch.stack(path)


def recursion(update, steps=200):
    p, memory, path = START.clone(), {}, []
    for _ in range(steps):
        p = update(p, gradient(p), memory)
        path.append(p)
    return torch.stack(path)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_momentum_of_torch(momentum, nesterov, decay):
    preset = presets.nesterov(momentum) if nesterov else presets.heavy_ball(momentum)
    ours = trajectory(preset, lr=LR, weight_decay=decay, decoupled=False)
    close(ours, trajectory(torch.optim.SGD, lr=LR, momentum=momentum, nesterov=nesterov, weight_decay=decay))


def test_plain_gradient_of_torch():
    close(trajectory(presets.gradient(), lr=LR), trajectory(torch.optim.SGD, lr=LR))
    close(
        trajectory(presets.gradient(), lr=LR, maximize=True, steps=5),
        trajectory(torch.optim.SGD, lr=LR, maximize=True, steps=5),
    )


def quasi_hyperbolic(p, g, m, nu=0.7, beta=0.9):
    m["w"] = beta * m.get("w", 0) + (1 - beta) * g
    return p - LR * ((1 - nu) * g + nu * m["w"])


def averaged(p, g, m):
    m["w"] = 0.9 * m.get("w", 0) + 0.1 * g
    return p - LR * m["w"]


def proportional_derivative(p, g, m, kp=0.5, kd=0.25):
    last, before = m.get("g", 0 * g), m.get("before", 0 * g)
    m["g"], m["before"] = g, last
    return p - LR * (g + kp * (g - last) + kd * (g - 2 * last + before))


def optimistic(p, g, m):
    last, m["g"] = m.get("g", 0 * g), g
    return p - LR * (2 * g - last)


def pid(p, g, m, ki=3.0, kd=2.0, mu=0.8):
    last, m["g"] = m.get("g", 0 * g), g
    m["I"] = mu * m.get("I", 0) + g
    m["D"] = mu * m.get("D", 0) + (1 - mu) * (g - last)
    return p - LR / 5 * (g + ki * m["I"] + kd * m["D"])


def tustin(p, g, m):
    last, m["g"] = m.get("g", 0 * g), g
    return p - LR * (g + 0.9 * last)


@pytest.mark.parametrize(
    ("update", "preset", "lr"),
    [
        (quasi_hyperbolic, presets.quasi_hyperbolic(0.7, 0.9), LR),
        (averaged, presets.averaged(0.9), LR),
        (proportional_derivative, presets.integral_proportional_derivative(0.5, 0.25), LR),
        (optimistic, presets.optimistic(), LR),
        (pid, presets.pid(3.0, 2.0, 0.8), LR / 5),
        (tustin, presets.tustin(0.9), LR),
    ],
    ids=["quasi-hyperbolic", "averaged", "pid-of-gradients", "optimistic", "pid", "tustin"],
)
def test_methods_as_their_papers_write_them(update, preset, lr):
    close(trajectory(preset, lr=lr), recursion(update))


def test_triple_momentum_in_its_y_sequence():
    beta, gamma = 0.6, 0.2
    x = last = START.clone()
    path = []
    for _ in range(200):
        x, last = x + beta * (x - last) - LR * gradient((1 + gamma) * x - gamma * last), x
        path.append((1 + gamma) * x - gamma * last)
    close(trajectory(presets.triple_momentum(beta, gamma), lr=LR), torch.stack(path))


def test_second_order_is_its_difference_equation():
    (c1, c2), (d1, d2) = (0.5, 0.2), (0.5, 0.25)

    def arima(p, g, m):
        w = [g + d1 * m.get(1, 0) + d2 * m.get(2, 0), m.get(1, 0), m.get(2, 0)]
        m[1], m[2] = w[0], w[1]
        return p - LR / 9 * (w[0] + c1 * w[1] + c2 * w[2])

    close(trajectory(Dag, lr=LR / 9, zeros=(c1, c2), poles=(d1, d2)), recursion(arima))


@pytest.mark.parametrize(("coefficients", "buffers"), [({}, 0), ({"poles": (0.9,)}, 1), ({"zeros": (0.1, 0.2)}, 2)])
def test_buffers_are_as_many_as_the_order(coefficients, buffers):
    p = nn.Parameter(torch.ones(3))
    optimiser = Dag([p], **coefficients)
    p.grad = torch.ones(3)
    optimiser.step()
    assert len(optimiser.state[p]) == buffers


@pytest.mark.parametrize("order", [1, 2])
def test_a_loaded_state_goes_on_as_if_nothing_had_happened(order):
    coefficients = {"zeros": (0.3, 0.1)[:order], "poles": (0.5, 0.2)[:order]}
    p = nn.Parameter(START.clone())
    optimiser = Dag([p], LR, **coefficients)
    for step in range(20):
        if step == 10:
            q = nn.Parameter(p.detach().clone())
            other = Dag([q], 1.0)
            other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
        for r, o in [(p, optimiser)] + ([(q, other)] if step >= 10 else []):
            r.grad = gradient(r.detach())
            o.step()
    assert torch.equal(p, q)


def test_groups_decay_closures_and_tensor_rates():
    p, q = (nn.Parameter(START.clone()) for _ in range(2))
    optimiser = Dag(
        [{"params": [p], "lr": 0.0}, {"params": [q], "poles": (0.5,)}], lr=torch.tensor(0.1), weight_decay=0.5
    )

    def closure():
        optimiser.zero_grad()
        loss = (p * 0).sum() + (q * 0).sum()
        loss.backward()
        return loss

    assert float(optimiser.step(closure).detach()) == 0
    assert torch.equal(p, START)
    torch.testing.assert_close(q, START * (1 - 0.1 * 0.5), rtol=1e-7, atol=0)
    with pytest.raises(ConditionError, match="2 different filters"):
        optimiser.dc_gain()


def test_schedulers_and_gradient_scaler():
    model = nn.Linear(4, 1)
    optimiser = presets.nesterov(0.9)(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 3)
    scaler = torch.amp.GradScaler("cpu")
    before = model.weight.detach().clone()
    for _ in range(3):
        optimiser.zero_grad()
        scaler.scale(model(torch.ones(2, 4)).square().mean()).backward()
        scaler.step(optimiser)
        scaler.update()
        scheduler.step()
    assert optimiser.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    assert not torch.equal(before, model.weight)


def test_complex_parameters_move_like_their_two_parts():
    z = nn.Parameter(torch.tensor([1 + 2j], dtype=torch.complex128))
    parts = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    a, b = Dag([z], 0.1, (0.2,), (0.5,)), Dag([parts], 0.1, (0.2,), (0.5,))
    for _ in range(5):
        z.grad, parts.grad = 2 * z.detach(), 2 * parts.detach()
        a.step()
        b.step()
    torch.testing.assert_close(torch.view_as_real(z.detach())[0], parts.detach())


@pytest.mark.parametrize("asked", ["spr", "pr"])
def test_ensured_coefficients_have_the_property(asked):
    p = nn.Parameter(torch.ones(2))
    optimiser = Dag([p], 0.1, zeros=(0.9, 0.3), poles=(0.9, 0.05), ensure=asked)
    assert getattr(optimiser, asked)()
    assert optimiser.gain != AdaptationGain((0.9, 0.3), (0.9, 0.05))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is finite and not negative"),
        ({"lr": float("nan")}, "lr is finite"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"poles": (1.0,)}, "poles satisfy"),
        ({"poles": (0.1, 0.2, 0.3)}, "at most two finite coefficients"),
        ({"zeros": (float("inf"),)}, "at most two finite coefficients"),
        ({"ensure": "stable"}, "'spr' or 'pr'"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(SettingsError, match=message):
        Dag([nn.Parameter(torch.ones(2))], **options)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConditionError, match="sparse gradients"):
        Dag(table.parameters(), 0.1).step()
