"""The dilogarithm on (0, 1], which is in the potential of the softplus."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# B_n / (n + 1)! for n = 0, 1, 2, 4, 6, ...: the series of Li2(1 - exp(-w)) in powers w^(n + 1), |w| < 2 pi
SERIES = (
    (1, 1.0),
    (2, -1 / 4),
    (3, 1 / 36),
    (5, -1 / 3600),
    (7, 1 / 211680),
    (9, -1 / 10886400),
    (11, 1 / 526901760),
    (13, -691 / (2730 * math.factorial(13))),
    (15, 7 / (6 * math.factorial(15))),
    (17, -3617 / (510 * math.factorial(17))),
)


def dilogarithm_of_exponential(t: Tensor) -> Tensor:
    """Li2(exp(-t)) = sum_k exp(-k t) / k^2 for t >= 0, entry by entry.

    With D(w) = Li2(1 - exp(-w)): it is D(-log(1 - exp(-t))) for t > log 2, and pi^2 / 6 + t log(1 - exp(-t)) - D(t)
    below, by Euler's reflection. Source: Lewin, Polylogarithms and associated functions, 1981.
    """
    large = t > math.log(2)
    far = torch.where(large, t, 1.0)
    near = torch.where(large, 0.5, t)
    reflected = math.pi**2 / 6 + torch.special.xlogy(near, -torch.expm1(-near)) - _series(near)
    return torch.where(large, _series(-torch.log1p(-torch.exp(-far))), reflected)


def _series(w: Tensor) -> Tensor:
    return sum((factor * w**power for power, factor in SERIES), torch.zeros_like(w))
