"""What every prior is: a function g with a proximal map, and what is known of that map's slope."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from firmly.errors import ConditionError, DataError
from firmly.prox.manifold import Manifold, on_support

Structure = Literal["separable", "channel", "group", "whole"]


class Slope(NamedTuple):
    """R has slopes in [low, high]: <dv - low dz, high dz - dv> >= 0 for all increments dv = R(z + dz) - R(z)."""

    low: float
    high: float

    @classmethod
    def outward(cls, low: float, high: float) -> Slope:
        """An interval that contains [low, high], although both ends were computed with a few rounding errors."""
        return cls(low - 1e-15 * abs(low), high + 1e-15 * abs(high))


class Prior(nn.Module):
    """A function g with g.prox(z, t) = argmin_x 1/2 |x - z|^2 + t g(x).

    A subclass gives `value` and `_prox`. A convex g has a firmly nonexpansive prox, slope (0, 1); a subclass whose
    prox is smoother (`low > 0` or `high < 1`) or steeper (`high > 1`, weakly convex) overrides `slope_at`.
    `structure` says on which pieces the prox acts independently: every entry ("separable", or "channel" where the
    entries of a channel share one function), the channels of one pixel ("group"), or the whole sample ("whole").
    `real_only` priors refuse complex data.
    """

    structure: Structure = "separable"
    real_only: bool = False

    def _hold(self, name: str, value: float | Tensor) -> None:
        """Keep a constant as an attribute; a tensor moves with the module, and a parameter stays learnable."""
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value)

    def value(self, x: Tensor) -> Tensor:  # (batch, *shape) -> (batch,)
        """g(x), one number for each element of the batch."""
        raise NotImplementedError

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        raise NotImplementedError

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        """The slope interval of z -> prox(z, step), whatever z is."""
        positive("the step", step)
        return Slope(0.0, 1.0)

    @property
    def slope(self) -> Slope:
        """The slope interval of the prox with unit step."""
        return self.slope_at(1.0)

    def prox(self, z: Tensor, step: float | Tensor = 1.0) -> Tensor:
        """argmin_x 1/2 |x - z|^2 + step g(x), for each element of the batch; the step is positive."""
        return proximal(self, z, step)

    def conjugate_prox(self, z: Tensor, step: float | Tensor = 1.0) -> Tensor:
        """The prox of step g*, the convex conjugate, by Moreau: z - step prox_{g / step}(z / step)."""
        return conjugate_proximal(self, z, step)

    def manifold(self, x: Tensor) -> Manifold | None:
        """The active manifold at the value x of the prox (real data), None for priors that do not know it."""
        return None

    def forward(self, z: Tensor, step: float | Tensor = 1.0) -> Tensor:
        return self.prox(z, step)


def proximal(prior: Prior, z: Tensor, step: float | Tensor) -> Tensor:
    """prior.prox(z, step), open to `__torch_function__` so that a traced input records the prior instead."""
    if has_torch_function((z,)):
        return handle_torch_function(proximal, (z,), prior, z, step)
    if not isinstance(step, Tensor) and not step > 0:
        raise ConditionError(f"the step of a proximal map is positive, given {step}")
    if prior.real_only and z.is_complex():
        raise DataError(
            f"{prior._get_name()} is a function of real data, given {z.dtype}; use z.real or view_as_real(z)"
        )
    return prior._prox(z, step)


def conjugate_proximal(prior: Prior, z: Tensor, step: float | Tensor) -> Tensor:
    """prior.conjugate_prox(z, step), open to `__torch_function__`: one nonlinearity, not z minus another."""
    if has_torch_function((z,)):
        return handle_torch_function(conjugate_proximal, (z,), prior, z, step)
    return z - step * prior.prox(z / step, 1.0 / step)


def sum_over_sample(values: Tensor) -> Tensor:
    """The sum over all dimensions but the batch."""
    return values.flatten(1).sum(1)


def indicator(violation: Tensor) -> Tensor:
    """0 for every sample (batch,) whose constraint is violated by no more than rounding, else infinity."""
    tolerance = 64 * torch.finfo(violation.dtype).eps
    return torch.where(violation <= tolerance, 0.0, torch.inf).to(violation.dtype)


def over_entries(values: Tensor, like: Tensor) -> Tensor:
    """Numbers (batch,), one for each sample, shaped to broadcast against a batch of samples."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def largest(value: float | Tensor) -> float:
    return float(torch.as_tensor(value, dtype=torch.float64).detach().max())


def smallest(value: float | Tensor) -> float:
    return float(torch.as_tensor(value, dtype=torch.float64).detach().min())


def positive(name: str, value: float | Tensor, allow_zero: bool = False) -> float | Tensor:
    """The value itself, once every entry is known to be positive (or not negative)."""
    low = smallest(value)
    if not (low > 0 or (allow_zero and low == 0)):
        raise ConditionError(f"{name} is {'not negative' if allow_zero else 'positive'}, given {low}")
    return value


class Zero(Prior):
    """g = 0, whose prox is the identity."""

    def value(self, x: Tensor) -> Tensor:
        return torch.zeros(x.shape[0], dtype=x.real.dtype, device=x.device)

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        return z

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        positive("the step", step)
        return Slope(1.0, 1.0)

    def manifold(self, x: Tensor) -> Manifold:
        return on_support(torch.ones_like(x))
