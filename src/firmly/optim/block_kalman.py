"""The extended Kalman filter in blocks, as an optimiser: recursive least squares on the linearised loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from firmly.errors import ConditionError, DataError, SettingsError
from firmly.optim.gain_profiles import MatrixGain, Profile, VariableForgetting


class BlockKalman(Optimizer):
    """p -= lr F g / (1 + sum g' F g / (2 (loss - floor))), with one gain matrix F per block of `block` parameters.

    The residual r = sqrt(2 (loss - floor)) is a measurement of zero with the regressor h = g / r; each block's F takes
    in h (`MatrixGain`), with the uncertainty of the other blocks counted as noise. With lr = 1 and squared losses of
    single observations a linear model in one block is `RecursiveLeastSquares`. `start` times the identity is the first
    F and `profile` its law; its trace never exceeds the first, so that gains do not wind up.

    Memory and time are `block` numbers per parameter: for small networks. Raises `SettingsError`, `DataError` for a
    loss below `floor` and `ConditionError` for a step without a loss. Source: Puskorius and Feldkamp, IJCNN 1991
    (decoupled extended Kalman filter), with the loss as the measurement derived in the docs; the default profile is
    that of RLEKF, Hu et al., AAAI 2023.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        profile: Profile | None = None,
        start: float = 1.0,
        block: int = 1024,
        floor: float = 0.0,
    ):
        for name, value in (("lr", lr), ("start", start)):
            if not (math.isfinite(value) and value > 0):
                raise SettingsError(f"{name} is positive and finite, given {value!r}")
        if block < 1 or not math.isfinite(floor):
            raise SettingsError(f"block >= 1 and a finite floor are needed, given {block} and {floor}")
        self.profile = VariableForgetting(0.98, 0.9987) if profile is None else profile
        self.start, self.block, self.floor = start, block, floor
        super().__init__(params, {"lr": lr})

    def __getstate__(self) -> dict[str, Any]:
        # PyTorch's own leaves out every attribute of a subclass: copies of it could not step
        names = ("profile", "start", "block", "floor")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: float | Tensor | None = None) -> Any:
        """One step with the gradients in p.grad; `closure` computes them and the loss. Returns the loss."""
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if loss is None:
            raise ConditionError("a Kalman step needs step(loss=...) or a closure")
        excess = float(loss.detach() if isinstance(loss, Tensor) else loss) - self.floor
        if not (math.isfinite(excess) and excess >= 0):
            raise DataError(f"the loss is {excess + self.floor}; it is finite and at least floor, {self.floor}")
        if excess == 0:
            return loss
        residual = math.sqrt(2 * excess)
        blocks = []  # of parameter, rate, gain, regressor, direction
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or not p.numel():
                    continue
                if p.grad.is_sparse or p.is_complex():
                    raise ConditionError("a Kalman step needs dense gradients of real parameters, given "
                                         f"{p.grad.layout} and {p.dtype}")  # fmt: skip
                regressor = p.grad.flatten() / residual
                for number, h in enumerate(regressor.split(self.block)):
                    gain = self._gain(p, number, len(h))
                    blocks.append((p, group["lr"], gain, h, gain.direction(h)))
        sizes = [float(h @ direction) for *_, h, direction in blocks]
        total = sum(sizes)
        moves: dict[Tensor, list[Tensor]] = {}
        for (p, rate, gain, h, direction), size in zip(blocks, sizes, strict=True):
            moves.setdefault(p, []).append(rate * residual / (1 + total) * direction)
            gain.update(h, total - size)
        for p, parts in moves.items():  # in one piece: a parameter in channels_last has no flat view
            p.sub_(torch.cat(parts).reshape(p.shape))
        return loss

    def _gain(self, p: Tensor, number: int, size: int) -> MatrixGain:
        gains = self.state[p].setdefault("gains", {})
        if number not in gains:
            gains[number] = MatrixGain(self.start * torch.eye(size, dtype=p.dtype, device=p.device), self.profile)
        return gains[number]

    def state_dict(self) -> dict[str, Any]:
        """As that of every optimiser; gains are saved by their factors."""
        state = super().state_dict()
        packed = {i: {n: gain.state_dict() for n, gain in s["gains"].items()} for i, s in state["state"].items()}
        return {"state": {i: {"gains": gains} for i, gains in packed.items()}, "param_groups": state["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        super().load_state_dict({**state_dict, "state": {}})
        params = [p for group in self.param_groups for p in group["params"]]
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(saved, params, strict=True):
            for number, gain in state_dict["state"].get(i, {"gains": {}})["gains"].items():
                self._gain(p, number, len(gain["factor"])).load_state_dict(gain)
