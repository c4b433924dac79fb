"""The a-posteriori step for networks: a rate that shrinks by itself where the loss curves."""

# pyright: reportPrivateImportUsage=false
# The _foreach_ functions are what PyTorch's own optimisers are made of.

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jvp
from torch.optim import Optimizer

from firmly.errors import ConditionError, DataError, SettingsError
from firmly.optim.adaptation_gain import AdaptationGain
from firmly.optim.dag import Dag
from firmly.replaced_tensors import call_with

TINY = 1e-8  # a gradient below it counts as none in the diagonal gain


class APosteriori(Optimizer):
    """v = -f F g / (1 + f kappa), through the dynamic adaptation gain H: explicit to compute, implicit in effect.

    kappa is the curvature of the loss along the step, so that it is the step whose error is measured *after* it, to
    first order in the outputs. F is 1, or with `memory` the diagonal matrix of 1 / sqrt(mean g^2), with the mean over
    about that many steps, this one among them. There are two ways to kappa:

        step(loss=loss)             kappa = g' F g / (2 (loss - floor)), at no cost: the loss is half the square of a
                                    residual. f -> infinity gives Polyak's step 2 (loss - floor) / (g' F g).
        step(curvature=kappa)       kappa = g' J' (d2 loss / d outputs2) J g / |g|^2 from `gauss_newton_curvature`, one
                                    forward-mode pass; every few batches is often enough. For F = 1 alone.

    `lr` is f, and may differ between groups with `loss`. `leakage` shrinks the parameters by that fraction per step.
    The parameters are those extrapolated by the filter, where the gradient belongs; p.grad is scaled in place.

    For a linear regression, one observation at a time with the loss (y - phi' theta)^2 / 2, both are `ImplicitStep`:
    stable for every f > 0 if `gain.pr()` and F is constant, which with `memory` it nearly is once its mean has settled.
    For a network that is the idea and no theorem. Raises `SettingsError`, `DataError` for a loss below `floor`, a loss,
    gradient or curvature that is not finite, `ConditionError` where a step gets neither. Source: Landau, Airimitoaie,
    Vau, Buche, arXiv 2404.12672 (regression); for networks derived in the docs.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        gain: AdaptationGain | None = None,
        leakage: float = 0.0,
        floor: float = 0.0,
        memory: float | None = None,
    ):
        gain = AdaptationGain() if gain is None else gain
        if not 0 <= leakage < 1:
            raise SettingsError(f"a leakage lies in [0, 1), given {leakage!r}")
        if not math.isfinite(floor):
            raise SettingsError(f"floor, the least loss possible, is finite, given {floor!r}")
        if memory is not None and not 1 <= memory < math.inf:
            raise SettingsError(f"memory is a number of steps, at least 1, or None, given {memory!r}")
        (c1, c2), (d1, d2) = gain.zeros, gain.poles
        # the path of the extrapolated parameters is that of Dag with these coefficients
        first = 1 - leakage + d1 + c1
        if not first > 0:
            raise SettingsError(f"extrapolation needs 1 - leakage + d1 + c1 > 0, given {gain} and leakage {leakage}")
        self.gain, self.floor, self.memory = gain, floor, memory
        self._filter: Dag | None = None
        super().__init__(params, {"lr": lr})
        self._filter = Dag(
            [{"params": group["params"]} for group in self.param_groups],
            lr=first,
            zeros=((d2 + c2 - (1 - leakage) * d1) / first, -(1 - leakage) * d2 / first),
            poles=gain.poles,
            weight_decay=leakage / first,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group with its own `lr`."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not (math.isfinite(group["lr"]) and group["lr"] > 0):
            raise SettingsError(f"lr is positive and finite, given {group['lr']!r}")
        if self._filter is not None:
            self._filter.add_param_group({"params": group["params"]})

    def __getstate__(self) -> dict[str, Any]:
        # PyTorch's own leaves out every attribute of a subclass: copies of it could not step
        names = ("gain", "floor", "memory", "_filter")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        loss: float | Tensor | None = None,
        curvature: float | Tensor | None = None,
    ) -> Any:
        """One step with the gradients in p.grad; `closure` computes them and the loss. Returns the loss."""
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        assert self._filter is not None
        groups = [(group["lr"], [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        if curvature is not None:
            if self.memory is not None:
                raise ConditionError("a curvature is that along the gradient: with memory, give step(loss=...)")
            if len({float(rate) for rate, _ in groups}) > 1:
                raise ConditionError("a curvature belongs to one direction: the groups need the same lr")
            curvature = torch.as_tensor(curvature).detach()
            if not bool(curvature.isfinite()):
                raise DataError(f"the curvature is {float(curvature)}: training diverged")
            growth = groups[0][0] * curvature.clamp(min=0)
        elif loss is not None:
            excess = wide(torch.as_tensor(loss).detach()) - self.floor
            if not bool((excess >= 0) & excess.isfinite()):
                raise DataError(
                    f"the loss is {float(excess) + self.floor}; it is finite and at least floor, {self.floor}"
                )
            energy = torch.stack([rate * self._precondition(params).to(excess) for rate, params in groups]).sum()
            if not bool(energy.isfinite()):
                raise DataError("a gradient is not finite, or its square is not: training diverged")
            growth = torch.where(energy > 0, energy / (2 * excess), 0.0)
        else:
            raise ConditionError("an a-posteriori step needs step(loss=...), step(curvature=...) or a closure")
        for rate, params in groups:
            for p in params:
                p.grad.mul_((rate / (1 + growth)).to(p.grad))
        self._filter.step()
        return loss

    def _precondition(self, params: list[Tensor]) -> Tensor:
        """Puts F g in the place of g and returns g' F g."""
        gradients = [p.grad for p in params if p.grad is not None]
        if self.memory is None:
            return squared_norm(gradients)
        products = [torch.zeros(())]
        for p, g in zip(params, gradients, strict=True):
            if g.is_sparse or g.is_complex():
                raise ConditionError("a diagonal gain needs dense, real gradients: leave memory away")
            state, g_wide = self.state[p], wide(g)
            if not state:
                state.update(seen=0, squares=torch.zeros_like(g_wide))
            state["seen"] += 1
            kept = 1 - 1 / self.memory
            # at first the mean of what there is, not one that starts from 0
            weight = 1 / self.memory / (1 - kept ** state["seen"])
            state["squares"].lerp_(g_wide.square(), weight)
            direction = g_wide / (state["squares"].sqrt() + TINY)
            products.append((g_wide * direction).sum())
            g.copy_(direction)
        return torch.stack([product.to(products[-1]) for product in products]).sum()

    def state_dict(self) -> dict[str, Any]:
        """As that of every optimiser, with the memory of the filter."""
        assert self._filter is not None
        return {**super().state_dict(), "filter": self._filter.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        assert self._filter is not None
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "filter"})
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params, strict=True):
            if (squares := state_dict["state"].get(i, {}).get("squares")) is not None:  # PyTorch rounds them like p
                self.state[p]["squares"] = squares.to(p.device, copy=True)
        self._filter.load_state_dict(state_dict["filter"])


def wide(tensor: Tensor) -> Tensor:
    """In float32 or better: squares of gradients leave the range of half precision."""
    return tensor.float() if tensor.itemsize < 4 else tensor


def squared_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Of all entries together, in float32 or better; `ConditionError` for sparse tensors."""
    tensors = list(tensors)
    if any(t.is_sparse for t in tensors):
        raise ConditionError("the step needs the norm of dense gradients: sparse ones are not taken")
    if not tensors:
        return torch.zeros(())
    return torch.nn.utils.get_total_norm([wide(t) for t in tensors]).square()


@torch.no_grad()
def gauss_newton_curvature(model: nn.Module, inputs: Tensor, criterion: Callable[[Tensor], Tensor]) -> Tensor:
    """g' J' H J g / |g|^2 with g in p.grad, J the derivative of the outputs, H the Hessian of `criterion(outputs)`.

    One pass in forward mode through the model (about twice the cost of a plain forward pass) and one of the criterion.
    The model's buffers are left alone; dropout draws a new mask. Not negative where the criterion is convex, as the
    usual losses are. Zero where all gradients are. Raises `ConditionError` where there are none.
    """
    found = {name: p for name, p in model.named_parameters() if p.grad is not None}
    if not found:
        raise ConditionError("no parameter has a gradient: call backward first")
    kept = {name: b.clone() for name, b in model.named_buffers()}
    kept |= {name: p.detach() for name, p in model.named_parameters() if name not in found}

    with forward_ad.dual_level():
        moving = {name: forward_ad.make_dual(p.detach(), p.grad) for name, p in found.items()}
        # not functorch's jvp: it refuses batch normalisation, which counts its batches in place
        z, change = forward_ad.unpack_dual(call_with(model, {**kept, **moving}, (inputs,)))
    if change is None:
        raise ConditionError("the outputs do not depend on the parameters that have gradients")
    bent = jvp(grad(criterion), (z,), (change,))[1]
    norm = squared_norm(p.grad for p in found.values() if p.grad is not None)
    return torch.where(norm > 0, (change * bent).sum() / norm, 0.0)
