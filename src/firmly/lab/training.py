"""The training loop: seeded, checkpointed after every epoch, resumable to the last bit.

A checkpoint holds everything the next epoch depends on (weights, averaged and best weights, the optimiser's moments,
the states of the random generators, the history), in one safetensors file that is replaced atomically. The learning
rate is a function of the step alone, so there is no scheduler to save.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from firmly.errors import DataError
from firmly.lab.engine import Engine, Precision
from firmly.lab.run_folder import RunFolder
from firmly.lab.settings import require
from firmly.lab.weights import learned, pack, restore, unpack

Loss = Callable[[Any, Tensor], Tensor]  # (output of the network, truth) -> a number
Sampler = Callable[[torch.Generator], tuple[Tensor, Tensor]]  # -> (measurements, truth), both (batch, ...)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to train: AdamW with a linear rise and a cosine fall of the learning rate, `epochs` times `steps` batches.

    Parameters with at most one axis (step sizes, penalties, thresholds) learn `scalar_rate` times faster than filters.
    `averaging` in [0, 1) is the decay of an exponential average of the weights, which is what is validated and kept
    (0: the weights themselves). `patience` is the number of epochs without improvement after which training stops
    (0: never).
    """

    epochs: int = 10
    steps: int = 100
    learning_rate: float = 1e-3
    scalar_rate: float = 1.0
    weight_decay: float = 0.0
    averaging: float = 0.0
    patience: int = 0
    clip: float = 1.0
    precision: Precision = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.epochs >= 1 and self.steps >= 1, f"epochs, steps >= 1; given {self.epochs}, {self.steps}")
        for name in ("learning_rate", "scalar_rate", "clip"):
            require(getattr(self, name) > 0, f"{name} is positive; given {getattr(self, name)}")
        require(0 <= self.averaging < 1, f"averaging lies in [0, 1); given {self.averaging}")


class Outcome(NamedTuple):
    """How training ended; `history` has one row per epoch, `seconds` is the time over all sessions."""

    status: Literal["finished", "stopped early", "interrupted"]
    history: list[dict[str, Any]]
    seconds: float


def train(
    network: nn.Module,
    sample: Sampler,
    plan: Plan,
    run: RunFolder,
    name: str,
    *,
    loss: Loss | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    penalty: Callable[[nn.Module, int], Tensor] | None = None,
    engine: Engine | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Outcome:
    """Train `network` in place on `loss` plus `penalty(network, step)`; then it holds its best weights.

    The loss is the mean squared error unless another one is given.

    If `run` has a checkpoint called `name`, training goes on from there, with the same result as if it had never
    stopped. `validate(network)` returns a score to maximise; without it, or with a penalty that the score does not
    know of, the last weights are the best. The callback gets a dictionary after every step. Ctrl-C ends training with
    status "interrupted" and the last whole epoch on the disk. A loss or gradient that is not finite raises `DataError`
    after the batch was saved beside the checkpoints.
    """
    engine = engine or Engine()
    state = _State(network, plan, engine, loss or mean_squared_error)
    path = run / f"checkpoints/{name}.safetensors"
    if path.exists():
        state.load(path)
    try:
        while state.epoch < plan.epochs and not state.exhausted():
            began = time.monotonic()
            losses = [
                state.step(sample, penalty, lambda batch: _keep(batch, run, name), callback) for _ in range(plan.steps)
            ]
            state.close_epoch(sum(losses) / len(losses), validate, penalty is not None, time.monotonic() - began)
            checkpoint = state.save()  # on every process: it gathers their generators
            if engine.primary:
                run.write(f"checkpoints/{name}.safetensors", checkpoint)
                run.log("epoch", network=name, **state.history[-1])
            engine.barrier()
    except KeyboardInterrupt:
        return Outcome("interrupted", state.history, state.seconds())
    restore(network, state.best, str(path))
    status = "finished" if state.epoch >= plan.epochs else "stopped early"
    return Outcome(status, state.history, state.seconds())


def mean_squared_error(output: Tensor, truth: Tensor) -> Tensor:
    return (output - truth).abs().square().mean()


def rise_and_fall(progress: float) -> float:
    """Relative learning rate at `progress` in (0, 1]: a linear rise for a tenth, then a cosine down to 0.003."""
    if progress < 0.1:
        return progress / 0.1
    return max(0.003, 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9)))


class _State:
    """Everything that the rest of a training depends on."""

    def __init__(self, network: nn.Module, plan: Plan, engine: Engine, loss: Loss):
        self.plan, self.engine, self.loss = plan, engine, loss
        self.network = network.to(engine.device)
        filters = [p for p in network.parameters() if p.dim() > 1]
        scalars = [p for p in network.parameters() if p.dim() <= 1]
        self.groups = [(filters, plan.learning_rate), (scalars, plan.learning_rate * plan.scalar_rate)]
        self.groups = [(parameters, rate) for parameters, rate in self.groups if parameters]
        self.optimiser = torch.optim.AdamW(
            [{"params": parameters} for parameters, _ in self.groups],
            betas=(0.9, 0.99),  # a short memory of squares: training is short
            weight_decay=plan.weight_decay,
        )
        self.forward = engine.setup(network, self.optimiser)
        self.generator = torch.Generator().manual_seed(plan.seed * 1000 + engine.rank)
        self.average = {k: v.clone() for k, v in learned(network).items()}
        self.best = self.average
        self.epoch = 0
        self.history: list[dict[str, Any]] = []

    def step(
        self,
        sample: Sampler,
        penalty: Callable[[nn.Module, int], Tensor] | None,
        keep: Callable[[dict[str, Tensor]], Path],
        callback: Callable[[dict[str, Any]], None] | None,
    ) -> float:
        position = self.optimiser_steps()
        relative = rise_and_fall((position + 1) / (self.plan.epochs * self.plan.steps))
        for group, (_, rate) in zip(self.optimiser.param_groups, self.groups):
            group["lr"] = rate * relative
        y, x = (t.to(self.engine.device) for t in sample(self.generator))
        with self.engine.autocast():
            error = self.loss(self.forward(y), x)
        loss = error if penalty is None else error + penalty(self.network, position).to(error.device)
        self.optimiser.zero_grad(set_to_none=True)
        self.engine.backward(loss)
        size = nn.utils.clip_grad_norm_(self.network.parameters(), self.plan.clip)
        if not (loss.isfinite() and size.isfinite()):
            saved = keep({"measurements": y, "truth": x})
            raise DataError(
                f"training stopped at step {position}: the loss is {loss.item():.4g} and the norm of its gradient "
                f"{size.item():.4g}; the batch is in {saved}, the last whole epoch in the checkpoint. "
                "Check the data, or lower learning_rate"
            )
        self.optimiser.step()
        decay = min(self.plan.averaging, position / (position + 10))  # short memory at the start
        for key, value in learned(self.network).items():
            self.average[key] = torch.lerp(value, self.average[key], decay)
        if callback is not None:
            callback({"epoch": self.epoch, "step": position + 1, "loss": error.item()})
        return error.item()

    def optimiser_steps(self) -> int:
        first = next(iter(self.optimiser.state.values()), None)
        return 0 if first is None else int(first["step"])

    def close_epoch(
        self, loss: float, validate: Callable[[nn.Module], float] | None, keep_last: bool, seconds: float
    ) -> None:
        row = {"epoch": self.epoch, "loss": self.engine.mean(loss), "seconds": round(seconds, 2)}
        if validate is not None:
            with _swapped(self.network, self.average):
                row["score"] = float(validate(self.network))
        if keep_last or validate is None or row["score"] >= max((r["score"] for r in self.history), default=-math.inf):
            self.best = dict(self.average)
        self.history.append(row)
        self.epoch += 1

    def exhausted(self) -> bool:
        """No better score in the last `patience` epochs."""
        if not self.plan.patience or not self.history or "score" not in self.history[0]:
            return False
        scores = [r["score"] for r in self.history]
        return len(scores) - 1 - scores.index(max(scores)) >= self.plan.patience

    def seconds(self) -> float:
        return sum(r["seconds"] for r in self.history)

    # -- on the disk -------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        tensors = {f"network.{k}": v for k, v in learned(self.network).items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        for index, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{k}": v for k, v in moments.items()}
        tensors["generators"] = self.engine.gather(self.generator.get_state())
        plan = dataclasses.asdict(self.plan)
        return pack(tensors, {"kind": "checkpoint", "plan": plan, "epoch": self.epoch, "history": self.history})

    def load(self, path: Path) -> None:
        tensors, header = unpack(path)
        if header.get("kind") != "checkpoint" or header["plan"] != dataclasses.asdict(self.plan):
            raise DataError(f"{path} is not a checkpoint of this plan: train in another folder, or with its own plan")
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "average": {}, "best": {}, "optimiser": {}}
        generators = tensors.pop("generators")
        for key, tensor in tensors.items():
            part, _, rest = key.partition(".")
            parts[part][rest] = tensor
        if len(generators) != self.engine.world:
            raise DataError(f"{path} is of {len(generators)} processes; resume with as many (now {self.engine.world})")
        for part in ("best", "average", "network"):  # the last one stays in the network
            restore(self.network, parts[part], str(path))
        device = self.engine.device
        self.average = {k: v.to(device) for k, v in parts["average"].items()}
        self.best = {k: v.to(device) for k, v in parts["best"].items()}
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in parts["optimiser"].items():
            index, _, what = key.partition(".")
            moments.setdefault(int(index), {})[what] = tensor
        self.optimiser.load_state_dict({"state": moments, "param_groups": self.optimiser.state_dict()["param_groups"]})
        self.generator.set_state(generators[self.engine.rank])
        self.epoch, self.history = header["epoch"], header["history"]


class _swapped:
    """Other weights for the time of a `with` block."""

    def __init__(self, network: nn.Module, weights: dict[str, Tensor]):
        self.network, self.weights = network, weights

    def __enter__(self) -> None:
        self.own = {k: v.clone() for k, v in learned(self.network).items()}
        restore(self.network, self.weights, "the averaged weights")

    def __exit__(self, *exception: object) -> None:
        restore(self.network, self.own, "the weights in training")


def _keep(batch: dict[str, Tensor], run: RunFolder, name: str) -> Path:
    return run.write(f"checkpoints/{name}-batch-not-finite.safetensors", pack(batch, {"kind": "batch"}))
