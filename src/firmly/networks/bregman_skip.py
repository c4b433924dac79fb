"""Skips of Bregman layers that change the width: learned averages, taken in primal coordinates."""

from __future__ import annotations

from torch import Tensor, nn

from firmly.prox.legendre import Legendre
from firmly.prox.legendre_mean import mean
from firmly.prox.row_stochastic import RowStochastic


class BregmanMean(nn.Module):
    """u -> rho^-1(P rho(u)) for a row-stochastic P: the average of x = rho(u), in dual coordinates.

    Every output lies between the smallest and the largest of the inputs it is an average of. It is computed from the
    distances of x to both ends of the domain, without the cancellation of the inverse activation.
    """

    def __init__(self, activation: Legendre, average: RowStochastic):
        super().__init__()
        self.activation, self.average = activation, average
        self.domain, self.codomain = average.domain, average.codomain

    def forward(self, u: Tensor) -> Tensor:
        return mean(self.activation, self.average, u)
