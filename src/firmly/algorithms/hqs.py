"""Half-quadratic splitting: a denoiser in turn with the resolvent of the data term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from firmly.algorithms.algorithm import Algorithm, Condition, Rule, Scalar, convexity, number, positive, positive_rule
from firmly.algorithms.quadratic import data_prox
from firmly.algorithms.smooth import SmoothTerm, convex_term
from firmly.errors import ConditionError
from firmly.linear.map import LinearMap
from firmly.prox.prior import Prior


class HqsState(NamedTuple):
    x: Tensor


class Hqs(Algorithm):
    """x <- (A*A + r I)^-1 (A* y + r d(x)), with d(x) = prox_{g/r}(x) or d(x) = x - R'(x); give a prior g or a ridge R.

    With a ridge it solves min 1/2 |A x - y|^2 + r R(x) for kappa < 2: forward-backward, the two terms in turned roles.
    With a prior it solves the penalised problem min 1/2 |A x - y|^2 + g(v) + r/2 |x - v|^2, that is, with g replaced by
    its Moreau envelope; it tends to the original problem as the penalty r grows.
    The start is (A*A + r I)^-1 A* y, a Wiener filter.
    Sources: Geman and Yang, Nonlinear image recovery with half-quadratic regularization, 1995; Combettes and Wajs 2005.
    """

    learnable = ("penalty", "prior", "ridge")

    def __init__(
        self, A: LinearMap, prior: Prior | None = None, penalty: Scalar = 1.0, ridge: SmoothTerm | None = None
    ):
        super().__init__()
        if (prior is None) == (ridge is None):
            raise ConditionError("Hqs takes either a prior (for its prox) or a ridge (for its gradient)")
        self.A = A
        self.prior = prior
        self.ridge = ridge
        self.data_shape, self.image_shape = A.codomain, A.domain
        self.penalty = positive("penalty", penalty)

    def start(self, y: Tensor, x: Tensor | None = None) -> HqsState:
        return HqsState(data_prox(self.A, y, None, self.penalty) if x is None else x)

    def step(self, state: HqsState, y: Tensor, k: int) -> HqsState:
        return HqsState(data_prox(self.A, y, self._denoise(state.x), self.penalty))

    def _denoise(self, x: Tensor) -> Tensor:
        if self.prior is not None:
            return self.prior.prox(x, 1.0 / self.penalty)
        assert self.ridge is not None  # the constructor takes either
        return x - self.ridge.gradient(x)

    def read(self, state: HqsState) -> Tensor:
        return state.x

    def rule(self, name: str, free: Sequence[str] = ()) -> Rule:
        return positive_rule("penalty > 0", "Combettes and Wajs 2005, theorem 3.4")

    def conditions(self) -> list[Condition]:
        if self.prior is not None:
            return [*super().conditions(), convexity(self.prior, 1.0 / self.penalty)]
        assert self.ridge is not None
        kappa = number(self.ridge.kappa())
        reach = Condition(
            name="kappa",
            text=f"the gradient of the ridge has the Lipschitz constant kappa = {kappa:.6g}, below 2",
            holds=kappa < 2,
            margin=2 - kappa,
            source="Combettes and Wajs 2005, theorem 3.4, with step 1 / penalty for penalty * ridge",
        )
        return [*super().conditions(), reach, *convex_term(self.ridge)]
