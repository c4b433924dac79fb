"""Whether a map bends sharply near its fixed point: kinks, and maps that do not move at all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SHARP = 0.1  # a second difference of so much of the first is a kink: smooth maps have the order of the reach
FARTHEST = 0.01
PROBES = 3


@torch.no_grad()
def kinks(T: Callable[[Tensor], Tensor], x: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows of x (batch, entries) have a kink of T within their `reach` (batch,), and near which T is constant.

    Every entry is moved by random w of the size reach max |x|, three times, and T has a kink where
    |T(x + w) - 2 T(x) + T(x - w)| exceeds a tenth of |T(x + w) - T(x - w)| / 2 in the maximum norm, and rounding. A
    heuristic: a curvature of the size 1 / reach looks like a kink, and a kink that w does not cross is not seen.
    """
    generator = torch.Generator().manual_seed(0)
    eps = torch.finfo(x.dtype).eps
    reach = reach.to(x.real.dtype).clamp(eps ** (1 / 3), FARTHEST)
    size = x.abs().amax(1)
    scale = (reach * torch.where(size > 0, size, 1))[:, None]
    here = T(x)
    rounding = 100 * eps * torch.maximum(here.abs().amax(1), size)
    sharp, still = torch.zeros_like(size, dtype=torch.bool), torch.ones_like(size, dtype=torch.bool)
    for _ in range(PROBES):
        w = scale * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        ahead, behind = T(x + w), T(x - w)
        bend, move = (ahead - 2 * here + behind).abs().amax(1), (ahead - behind).abs().amax(1) / 2
        sharp |= (bend > SHARP * move) & (bend > rounding)
        still &= (move <= rounding) & (bend <= rounding)
    return sharp, still
