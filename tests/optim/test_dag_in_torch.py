"""What PyTorch asks of its own optimisers (its test_optim.py), asked of `Dag` in every order."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import shutil

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau

from firmly.optim import Dag

OPTIONS = [
    {},
    {"poles": (0.9,)},
    {"zeros": (-0.4,), "poles": (0.9,), "weight_decay": 0.1, "decoupled": False},
    {"zeros": (0.2, 0.1), "poles": (0.5, 0.2)},
    {"zeros": (0.2, 0.1), "poles": (0.5, 0.2), "weight_decay": 0.1},
    {"poles": (0.5,), "maximize": True},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


def parameters(*shapes, device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype)) for s in shapes]


def set_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)


def walk(params, optimiser, steps, first=0, step=None):
    for t in range(first, first + steps):
        set_gradients(params, t)
        (step or optimiser.step)()
    return [p.detach().clone() for p in params]


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def one_by_one(params, gradients, lr, zeros=(), poles=(), weight_decay=0.0, decoupled=True, maximize=False):
    """The loop that the grouped operations stand for."""
    (c1, c2), (d1, d2) = (*zeros, 0.0, 0.0)[:2], (*poles, 0.0, 0.0)[:2]
    memory = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    for step in gradients:
        for k, g in enumerate(step):
            g = -g if maximize else g
            if decoupled:
                params[k] = params[k] * (1 - lr * weight_decay)
            else:
                g = g + weight_decay * params[k]
            last, before = memory[k]
            filtered = g + d1 * last + d2 * before
            params[k] = params[k] - lr * (filtered + c1 * last + c2 * before)
            memory[k] = (filtered, last)
    return params


@every_option
@pytest.mark.parametrize("device", DEVICES)
def test_grouped_operations_match_a_loop_over_mixed_types(options, device):
    shapes = [(3, 4), (), (0,), (5,), (2, 1, 3)]
    types = (torch.float64, torch.float32, torch.bfloat16)
    params = [p for dtype in types for p in parameters(*shapes, device=device, dtype=dtype)]
    gradients = []
    for t in range(10):
        set_gradients(params, t)
        gradients.append([p.grad.double() for p in params])
    expected = one_by_one([p.detach().double() for p in params], gradients, 0.05, **options)
    for p, e in zip(walk(params, Dag(params, 0.05, **options), 10), expected, strict=True):
        tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.15}[p.dtype]
        torch.testing.assert_close(p.double(), e, rtol=tolerance, atol=tolerance)


@every_option
@pytest.mark.parametrize("noncontiguous", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_goes_the_right_direction(options, noncontiguous, device):
    weight, bias, x = parameters((10, 5), (10,), (5,), device=device)
    if noncontiguous:
        weight = nn.Parameter(torch.randn(5, 10, dtype=torch.float64, device=device).mT)
        assert not weight.is_contiguous()
    optimiser = Dag([weight, bias], 1e-2, **options)

    def closure():
        optimiser.zero_grad()
        loss = (weight.mv(x.detach()) + bias).square().sum()
        loss.backward()
        return loss

    start = closure().item()
    for _ in range(50):
        optimiser.step(closure)
    assert closure().item() > start if options.get("maximize") else closure().item() < start


@pytest.mark.parametrize(
    "schedules",
    [
        [lambda o: ExponentialLR(o, 0.9)],
        [lambda o: ExponentialLR(o, 0.99), lambda o: ReduceLROnPlateau(o)],
        [lambda o: LinearLR(o, 0.4, total_iters=4), lambda o: ExponentialLR(o, 0.9)],
    ],
)
@pytest.mark.parametrize("tensor", [False, True])
def test_schedules_of_groups(schedules, tensor):
    w, b = parameters((4,), (2,))
    rate = torch.tensor(1e-2) if tensor else 1e-2
    optimiser = Dag([{"params": [w]}, {"params": [b], "lr": 1e-3}], rate, poles=(0.9,))
    schedulers = [make(optimiser) for make in schedules]
    loss = lambda: w.square().sum() + b.square().sum()  # noqa: E731
    start = loss().item()
    for _ in range(30):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
        for scheduler in schedulers:
            scheduler.step(*([loss().detach()] if isinstance(scheduler, ReduceLROnPlateau) else []))
    assert loss().item() < start
    assert float(optimiser.param_groups[0]["lr"]) < 1e-2


@every_option
def test_a_rate_in_a_tensor_is_the_same_rate(options):
    a, b = parameters((4, 3), (2,)), parameters((4, 3), (2,))
    ours = walk(a, Dag(a, torch.tensor(0.05, dtype=torch.float64), **options), 10)
    torch.testing.assert_close(ours, walk(b, Dag(b, 0.05, **options), 10), rtol=1e-13, atol=1e-13)


@every_option
def test_groups_have_their_own_settings(options):
    a, b, c = parameters((3,), (4,), (2,))
    others = [nn.Parameter(p.detach().clone()) for p in (a, b, c)]
    together = Dag([{"params": [a]}, {"params": [b], "lr": 0.2, **options}], 0.1)
    together.add_param_group({"params": [c], "poles": (0.3,)})
    apart = [Dag([others[0]], 0.1), Dag([others[1]], 0.2, **options), Dag([others[2]], 0.1, poles=(0.3,))]
    ours = walk([a, b, c], together, 5)
    assert_equal(ours, walk(others, None, 5, step=lambda: [o.step() for o in apart]))


@every_option
def test_nothing_happens_without_gradients(options):
    params = parameters((3,), (4,))
    optimiser = Dag(params, 0.1, **options)
    before = [p.detach().clone() for p in params]
    optimiser.step()
    assert_equal(before, [p.detach() for p in params])
    assert not optimiser.state
    for p in params:
        p.grad = torch.zeros_like(p)
    if not options.get("weight_decay"):
        optimiser.step()
        assert_equal(before, [p.detach() for p in params])


def test_parameters_without_a_gradient_stay_while_others_move():
    a, b = parameters((3,), (3,))
    still = b.detach().clone()
    optimiser = Dag([a, b], 0.1, poles=(0.9,))
    a.grad = torch.ones_like(a)
    optimiser.step()
    assert torch.equal(b, still)
    assert list(optimiser.state) == [a]


@every_option
@pytest.mark.parametrize("through", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"])
def test_states_go_on_after_a_round_trip(options, through):
    a = parameters((4, 3), (2,))
    optimiser = Dag(a, 0.05, **options)
    walk(a, optimiser, 4)
    b = [nn.Parameter(p.detach().clone()) for p in a]
    other = Dag(b, 1.0)
    other.load_state_dict(through(optimiser.state_dict()))
    assert_equal(walk(a, optimiser, 4, first=4), walk(b, other, 4, first=4))
    assert optimiser.state_dict()["param_groups"] == other.state_dict()["param_groups"]


@every_option
def test_states_are_saved_as_weights_only(options):
    a = parameters((4, 3))
    optimiser = Dag(a, 0.05, **options)
    walk(a, optimiser, 3)
    file = io.BytesIO()
    torch.save(optimiser.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["param_groups"] == optimiser.state_dict()["param_groups"]
    assert_equal(loaded["state"], optimiser.state_dict()["state"])


@every_option
def test_a_copied_optimiser_goes_on_like_the_first(options):
    a = parameters((4,))
    optimiser = Dag(a, 0.05, **options)
    walk(a, optimiser, 3)
    copied, optimisers = copy.deepcopy((a, optimiser)), [optimiser]
    optimisers.append(copied[1])
    assert_equal(walk(a, optimisers[0], 3, first=3), walk(copied[0], optimisers[1], 3, first=3))


def test_states_take_the_type_of_the_parameters_they_are_loaded_for():
    a, b = parameters((4,)), parameters((4,), dtype=torch.float32)
    optimiser, other = Dag(a, 0.05, poles=(0.9,)), Dag(b, 0.05)
    walk(a, optimiser, 2)
    other.load_state_dict(optimiser.state_dict())
    assert other.state[b[0]]["filtered"].dtype == torch.float32
    walk(b, other, 1)


def test_hooks_and_names_and_print():
    params = parameters((4,))
    optimiser, seen = Dag([("weight", params[0])], 0.1, poles=(0.9,)), []
    optimiser.register_step_pre_hook(lambda o, *_: seen.append("before"))
    optimiser.register_step_post_hook(lambda o, *_: seen.append("after"))
    optimiser.register_state_dict_post_hook(lambda o, state: seen.append("saved"))
    walk(params, optimiser, 1)
    assert optimiser.state_dict()["param_groups"][0]["param_names"] == ["weight"]
    assert seen == ["before", "after", "saved"]
    assert "poles: (0.9, 0.0)" in repr(optimiser)


@pytest.mark.parametrize(("shape", "steps"), [((2, 3), 10), ((1,), 3)])
def test_complex_parameters_move_like_two_real_ones(shape, steps):
    for options in OPTIONS:
        real = parameters((*shape, 2))
        both = [nn.Parameter(torch.view_as_complex(real[0].detach().clone()))]
        ours, theirs = Dag(both, 0.1, **options), Dag(real, 0.1, **options)
        for t in range(steps):
            set_gradients(real, t)
            both[0].grad = torch.view_as_complex(real[0].grad.clone())
            ours.step()
            theirs.step()
        torch.testing.assert_close(torch.view_as_real(both[0].detach()), real[0].detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("params", "error"),
    [([], ValueError), (torch.ones(3), TypeError), ([torch.ones(3, requires_grad=True) * 1], ValueError)],
)
def test_parameters_that_are_none_are_refused(params, error):
    with pytest.raises(error):
        Dag(params, 0.1)


def test_a_parameter_stands_in_one_group():
    (p,) = parameters((3,))
    with pytest.raises(ValueError, match="more than one"):
        Dag([{"params": [p]}, {"params": [p]}], 0.1)


def test_overflown_gradients_of_a_scaler_are_skipped():
    (p,) = parameters((3,), dtype=torch.float32)
    optimiser, before = Dag([p], 0.1, poles=(0.9,)), p.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, moved in ((float("inf"), False), (1.0, True)):
        optimiser.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimiser)
        scaler.update()
        assert bool((p.detach() != before).all()) == moved
        assert bool(torch.isfinite(p).all())


def test_clipped_gradients_and_training_of_a_network():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1)), torch.randn(64, 4)
    y, optimiser = x[:, :1] * x[:, 1:2], Dag(net.parameters(), 0.1, zeros=(-0.4,), poles=(0.8,), weight_decay=1e-4)
    losses = []
    for _ in range(100):
        optimiser.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def compiled(options, backend, tensor):
    torch._dynamo.reset()
    a, b = parameters((5, 3), (7,)), parameters((5, 3), (7,))
    rate = lambda: torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1  # noqa: E731
    ours, theirs = Dag(a, rate(), **options), Dag(b, rate(), **options)
    step = torch.compile(ours.step, backend=backend, fullgraph=True)
    for first in (0, 3):
        torch.testing.assert_close(
            walk(a, ours, 3, first, step), walk(b, theirs, 3, first), rtol=1e-12, atol=1e-12
        )  # fmt: skip
        for optimiser in (ours, theirs):
            optimiser.param_groups[0]["lr"] = optimiser.param_groups[0]["lr"] * 0.5


@pytest.mark.parametrize(("options", "tensor"), list(itertools.product(OPTIONS[:5], [False, True])))
def test_the_step_is_traced_as_one_graph(options, tensor):
    compiled(options, "eager", tensor)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler, which torch.compile needs")
def test_the_step_compiles():
    compiled(OPTIONS[4], "inductor", True)


@every_option
def test_no_more_memory_than_its_buffers(options):
    params = parameters((4, 3), (7,))
    optimiser = Dag(params, 0.1, **options)
    walk(params, optimiser, 2)
    kept = sum(v.numel() for state in optimiser.state.values() for v in state.values())
    assert kept == optimiser.gain.order * sum(p.numel() for p in params)
