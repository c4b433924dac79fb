"""The stochastic Polyak step, for comparison with rates set by feedback."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from firmly.errors import ConditionError, DataError, SettingsError
from firmly.optim.a_posteriori import squared_norm
from firmly.optim.loss_value import loss_value


class PolyakStep(Optimizer):
    """p -= eta g, eta = min((loss - floor) / (c |g|^2), growth^(1 / batches) eta of the step before), from `lr`.

    `floor` is the least value of the loss of a batch, zero for models that can fit every one; `batches` of an epoch.
    All groups share one rate, the "lr" of each, at first that of the first. Raises `SettingsError`, `DataError` for a
    loss below `floor` or not finite.
    Source: N. Loizou, S. Vaswani, I. Laradji, S. Lacoste-Julien, Stochastic Polyak step-size for SGD, AISTATS 2021
    (SPS_max with smoothing; c = 1/2, growth 2).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        c: float = 0.5,
        growth: float = 2.0,
        batches: int = 1,
        floor: float = 0.0,
    ):
        if not (0 < lr < math.inf and 0 < c < math.inf and 1 <= growth < math.inf and batches >= 1):
            raise SettingsError(f"lr > 0, c > 0, growth >= 1, batches >= 1, given {lr}, {c}, {growth}, {batches}")
        self.c, self.growth, self.floor = c, growth ** (1 / batches), floor
        super().__init__(params, {"lr": lr})

    def __getstate__(self) -> dict[str, Any]:
        # PyTorch's own leaves out every attribute of a subclass: copies of it could not step
        names = ("c", "growth", "floor")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: float | Tensor | None = None) -> Any:
        """One step with the gradients in p.grad; `closure` computes them and the loss. Returns the loss."""
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if loss is None:
            raise ConditionError("a Polyak step needs step(loss=...) or a closure")
        excess = loss_value(loss) - self.floor
        if excess < 0:
            raise DataError(f"the loss {excess + self.floor} is below floor {self.floor}, its least value")
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = float(squared_norm(p.grad for p in params if p.grad is not None))
        limit = self.growth * self.param_groups[0]["lr"]
        rate = min(excess / (self.c * norm), limit) if norm else limit
        for p in params:
            p.sub_(p.grad, alpha=rate)
        if rate > 0:  # a batch that is fitted already says nothing about the next one
            for group in self.param_groups:
                group["lr"] = rate
        return loss
