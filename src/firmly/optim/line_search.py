"""Stochastic line search by Armijo's rule, for comparison with rates set by feedback."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from firmly.errors import ConditionError, SettingsError
from firmly.optim.a_posteriori import squared_norm
from firmly.optim.loss_value import loss_value


class ArmijoSearch(Optimizer):
    """p -= eta g with the first eta = growth^(1/batches) eta_before shrink^i that has l(p - eta g) <= l - c eta |g|^2.

    `step(closure)`: `closure()` returns the loss of one and the same batch, without randomness, and calls no backward;
    gradients are taken here. `forwards` counts the calls. After `trials` of them the parameters stay, and the next
    search starts from the last eta. All groups share one rate, the "lr" of each, at first that of the first.
    Source: S. Vaswani, A. Mishkin, I. Laradji, M. Schmidt, G. Gidel, S. Lacoste-Julien, Painless stochastic gradient,
    NeurIPS 2019.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        c: float = 0.1,
        shrink: float = 0.9,
        growth: float = 2.0,
        batches: int = 1,
        trials: int = 100,
    ):
        if not (0 < lr < math.inf and 0 < c < 1 and 0 < shrink < 1 and 1 <= growth < math.inf):
            raise SettingsError(
                f"lr > 0, c and shrink in (0, 1) and growth >= 1, given {lr}, {c}, {shrink} and {growth}"
            )
        if batches < 1 or trials < 1:
            raise SettingsError(f"batches and trials are at least 1, given {batches} and {trials}")
        self.c, self.shrink, self.growth, self.trials = c, shrink, growth ** (1 / batches), trials
        self.forwards = 0
        super().__init__(params, {"lr": lr})

    def __getstate__(self) -> dict[str, Any]:
        # PyTorch's own leaves out every attribute of a subclass: copies of it could not step
        names = ("c", "shrink", "growth", "trials", "forwards")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:
        """One search; returns the loss before it."""
        if closure is None:
            raise ConditionError("a line search evaluates the loss again: step(closure) with closure() -> loss")
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        with torch.enable_grad():
            loss = closure()
            found = torch.autograd.grad(loss, params, allow_unused=True)
        self.forwards += 1
        moved = [(p, p.detach().clone(), g) for p, g in zip(params, found, strict=True) if g is not None]
        before, norm = loss_value(loss), float(squared_norm(g for *_, g in moved))
        rate = self.growth * self.param_groups[0]["lr"]
        with torch.no_grad():
            for _ in range(self.trials):
                for p, start, g in moved:
                    p.copy_(start - rate * g)
                self.forwards += 1
                if float(closure()) <= before - self.c * rate * norm:  # false for nan
                    break
                rate *= self.shrink
            else:
                for p, start, _ in moved:
                    p.copy_(start)
        for group in self.param_groups:
            group["lr"] = rate
        return loss.detach()
