"""How a fixed point is differentiated: choices as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from firmly.errors import SettingsError


class LinearSolver(Protocol):
    """(I - J)^-T v if transposed, else (I - J)^-1 v, to the relative residual tol, which is measured afterwards."""

    def __call__(
        self, transposed: bool, x: Tensor, v: Tensor, parameters: tuple[Tensor, ...], tol: float
    ) -> Tensor: ...


@dataclass(frozen=True)
class Implicit:
    """Solve (I - J)^T u = v at the fixed point to the relative residual `tol`; the gradient in the parameters is B^T u.

    J = dT/dx and B = dT/dp are derivatives of the map.

    `solver`: "gmres" (any map), "normal-cg" (conjugate gradients on the normal equations: any map, less memory),
    "dense" (forms J: few entries), "manifold" (`implicit` of ForwardBackward, Fista, HeavyBall, and `ProximalGradient`
    maps: a symmetric system on the active manifold of the prior, the smallest), or a `LinearSolver` of your own. None
    as tolerance is eps^(3/4) of the precision. A residual above it raises `NotConverged`: the gradient would be wrong;
    one above 1e-3 warns (`AdjointWarning`) even if the tolerance allows it. Memory does not grow with the iterations of
    the forward solver.
    """

    solver: Literal["gmres", "normal-cg", "dense", "manifold"] | LinearSolver = "gmres"
    tol: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.solver) and self.solver not in ("gmres", "normal-cg", "dense", "manifold"):
            raise SettingsError(
                f"the solver is gmres, normal-cg or dense, manifold or a linear solver; given {self.solver!r}"
            )
        if self.tol is not None and not self.tol > 0:
            raise SettingsError(f"tol is positive or None, given {self.tol}")


@dataclass(frozen=True)
class Neumann:
    """u = sum_{i <= terms} (J^T)^i v: with r = |J| < 1 the relative error is at most r^(terms + 1).

    An approximation: where its measured residual exceeds `tol` it warns (`AdjointWarning`), and where it grows beyond
    |v|, as it does if J is no contraction, it raises `NotConverged`.
    """

    terms: int = 20
    tol: float = 1e-3

    def __post_init__(self) -> None:
        if self.terms < 0 or not self.tol > 0:
            raise SettingsError(f"terms >= 0 and tol > 0; given {self.terms} and {self.tol}")


@dataclass(frozen=True)
class OneStep:
    """u = v: the derivative of the last iteration alone. Exact for superlinear methods; warns as `Neumann` does.

    Source: Bolte, Pauwels and Vaiter, One-step differentiation of iterative algorithms, 2023.
    """

    tol: float = 1e-3


@dataclass(frozen=True)
class Unrolled:
    """Backpropagation through plain iterations from the start; None as `iterations`: as many as the tolerance needs."""

    iterations: int | None = None

    def __post_init__(self) -> None:
        if self.iterations is not None and self.iterations < 1:
            raise SettingsError(f"iterations is at least 1 or None, given {self.iterations}")


@dataclass(frozen=True)
class Checkpointed:
    """As `Unrolled`, keeping every `every`-th state for the backward pass and recomputing the others."""

    every: int = 10
    iterations: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or (self.iterations is not None and self.iterations < 1):
            raise SettingsError(f"every and iterations are at least 1; given {self.every} and {self.iterations}")


Adjoint = Implicit | Neumann | OneStep | Unrolled | Checkpointed


class AdjointWarning(UserWarning):
    """A gradient whose measured residual is above the tolerance that was asked for."""
