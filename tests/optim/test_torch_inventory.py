"""What PyTorch's test_optim.py asks of its own optimisers, asked of every optimiser of `firmly.optim`.

`test_dag_in_torch.py` asks more of `Dag`, in every order. The table in docs/optimisers.md says what each one takes.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LinearLR, ReduceLROnPlateau

import firmly.optim
from firmly.errors import ConditionError, FirmlyError, SettingsError
from firmly.optim import AdaptationGain, APosteriori, ArmijoSearch, BlockKalman, Dag, LayerRls, PolyakStep


class Case(NamedTuple):
    """An optimiser of a network. `takes`: what of the inventory it is made for, beside what all are."""

    name: str
    make: Callable[..., Optimizer]
    takes: frozenset[str]


def case(name: str, make: Callable[..., Optimizer], *takes: str) -> Case:
    return Case(name, make, frozenset(takes))


def of_parameters(kind: Callable[..., Any], **settings: Any) -> Callable[..., Optimizer]:
    return lambda net, **more: kind(net.parameters(), **(settings | more))


ALL = (
    "plain step", "params", "group rates", "tensor rate", "maximize", "fullgraph", "reached by schedules"
)  # fmt: skip
FILTER = AdaptationGain((0.3,), (0.2,))
CASES = [
    case("Dag", of_parameters(Dag, lr=0.05, poles=(0.9,)), *ALL),
    case("Dag, second order", of_parameters(Dag, lr=0.05, zeros=(0.2, 0.1), poles=(0.5, 0.2), weight_decay=0.01), *ALL),
    case("APosteriori", of_parameters(APosteriori, lr=0.5, gain=FILTER),
         "loss", "params", "group rates", "reached by schedules"),
    case("APosteriori, diagonal", of_parameters(APosteriori, lr=0.1, gain=FILTER, memory=20.0),
         "loss", "params", "group rates", "reached by schedules"),
    case("PolyakStep", of_parameters(PolyakStep, lr=0.1, batches=20), "loss", "params"),
    case("ArmijoSearch", of_parameters(ArmijoSearch, batches=20), "own gradients", "params"),
    case("LayerRls", lambda net, **more: LayerRls(net, **({"lr": 0.5} | more)), "plain step", "reached by schedules"),
    case("BlockKalman", of_parameters(BlockKalman, block=16, lr=0.7),
         "loss", "params", "group rates", "reached by schedules"),
]  # fmt: skip
every = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def those(what: str, without: bool = False):
    chosen = [c for c in CASES if (what in c.takes) != without]
    return pytest.mark.parametrize("case", chosen, ids=lambda c: c.name)


GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.sin(X @ torch.randn(4, 2, generator=GENERATOR, dtype=torch.float64))


def network(dtype: torch.dtype = torch.float64, device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(device, dtype)


def walk(net: nn.Module, optimizer: Optimizer, steps: int, step: Callable[..., Any] | None = None) -> list[float]:
    """Losses before each of the steps."""
    p = next(net.parameters())
    x, y = X.to(p), Y.to(p)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        if not isinstance(optimizer, ArmijoSearch):
            loss.backward()
        return loss

    for _ in range(steps):
        losses.append(float((step or optimizer.step)(closure).detach()))
    return losses


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def same(first: nn.Module, second: nn.Module) -> None:
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=0)


def test_every_optimiser_is_here():
    found = {v for v in vars(firmly.optim).values() if isinstance(v, type) and issubclass(v, Optimizer)}
    assert found == {type(c.make(network())) for c in CASES}


# -- steps ----------------------------------------------------------------------------------------------------------


@every
def test_goes_down(case):
    net = network()
    losses = walk(net, case.make(net), 30)
    assert losses[-1] < 0.5 * losses[0]


@every
def test_goes_down_with_weights_that_are_not_contiguous(case):
    net = network()
    for layer in (net[0], net[2]):
        layer.weight = nn.Parameter(layer.weight.detach().mT.contiguous().mT)
        assert not layer.weight.is_contiguous()
    other = network()
    first, second = walk(net, case.make(net), 5), walk(other, case.make(other), 5)
    assert first == pytest.approx(second, rel=1e-10)


@every
def test_is_the_same_every_time(case):
    nets = network(), network()
    for net in nets:
        walk(net, case.make(net), 5)
    same(*nets)


@every
def test_single_precision(case):
    net = network(torch.float32)
    losses = walk(net, case.make(net), 20)
    assert losses[-1] < losses[0] and all(p.dtype == torch.float32 for p in net.parameters())


@every
def test_half_precision_or_refused(case):
    """Where there is a factorisation, PyTorch has none of bfloat16, and says so."""
    net = network(torch.bfloat16)
    if case.name in ("LayerRls", "BlockKalman"):
        with pytest.raises(RuntimeError, match="BFloat16"):
            walk(net, case.make(net), 1)
    else:
        losses = walk(net, case.make(net), 20)
        assert losses[-1] < losses[0] and all(p.dtype == torch.bfloat16 for p in net.parameters())


@every
def test_without_gradients_nothing_moves(case):
    net = network()
    optimizer, before = case.make(net), weights(net)
    for p in net.parameters():
        p.requires_grad_("own gradients" in case.takes)
    if "own gradients" in case.takes:
        constant = torch.ones((), dtype=torch.float64, requires_grad=True)
        optimizer.step(lambda: constant * 1.0)  # type: ignore[arg-type]
    else:
        optimizer.step(*([lambda: torch.tensor(1.0)] if "loss" in case.takes else []))  # type: ignore[arg-type]
    torch.testing.assert_close(weights(net), before, rtol=0, atol=0)


@every
def test_parameters_without_a_gradient_stay_while_others_move(case):
    net = network()
    net[0].bias.requires_grad_(False)
    before = weights(net)
    walk(net, case.make(net), 2)
    moved = [not torch.equal(a, b) for a, b in zip(before, weights(net), strict=True)]
    assert moved == [True, False, True, True]


@those("params")
def test_parameters_of_size_zero(case):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.full, self.empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0, 3))

    net = Two()
    optimizer = case.make(net)

    def closure():
        optimizer.zero_grad()
        loss = net.full.square().sum() + net.empty.sum()
        if "own gradients" not in case.takes:
            loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())  # type: ignore[union-attr]
    assert float(optimizer.step(closure).detach()) < first  # type: ignore[union-attr]


@those("plain step", without=True)
def test_a_step_that_needs_the_loss_says_so(case):
    net = network()
    optimizer = case.make(net)
    (net(X) - Y).square().mean().backward()
    with pytest.raises(ConditionError, match="closure"):
        optimizer.step()


@those("loss")
def test_the_loss_may_be_given(case):
    nets = network(), network()
    walk(nets[0], case.make(nets[0]), 3)
    optimizer = case.make(nets[1])
    for _ in range(3):
        optimizer.zero_grad()
        loss = (nets[1](X) - Y).square().mean()
        loss.backward()
        assert optimizer.step(loss=loss.detach()) is not None  # type: ignore[call-arg]
    same(*nets)


# -- groups and rates ---------------------------------------------------------------------------------------------


@those("params")
def test_parameters_as_pytorch_takes_them(case):
    kind, nets = type(case.make(network())), [network() for _ in range(4)]
    made = [
        kind(list(nets[0].parameters())),
        kind(nets[1].named_parameters()),
        kind([{"params": nets[2].parameters()}]),
        kind([{"params": [p]} for p in nets[3].parameters()]),
    ]
    for net, optimizer in zip(nets, made, strict=True):
        walk(net, optimizer, 3)
        torch.testing.assert_close(weights(net), weights(nets[0]), rtol=1e-12, atol=1e-12)
    assert made[1].param_groups[0]["param_names"][0] == "0.weight"
    bad: list[tuple[Any, type[Exception]]] = [
        ([], ValueError), (torch.ones(3), TypeError), ([torch.ones(3, requires_grad=True) * 1], ValueError),
        ([{"params": [p]} for p in [nn.Parameter(torch.ones(1))] * 2], ValueError),
    ]  # fmt: skip
    for params, error in bad:
        with pytest.raises(error):
            kind(params)


@those("group rates")
def test_groups_have_their_own_rates(case):
    net, still = network(), network()
    optimizer = case.make(net)
    kind = type(optimizer)
    settings = {"gain": FILTER} if kind is APosteriori else {}
    halves = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 1e-9}]
    walk(net, kind(halves, lr=0.1, **settings), 3)
    first, last = (
        max(float((a - b).abs().max()) for a, b in zip(weights(net[k]), weights(still[k]), strict=True)) for k in (0, 2)
    )
    assert first > 1e-3 and 0 < last < 1e-6


@those("group rates")
def test_groups_may_be_added(case):
    net, other = network(), network()
    kind = type(case.make(net))
    optimizer = kind(net[0].parameters(), lr=0.1)
    optimizer.add_param_group({"params": list(net[2].parameters())})
    walk(net, optimizer, 3)
    walk(other, kind([{"params": other[0].parameters()}, {"params": other[2].parameters()}], lr=0.1), 3)
    same(net, other)
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": [net[0].weight]})


@every
@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_rates_out_of_range(case, rate):
    with pytest.raises(SettingsError):
        case.make(network(), lr=rate)


@those("tensor rate")
def test_a_rate_in_a_tensor(case):
    nets = network(), network()
    walk(nets[0], case.make(nets[0]), 4)
    walk(nets[1], case.make(nets[1], lr=torch.tensor(0.05, dtype=torch.float64)), 4)
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]), rtol=1e-12, atol=1e-12)


@those("tensor rate", without=True)
def test_a_rate_in_a_tensor_is_a_number(case):
    """The others read it as a number, or refuse it: it never is left out."""
    nets = network(), network()
    optimizer = case.make(nets[0], lr=0.25)
    walk(nets[0], optimizer, 3)
    try:
        other = case.make(nets[1], lr=torch.tensor(0.25, dtype=torch.float64))
    except (FirmlyError, TypeError):
        return
    walk(nets[1], other, 3)
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]), rtol=1e-12, atol=1e-12)


@those("reached by schedules")
@pytest.mark.parametrize(
    "schedule",
    [lambda o: ExponentialLR(o, 0.5), lambda o: LinearLR(o, 0.4, total_iters=4), lambda o: CosineAnnealingLR(o, 10),
     lambda o: ReduceLROnPlateau(o, patience=0, threshold=10.0)],
)  # fmt: skip
def test_schedules_set_the_rate_of_the_next_step(case, schedule):
    """A step at the rate that the schedule has set is the step of an optimiser that is given this rate."""
    net = network()
    optimizer = case.make(net)
    scheduler = schedule(optimizer)
    walk(net, optimizer, 2)
    for _ in range(3):
        scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
    rate = optimizer.param_groups[0]["lr"]
    assert rate != pytest.approx(case.make(network()).param_groups[0]["lr"])
    twin, other = copy.deepcopy((net, optimizer))
    other.param_groups[0]["lr"] = float(rate)
    walk(net, optimizer, 1)
    walk(twin, other, 1)
    same(net, twin)
    still, stopped = network(), None
    stopped = case.make(still)
    stopped.param_groups[0]["lr"] = 1e-12
    before = weights(still)
    walk(still, stopped, 1)
    torch.testing.assert_close(weights(still), before, rtol=1e-9, atol=1e-9)


@those("reached by schedules", without=True)
def test_the_others_set_their_rate_themselves(case):
    """What a schedule writes is the rate of the step before, which the search goes on from; the group has the rate."""
    net = network()
    optimizer = case.make(net)
    walk(net, optimizer, 1)
    found = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 1e-9
    before = weights(net)
    walk(net, optimizer, 1)
    assert optimizer.param_groups[0]["lr"] < 2e-9 < found
    torch.testing.assert_close(weights(net), before, rtol=1e-6, atol=1e-6)


@every
@pytest.mark.parametrize("option", ["maximize", "foreach", "fused", "capturable", "differentiable"])
def test_options_that_are_not_offered_are_refused(case, option):
    if option in case.takes:
        case.make(network(), maximize=True)
    else:
        with pytest.raises(TypeError, match=option):
            case.make(network(), **{option: True})


# -- states ---------------------------------------------------------------------------------------------------------


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every
@pytest.mark.parametrize("through", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), through_file])
def test_states_go_on_after_a_round_trip(case, through):
    net = network()
    optimizer = case.make(net)
    walk(net, optimizer, 3)
    state, other = through(optimizer.state_dict()), network()
    other.load_state_dict(net.state_dict())
    again = case.make(other)
    again.load_state_dict(state)
    assert walk(net, optimizer, 3) == walk(other, again, 3)
    same(net, other)
    assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@every
@pytest.mark.parametrize("through", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_of_network_and_optimiser_go_on_alike(case, through):
    net = network()
    optimizer = case.make(net)
    walk(net, optimizer, 3)
    other, again = through((net, optimizer))
    assert walk(net, optimizer, 3) == walk(other, again, 3)
    same(net, other)


@every
def test_states_of_another_number_of_parameters_are_refused(case):
    net = network()
    optimizer = case.make(net)
    walk(net, optimizer, 1)
    larger = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 2)).double()
    with pytest.raises(ValueError):
        case.make(larger).load_state_dict(optimizer.state_dict())


@every
def test_hooks_and_print(case):
    net = network()
    optimizer, seen = case.make(net), []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda o, *_: seen.append("after"))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, state: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    walk(net, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "saving", "saved", "loading", "loaded"]
    assert type(optimizer).__name__ in repr(optimizer) and "lr" in repr(optimizer)


# -- kinds of gradients -----------------------------------------------------------------------------------------------


def complex_step(case, z: nn.Parameter, optimizer: Optimizer, target: torch.Tensor) -> float:
    def closure():
        optimizer.zero_grad()
        loss = torch.view_as_real(z - target).square().sum() if z.is_complex() else (z - target).square().sum()
        if "own gradients" not in case.takes:
            loss.backward()
        return loss

    return float(optimizer.step(closure).detach())  # type: ignore[union-attr]


@those("params")
def test_complex_parameters_are_two_real_ones_or_refused(case):
    kind = type(case.make(network()))
    real = nn.Parameter(torch.tensor([[1.0, 2.0], [-0.5, 0.3]], dtype=torch.float64))
    z = nn.Parameter(torch.view_as_complex(real.detach().clone()))
    target = torch.zeros_like(real)
    ours, theirs = kind([z], lr=0.1), kind([real], lr=0.1)
    try:
        for _ in range(5):
            complex_step(case, z, ours, torch.view_as_complex(target))
            complex_step(case, real, theirs, target)
    except ConditionError:
        assert case.name == "BlockKalman"
        return
    torch.testing.assert_close(torch.view_as_real(z.detach()), real.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_complex_layers_are_refused():
    with pytest.raises(ConditionError, match="complex"):
        LayerRls(nn.Linear(3, 2).to(torch.complex128))


def test_a_diagonal_gain_is_real():
    z = nn.Parameter(torch.ones(2, dtype=torch.complex128))
    z.grad = torch.ones_like(z)
    with pytest.raises(ConditionError, match="real"):
        APosteriori([z], memory=10.0).step(loss=1.0)


def test_sparse_gradients_beside_layers_are_plain_steps():
    ends = []
    for sparse in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(6, 3, sparse=sparse), nn.Linear(3, 2)).double()
        optimizer = LayerRls(net)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.tensor([1, 3, 1])).square().mean().backward()
            optimizer.step()
        ends.append(weights(net))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


@those("params")
def test_sparse_gradients_are_refused(case):
    net = nn.Embedding(5, 3, sparse=True)
    optimizer = case.make(net)

    def closure():
        optimizer.zero_grad()
        loss = net(torch.tensor([1, 3])).square().sum()
        if "own gradients" not in case.takes:
            loss.backward()
        return loss

    with pytest.raises(ConditionError, match=r"sparse|dense"):
        optimizer.step(closure)


@those("own gradients", without=True)
def test_a_scaler_skips_gradients_that_overflow(case):
    net = network(torch.float32)
    optimizer, scaler = case.make(net), torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, moves in ((float("inf"), False), (1.0, True)):
        before = weights(net)
        optimizer.zero_grad()
        loss = (net(X.float()) - Y.float()).square().mean()
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer, **({"loss": loss.detach()} if "loss" in case.takes else {}))
        scaler.update()
        assert all(torch.equal(a, b) != moves for a, b in zip(before, weights(net), strict=True))
        assert all(bool(p.isfinite().all()) for p in net.parameters())


@those("own gradients")
def test_a_search_refuses_a_scaler(case):
    """Scaled gradients are not those that it takes."""
    net = network(torch.float32)
    optimizer, scaler = case.make(net), torch.amp.GradScaler("cpu")
    scaler.scale((net(X.float()) - Y.float()).square().mean()).backward()
    with pytest.raises(ConditionError, match="closure"):
        scaler.step(optimizer)


@those("own gradients", without=True)
def test_clipped_gradients(case):
    net = network()
    optimizer = case.make(net)

    def closure():
        optimizer.zero_grad()
        loss = (net(X) - Y).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(40)]  # type: ignore[union-attr]
    assert losses[-1] < losses[0]


@those("own gradients", without=True)
def test_compiled_steps_are_the_same(case):
    """Where a step reads numbers out of tensors, the graph breaks there; where not, it is one graph."""
    torch._dynamo.reset()
    nets = network(), network()
    optimizer = case.make(nets[1])
    step = torch.compile(optimizer.step, backend="eager", fullgraph="fullgraph" in case.takes)
    walk(nets[0], case.make(nets[0]), 2)
    for _ in range(2):
        optimizer.zero_grad()
        loss = (nets[1](X) - Y).square().mean()
        loss.backward()
        step(**({"loss": loss.detach()} if "loss" in case.takes else {}))
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]), rtol=1e-10, atol=1e-10)


@every
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_states_follow_the_parameters_to_another_device(case):
    net, moved = network(), network(device="cuda")
    optimizer, other = case.make(net), case.make(moved)
    walk(net, optimizer, 3)
    moved.load_state_dict(net.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert walk(net, optimizer, 3) == pytest.approx(walk(moved, other, 3), rel=1e-6)


@those("params")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_parameters_on_two_devices(case):
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6).double(), nn.Linear(6, 2).double().cuda()

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)).cuda()).cpu()

    net = Split()
    losses = walk(net, case.make(net), 20)
    assert losses[-1] < losses[0]
