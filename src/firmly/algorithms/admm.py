"""The alternating direction method of multipliers, in its scaled form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from firmly.algorithms.algorithm import Algorithm, Condition, Rule, Scalar, convexity, positive, positive_rule
from firmly.algorithms.certified import norm
from firmly.algorithms.quadratic import data_prox
from firmly.linear.map import LinearMap
from firmly.prox.prior import Prior


class AdmmState(NamedTuple):
    x: Tensor
    z: Tensor
    u: Tensor


class Admm(Algorithm):
    """min 1/2 |A x - y|^2 + g(K x), with the splitting z = K x, the scaled multiplier u and a penalty r > 0:

        x <- argmin 1/2 |A x - y|^2 + r/2 |x - (z - u)|^2,   z <- prox_{g/r}(x + u),   u <- u + x - z        (K = I)

    With K the image is found in the metric c I - K*K, c = |K|^2, so that no system with K*K has to be solved:

        x <- argmin 1/2 |A x - y|^2 + r c/2 |x - (x_old + K*(z - u - K x_old) / c)|^2

    with K x in place of x in the lines after it; K = I gives the above. The image read is z, the point after the prox,
    and x if there is a K.
    Sources: Boyd et al., Distributed optimization and statistical learning via the alternating direction method of
    multipliers, 2011, section 3.1.1; for the metric, Zhang, Burger, Osher, A unified primal-dual algorithm framework
    based on Bregman iteration, 2011.
    """

    learnable = ("penalty", "prior")

    def __init__(self, A: LinearMap, prior: Prior, penalty: Scalar = 1.0, K: LinearMap | None = None):
        super().__init__()
        self.A = A
        self.prior = prior
        self.K = K
        self.data_shape, self.image_shape = A.codomain, A.domain
        self.penalty = positive("penalty", penalty)
        self.metric = 1.0 if K is None else positive("|K|^2", norm(K) ** 2)

    def start(self, y: Tensor, x: Tensor | None = None) -> AdmmState:
        x = self.A.T(y) if x is None else x
        z = self._analyse(x)
        return AdmmState(x, z, 0.0 * z)

    def step(self, state: AdmmState, y: Tensor, k: int) -> AdmmState:
        x, z, u = state
        target = z - u if self.K is None else x + (1.0 / self.metric) * self.K.T(z - u - self.K(x))
        x = data_prox(self.A, y, target, self.penalty * self.metric)
        v = self._analyse(x) + u
        z = self.prior.prox(v, 1.0 / self.penalty)
        return AdmmState(x, z, v - z)

    def _analyse(self, x: Tensor) -> Tensor:
        return x if self.K is None else self.K(x)

    def read(self, state: AdmmState) -> Tensor:
        return state.z if self.K is None else state.x

    def rule(self, name: str, free: Sequence[str] = ()) -> Rule:
        return positive_rule("penalty > 0", "Boyd et al. 2011, section 3.2.1")

    def conditions(self) -> list[Condition]:
        return [*super().conditions(), *self._metric_condition(), convexity(self.prior, 1.0 / self.penalty)]

    def _metric_condition(self) -> list[Condition]:
        if self.K is None:
            return []
        needed = norm(self.K) ** 2
        return [
            Condition(
                name="metric",
                text=f"the metric c = {self.metric:.6g} is at least |K|^2 = {needed:.6g}",
                holds=self.metric >= needed,
                margin=self.metric - needed,
                source="Zhang, Burger, Osher 2011",
            )
        ]
