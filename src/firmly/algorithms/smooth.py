"""The smooth part of an objective: 1/2 |A x - y|^2, with a term that is used through its gradient."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from firmly.algorithms.algorithm import Condition, Scalar, number
from firmly.algorithms.certified import norm
from firmly.errors import ConditionError
from firmly.linear.map import LinearMap
from firmly.prox.prior import Slope, sum_over_sample


class SmoothTerm(Protocol):
    """A term used through its gradient: `firmly.prox.Ridge`, `Tikhonov`, or anything with these three."""

    def gradient(self, x: Tensor) -> Tensor: ...

    def kappa(self) -> Scalar:
        """A certified Lipschitz constant of the gradient."""
        ...

    @property
    def slope(self) -> Slope:
        """(low, high) relative to kappa: low >= 0 for a convex term."""
        ...


class Tikhonov(nn.Module):
    """1/2 |D x|^2 as a smooth term: gradient D*D x, Lipschitz constant |D|^2. Use `tau ** 0.5 * D` for a weight tau."""

    slope = Slope(0.0, 1.0)

    def __init__(self, D: LinearMap):
        super().__init__()
        self.D = D

    def value(self, x: Tensor) -> Tensor:  # (batch, *shape) -> (batch,)
        return 0.5 * sum_over_sample(self.D(x).abs() ** 2)

    def gradient(self, x: Tensor) -> Tensor:
        return self.D.T(self.D(x))

    def kappa(self) -> float:
        return norm(self.D) ** 2


def gradient(A: LinearMap, ridge: SmoothTerm | None, x: Tensor, y: Tensor) -> Tensor:
    """A*(A x - y) + ridge'(x)."""
    data = A.T(A(x) - y)
    return data if ridge is None else data + ridge.gradient(x)


def smoothness(A: LinearMap, ridge: SmoothTerm | None) -> Scalar:
    """The certified Lipschitz constant |A|^2 + kappa of `gradient`."""
    constant = norm(A) ** 2 + (0.0 if ridge is None else ridge.kappa())
    if not number(constant) > 0:
        raise ConditionError(f"no step size fits the smooth term: {A} has norm zero, and so has the ridge")
    return constant


def convex_term(ridge: SmoothTerm | None) -> list[Condition]:
    """The condition that the smooth term is convex, if there is one."""
    if ridge is None:
        return []
    low = float(ridge.slope.low)
    return [
        Condition(
            name="ridge",
            text=f"the gradient of the ridge has slopes from {low:.6g} kappa, at least 0: a convex ridge",
            holds=low >= 0,
            margin=low,
            source="Bauschke and Combettes 2017, corollary 18.17 (Baillon-Haddad)",
        )
    ]
