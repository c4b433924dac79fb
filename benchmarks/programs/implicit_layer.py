"""Forward and backward pass of a monotone layer, with firmly and with torchdeq, at equal residuals:
python -m benchmarks.programs.implicit_layer FEATURES BATCH REPEATS TOL; prints JSON.

The layer is z = relu(W z + U x + b) with 784 inputs, in single precision, on the same weights. torchdeq iterates the
map itself, which is no contraction, so its fixed-point iteration is averaged: z + a (T(z) - z) with a few a;
Anderson and Broyden are its own. Its backward pass runs to the same tolerance.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))  # the environment of the peers does not hold firmly

import torch
from torch import Tensor

from firmly.networks import MonotoneLayer

Pass = Callable[[], tuple[Tensor, list[Tensor]]]  # z and the gradients in all weights
LIMIT = 300  # iterations


def main(features: int, batch: int, repeats: int, tol: float, peers: bool = True) -> list[dict]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = MonotoneLayer(784, features, margin=1.0)
    layer.tol = tol
    x, direction = torch.rand(batch, 784), torch.randn(batch, features)
    weights = list(layer.parameters())

    def ours() -> tuple[Tensor, list[Tensor]]:
        z = layer(x)
        return z.detach(), list(torch.autograd.grad((z * direction).sum(), weights))

    actions: dict[str, Pass] = {"firmly": ours}
    if peers:
        actions |= torchdeq(layer, x, direction, tol)
    exact = reference(layer, x, direction)
    rows = []
    times: dict[str, list[float]] = {key: [] for key in actions}
    found, failed = {}, {}
    for turn in range(repeats + 1):
        for key, action in actions.items():
            if key in failed:
                continue
            started = time.process_time()
            try:
                found[key] = action()
            except Exception as error:  # a peer may fail in any way: that is a result
                failed[key] = f"{type(error).__name__}: {error}"[:160]
                continue
            if turn:
                times[key].append(1e3 * (time.process_time() - started))
    for key, (z, gradients) in found.items():
        with torch.no_grad():
            image = layer.prior.prox(layer.loop(z) + layer.input_map(x) + layer.bias, 1.0)
            away = float(((image - z).norm(dim=1) / image.norm(dim=1)).max())
        error = max(float((g - e).norm() / e.norm()) for g, e in zip(gradients, exact, strict=True))
        rows.append({"solver": key, "ms": statistics.median(times[key]), "residual": away, "gradient error": error})
    return rows + [{"solver": key, "failed": text} for key, text in failed.items()]


def reference(layer: MonotoneLayer, x: Tensor, direction: Tensor) -> list[Tensor]:
    """The gradients in all weights in double precision."""
    double = MonotoneLayer(784, direction.shape[1], margin=1.0).double()
    double.load_state_dict({name: t.double() for name, t in layer.state_dict().items()})
    double.tol = 1e-12
    z = double(x.double())
    return [g.float() for g in torch.autograd.grad((z * direction.double()).sum(), list(double.parameters()))]


def torchdeq(layer: MonotoneLayer, x: Tensor, direction: Tensor, tol: float) -> dict[str, Pass]:
    import torchdeq as package

    weights = list(layer.parameters())

    def solved(average: float, **settings: object) -> Pass:
        deq = package.get_deq(
            ift=True, f_tol=tol, b_tol=tol, f_max_iter=LIMIT, b_max_iter=LIMIT, f_stop_mode="rel", b_stop_mode="rel",
            **settings,
        )  # fmt: skip

        def action() -> tuple[Tensor, list[Tensor]]:
            w = layer.input_map(x) + layer.bias

            def T(z: Tensor) -> Tensor:
                return z + average * (torch.relu(layer.loop(z) + w) - z)

            states, _ = deq(T, torch.zeros_like(w))
            z = states[-1]
            return z.detach(), list(torch.autograd.grad((z * direction).sum(), weights))

        return action

    made = {f"torchdeq, iteration averaged with {a:g}": solved(a, f_solver="fixed_point_iter",
            b_solver="fixed_point_iter") for a in (0.2, 0.4, 0.6)}  # fmt: skip
    made["torchdeq, Anderson"] = solved(1.0, f_solver="anderson", b_solver="anderson")
    made["torchdeq, Broyden"] = solved(1.0, f_solver="broyden", b_solver="broyden")
    return made


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:4]), float(sys.argv[4]))))
