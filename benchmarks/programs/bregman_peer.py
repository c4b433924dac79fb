"""bregmanet 1.0.0 beside firmly: what its functions return, and the time of forward and backward passes.

Without the package (`peer=False`) the same rows for firmly alone.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import firmly as fm
from firmly.networks import BregmaNet
from firmly.prox.simplex import onto_simplex


def main(rounds: int, peer: bool = True) -> dict[str, list[dict[str, Any]]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return {"defects": defects(peer), "speed": [speed(*size, rounds, peer) for size in ((20, 64, 128), (20, 256, 256))]}


def value(action: Callable[[], Any]) -> str:
    """What it returns, or the error it raises."""
    try:
        found = action()
    except Exception as error:  # whatever a package raises is the finding
        return type(error).__name__
    return found if isinstance(found, str) else f"{float(found):.4g}"


def defects(peer: bool) -> list[dict[str, Any]]:
    """One row for each question: the right answer, that of firmly, that of the peer."""
    sigmoid, bent = fm.prox.legendre("sigmoid"), fm.prox.legendre("bent")
    softplus = fm.prox.legendre("softplus", beta=1000.0)
    rows = [
        ("a network with softplus", "works", lambda: works(lambda: BregmaNet(3, 2, "softplus", form="mixed"))),
        ("inverse of sigmoid at 0.5", "0", lambda: sigmoid.inverse(double(0.5))),
        ("inverse of the bent identity at 1", "0.75", lambda: bent.inverse(double(1.0))),
        (
            "inverse of softplus, beta 1000, at its value of -0.2",
            "-0.2",
            lambda: softplus.inverse(softplus(double(-0.2))),
        ),
        (
            "sum of (0.1, 0.2, 5) projected on the simplex",
            "1",
            lambda: onto_simplex(double([0.1, 0.2, 5.0]), 1.0, 0).sum(),
        ),
        ("averages of a change of width learn", "yes", averages_learn),
    ]
    theirs = peer_answers() if peer else [None] * len(rows)
    return [
        {
            "question": question,
            "right": right,
            "firmly": value(ours),
            "bregmanet": None if other is None else value(other),
        }
        for (question, right, ours), other in zip(rows, theirs)
    ]


def works(make: Callable[[], nn.Module]) -> str:
    found = make()(torch.randn(4, 3))
    return "works" if bool(found.isfinite().all()) else "not finite"


def double(values: float | list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def averages_learn() -> str:
    net = BregmaNet((3, 2), activation="tanh", form="mixed")
    return stepped(net, lambda: net.layers[0].average.raw)  # type: ignore[union-attr]


def stepped(net: nn.Module, watched: Callable[[], Tensor]) -> str:
    """Whether a step of gradient descent, after a forward pass, changes what is watched."""
    optimiser = torch.optim.SGD(net.parameters(), 1.0)
    x = torch.randn(8, 3)
    net(x)
    before = watched().detach().clone()
    net(x).square().sum().backward()
    optimiser.step()
    return "no" if torch.equal(before, watched()) else "yes"


def peer_answers() -> list[Callable[[], Any]]:
    from bregmanet import MLP
    from bregmanet.utils import activation, weight

    def averages() -> str:
        net = MLP("tanh", hidden_dim=[2], input_dim=3, output_dim=1)
        return stepped(net, lambda: net.reparametrization[0].weight)

    return [
        lambda: works(lambda: MLP("softplus", hidden_dim=[3, 3], input_dim=3, output_dim=3)),
        lambda: activation.sigmoid_conjugate(double(0.5)),
        lambda: activation.bent_identity_conjugate(double(1.0)),
        lambda: activation.softplus_conjugate(activation.softplus(double(-0.2), 1000), 1000),
        lambda: weight.projection_simplex(double([[0.1, 0.2, 5.0]])).sum(),
        averages,
    ]


# -- speed ---------------------------------------------------------------------------------------------------------


def speed(depth: int, width: int, batch: int, rounds: int, peer: bool) -> dict[str, Any]:
    """Milliseconds of processor time of a forward and backward pass, equal weights, the fastest of all rounds."""
    ours = nn.Sequential(BregmaNet(width, depth, "tanh", form="mixed"), nn.Linear(width, 10))
    x = torch.tanh(torch.randn(batch, width))
    passes = [(ours, torch.atanh(x))]
    error = None
    if peer:
        theirs = same_weights(ours, width, depth)
        passes.append((theirs, x))
        with torch.no_grad():
            error = float((ours(torch.atanh(x)) - theirs(x)).abs().max())
    best = [math.inf] * len(passes)
    for _ in range(rounds + 1):
        for k, (net, data) in enumerate(passes):
            net.zero_grad()
            started = time.process_time()
            net(data).square().mean().backward()
            best[k] = min(best[k], time.process_time() - started)
    times = [1000 * seconds for seconds in best]
    return {
        "network": f"{depth} layers of {width}, batch {batch}",
        "ms firmly": times[0],
        "ms bregmanet": times[1] if peer else None,
        "ratio": times[1] / times[0] if peer else None,
        "largest difference of outputs": error,
    }


def same_weights(ours: nn.Sequential, width: int, depth: int) -> nn.Module:
    from bregmanet import MLP

    net = MLP("tanh", hidden_dim=[width] * depth, input_dim=width, output_dim=10)
    with torch.no_grad():
        for layer, linear in zip(ours[0].layers, net.lin):  # type: ignore[arg-type]
            linear.weight.copy_(layer.linear.weight)
            linear.bias.copy_(layer.bias)
        net.output.load_state_dict(ours[1].state_dict())
    return net


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
