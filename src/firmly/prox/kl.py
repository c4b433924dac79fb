"""The Kullback-Leibler divergence from counts, the data term of Poisson noise."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.errors import DataError
from firmly.prox.prior import Prior, positive, sum_over_sample


class KullbackLeibler(Prior):
    """g(x) = weight sum_i y_i log(y_i / u_i) - y_i + u_i with u = x + background >= 0, for counts y >= 0 and real x.

    prox: u is the nonnegative root of u^2 - (z + background - a) u - a y = 0 with a = t weight.
    `counts` broadcasts against a batch of samples; entries without counts cost weight u_i.
    Source: Combettes and Pesquet, A Douglas-Rachford splitting approach, 2007; Chaux et al. 2007, table of prox maps.
    """

    real_only = True

    def __init__(self, counts: Tensor, weight: float | Tensor = 1.0, background: float = 0.0):
        super().__init__()
        if not bool(torch.isfinite(counts).all()) or not bool((counts >= 0).all()):
            raise DataError("the counts of a Kullback-Leibler term are finite and not negative")
        self._hold("counts", counts)
        self._hold("weight", positive("the weight of a Kullback-Leibler term", weight))
        self.background = positive("the background", background, allow_zero=True)

    def value(self, x: Tensor) -> Tensor:
        intensity = x + self.background
        counts = self.counts.expand_as(x)
        divergence = torch.xlogy(counts, counts) - torch.xlogy(counts, intensity) - counts + intensity
        return sum_over_sample(self.weight * torch.where(intensity >= 0, divergence, torch.inf))

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        a = step * self.weight
        centre = (z + self.background - a) / 2
        product = a * self.counts
        # the root by Vieta where the centre is negative: no cancellation for few counts
        reach = (centre**2 + product).clamp(min=torch.finfo(z.dtype).tiny).sqrt() + centre.abs()
        return torch.where(centre >= 0, reach, product / reach) - self.background
