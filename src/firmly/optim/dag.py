"""Gradient steps through a dynamic adaptation gain, as a PyTorch optimiser."""

# pyright: reportPrivateImportUsage=false
# The _foreach_ functions are what PyTorch's own optimisers are made of.

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from firmly.errors import ConditionError, SettingsError
from firmly.optim.adaptation_gain import AdaptationGain
from firmly.optim.nearest_gain import Property, nearest_gain
from firmly.optim.rate import certified_rate


class Dag(Optimizer):
    """w_t = g_t + d1 w_{t-1} + d2 w_{t-2},  p -= lr (w_t + c1 w_{t-1} + c2 w_{t-2}); zeros (c1, c2), poles (d1, d2).

    Momentum, Nesterov's method, quasi-hyperbolic momentum, PID steps and more are choices of the four coefficients
    (`firmly.optim.presets`). One buffer per parameter where c2 = d2 = 0, none where all four are zero. `ensure="spr"`
    or `"pr"` replaces the coefficients by the nearest ones with that property. Weight decay is decoupled,
    p *= 1 - lr weight_decay, or with `decoupled=False` added to the gradient.

    Compare methods at an equal `dc_gain() * lr`: to a slowly changing gradient that product is the learning rate.
    Raises `SettingsError` for a rate, a decay or coefficients out of range, unstable poles among them, and
    `ConditionError` for sparse gradients. Source: Landau, Airimitoaie, Vau, Buche, arXiv 2404.12672.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        zeros: tuple[float, ...] = (),
        poles: tuple[float, ...] = (),
        *,
        weight_decay: float = 0.0,
        decoupled: bool = True,
        maximize: bool = False,
        ensure: Property | None = None,
    ):
        defaults = {
            "lr": lr, "zeros": zeros, "poles": poles, "weight_decay": weight_decay, "decoupled": decoupled,
            "maximize": maximize, "ensure": ensure,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; what it does not set is as in the constructor."""
        group = {**self.defaults, **param_group}
        for name in ("lr", "weight_decay"):
            if not (math.isfinite(group[name]) and group[name] >= 0):
                raise SettingsError(f"{name} is finite and not negative, given {group[name]!r}")
        gain = AdaptationGain(group["zeros"], group["poles"])
        if group["ensure"] is not None:
            gain = nearest_gain(gain, group["ensure"])
        if not gain.stable:
            raise SettingsError(
                f"poles satisfy |d2| < 1 and |d1| < 1 - d2, given {gain.poles}: updates would grow by themselves"
            )
        super().add_param_group({**param_group, "zeros": gain.zeros, "poles": gain.poles})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` returns, which is called first and with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.is_sparse:
                        raise ConditionError(
                            "Dag keeps dense buffers and has no rule for sparse gradients: use torch.optim.SGD"
                        )
                    alike.setdefault((p.device, p.dtype), []).append(p)
            for params in alike.values():
                self._step_together(params, group)
        return loss

    def _step_together(self, params: list[Tensor], group: dict[str, Any]) -> None:
        gain = AdaptationGain(group["zeros"], group["poles"])
        (c1, c2), (d1, d2), lr = gain.zeros, gain.poles, group["lr"]
        gradients: Any = [p.grad for p in params]
        if group["maximize"]:
            gradients = torch._foreach_neg(gradients)
        if decay := group["weight_decay"]:
            if group["decoupled"]:
                torch._foreach_mul_(params, 1 - lr * decay)
            else:
                gradients = torch._foreach_add(gradients, params, alpha=decay)
        if gain.order == 0:
            _move(params, gradients, lr)
            return
        last = self._buffers(params, "filtered")
        if gain.order == 1:
            if c1:
                _move(params, last, lr * c1)
            torch._foreach_mul_(last, d1)
            torch._foreach_add_(last, gradients)
            _move(params, last, lr)
            return
        older = self._buffers(params, "filtered_before")
        for coefficient, buffers in ((c1, last), (c2, older)):
            if coefficient:
                _move(params, buffers, lr * coefficient)
        torch._foreach_mul_(older, d2)
        torch._foreach_add_(older, last, alpha=d1)
        torch._foreach_add_(older, gradients)
        _move(params, older, lr)
        for p, newest, newer in zip(params, older, last, strict=True):
            self.state[p].update(filtered=newest, filtered_before=newer)

    def _buffers(self, params: list[Tensor], name: str) -> list[Tensor]:
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return [self.state[p][name] for p in params]

    @property
    def gain(self) -> AdaptationGain:
        """The filter, where all groups have the same: else `ConditionError`."""
        gains = {AdaptationGain(group["zeros"], group["poles"]) for group in self.param_groups}
        if len(gains) > 1:
            raise ConditionError(
                f"the groups have {len(gains)} different filters: ask AdaptationGain(zeros, poles) for each"
            )
        return gains.pop()

    def dc_gain(self) -> float:
        """`AdaptationGain.dc_gain`: lr times it is the rate that a constant gradient sees."""
        return self.gain.dc_gain()

    def spr(self) -> bool:
        """`AdaptationGain.spr`, for every group."""
        return all(AdaptationGain(group["zeros"], group["poles"]).spr() for group in self.param_groups)

    def pr(self) -> bool:
        """`AdaptationGain.pr`, for every group."""
        return all(AdaptationGain(group["zeros"], group["poles"]).pr() for group in self.param_groups)

    def rate(self, m: float, L: float) -> float:
        """`certified_rate`: |x_t - x*| <= c rho^t |x_0 - x*| on every m-strongly convex, L-smooth function, undecayed.

        Raises `ConditionError` where groups differ in filter, rate or weight decay, decay at all, or maximise, and
        `NotCertifiable` where no rho < 1 is proved.
        """
        if any(group["maximize"] for group in self.param_groups):
            raise ConditionError("a rate is proved of functions that are minimised, given maximize=True")
        rates = {(float(group["lr"]), float(group["weight_decay"])) for group in self.param_groups}
        if len(rates) > 1 or any(decay for _, decay in rates):
            raise ConditionError(f"a rate is proved for one learning rate without weight decay, given {sorted(rates)}")
        return certified_rate(self.gain, rates.pop()[0], m, L).rho

    def gain_limit(self, L: float) -> float:
        """The learning rate below which steps are stable for every time-varying gradient with slopes in [0, L].

        `AdaptationGain.sector_limit`, the least over the groups: their filters need not agree.
        """
        return min(AdaptationGain(group["zeros"], group["poles"]).sector_limit(L) for group in self.param_groups)


def _move(params: list[Tensor], direction: list[Tensor], rate: float | Tensor) -> None:
    """params -= rate * direction."""
    if isinstance(rate, Tensor):  # a rate in a tensor is changed without compiling the step again
        torch._foreach_sub_(params, torch._foreach_mul(direction, rate))
    else:
        torch._foreach_add_(params, direction, alpha=-rate)
