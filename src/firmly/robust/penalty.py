"""The penalty of augmented Lagrangian attacks, and its derivative."""

from __future__ import annotations

import torch
from torch import Tensor


def attack_penalty(y: Tensor, mu: Tensor | float, rho: Tensor | float) -> Tensor:
    """P(y) = mu y + mu rho y^2 + rho^2 y^3 / 6 for y >= 0 (a violated constraint), mu y / (1 - max(rho, 1) y) below.

    `mu` > 0 are multipliers and `rho` > 0 the weights of the penalty, of a shape that broadcasts with y. P is convex
    and increasing, with P(0) = 0 and P'(0) = mu.
    Source: Rony, Pesquet and Ben Ayed, Proximal splitting adversarial attack for semantic segmentation, CVPR 2023; the
    form for y >= 0 is P_3 of Birgin, Castillo and Martinez, Numerical comparison of augmented Lagrangian algorithms for
    nonconvex problems, 2005.
    """
    mu, rho = (torch.as_tensor(value, dtype=y.dtype, device=y.device) for value in (mu, rho))
    over, under = y.clamp(min=0), y.clamp(max=0)
    rising = mu * over + mu * rho * over**2 + rho**2 * over**3 / 6
    return torch.where(y >= 0, rising, mu * under / (1 - rho.clamp(min=1) * under))


def penalty_slope(y: Tensor, mu: Tensor | float, rho: Tensor | float) -> Tensor:
    """P'(y) = mu + 2 mu rho y + rho^2 y^2 / 2 for y >= 0, mu / (1 - max(rho, 1) y)^2 below: the next multiplier.

    The code released with the paper returns mu y + ... in the place of mu + ... where constraints are violated, which
    leaves those just violated almost without a gradient; this is the derivative of `attack_penalty`.
    """
    mu, rho = (torch.as_tensor(value, dtype=y.dtype, device=y.device) for value in (mu, rho))
    over, under = y.clamp(min=0), y.clamp(max=0)
    return torch.where(
        y >= 0, mu + 2 * mu * rho * over + rho**2 * over**2 / 2, mu / (1 - rho.clamp(min=1) * under) ** 2
    )
