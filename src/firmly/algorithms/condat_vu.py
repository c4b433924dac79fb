"""The primal-dual method of Condat and Vu, with a smooth data term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from firmly.algorithms.algorithm import Algorithm, Condition, Rule, Scalar, convexity, number, positive
from firmly.algorithms.certified import norm
from firmly.algorithms.smooth import SmoothTerm, convex_term, gradient, smoothness
from firmly.linear.map import LinearMap
from firmly.prox.prior import Prior, Zero


class CondatVuState(NamedTuple):
    x: Tensor
    u: Tensor


class CondatVu(Algorithm):
    """min 1/2 |A x - y|^2 + r(x) + h(x) + g(K x), with a prior g, a simple term h (`constraint`) and a smooth ridge r:

        x+ = prox_{t h}(x - t (A*(A x - y) + r'(x)) - t K*u),     u <- prox_{s g*}(u + s K(2 x+ - x))

    The rule is 1/t - s |K|^2 > L/2, with L = |A|^2 + kappa. Defaults: t = 1/L, and s at 0.99 of its limit for this t.
    Source: Condat, A primal-dual splitting method for convex optimization involving Lipschitzian, proximable and linear
    composite terms, 2013, theorem 3.1; Vu, A splitting algorithm for dual monotone inclusions, 2013.
    """

    learnable = ("step_size", "dual_step", "prior", "constraint", "ridge")

    def __init__(
        self,
        A: LinearMap,
        prior: Prior,
        K: LinearMap,
        step_size: Scalar | None = None,
        dual_step: Scalar | None = None,
        constraint: Prior | None = None,
        ridge: SmoothTerm | None = None,
    ):
        super().__init__()
        self.A = A
        self.prior = prior
        self.K = K
        self.constraint = Zero() if constraint is None else constraint
        self.ridge = ridge
        self.data_shape, self.image_shape = A.codomain, A.domain
        L = number(smoothness(A, ridge))
        self.step_size = 1 / L if step_size is None else positive("step_size", step_size)
        room = 1 / number(self.step_size) - L / 2
        fitting = 0.99 * room / positive("|K|", norm(K)) ** 2
        if dual_step is None and room <= 0:  # no dual step fits: the condition on the step size will say so
            fitting = 1.0
        self.dual_step = fitting if dual_step is None else positive("dual_step", dual_step)

    def start(self, y: Tensor, x: Tensor | None = None) -> CondatVuState:
        x = self.A.T(y) if x is None else x
        return CondatVuState(x, 0.0 * self.K(x))

    def step(self, state: CondatVuState, y: Tensor, k: int) -> CondatVuState:
        t, s = self.step_size, self.dual_step
        descent = gradient(self.A, self.ridge, state.x, y) + self.K.T(state.u)
        x = self.constraint.prox(state.x - t * descent, t)
        return CondatVuState(x, self.prior.conjugate_prox(state.u + s * self.K(2.0 * x - state.x), s))

    def read(self, state: CondatVuState) -> Tensor:
        return state.x

    def rule(self, name: str, free: Sequence[str] = ()) -> Rule:
        text, source = "1 / step_size - dual_step |K|^2 > (|A|^2 + kappa) / 2", "Condat 2013, theorem 3.1"
        half, square = smoothness(self.A, self.ridge) / 2, norm(self.K) ** 2
        if name == "dual_step":
            return Rule(0.0, (1 / self.step_size - half) / square, text, source)
        return Rule(0.0, 1 / (half if "dual_step" in free else half + self.dual_step * square), text, source)

    def conditions(self) -> list[Condition]:
        return [*super().conditions(), convexity(self.prior, 1.0 / self.dual_step), *convex_term(self.ridge)]
