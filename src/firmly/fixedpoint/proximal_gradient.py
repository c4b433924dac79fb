"""Proximal gradient steps on any smooth term, as maps whose fixed points know their active manifold."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from firmly.errors import ConditionError, SettingsError
from firmly.fixedpoint.manifold import ManifoldSolver
from firmly.prox.manifold import Manifold
from firmly.prox.prior import Prior


class ProximalGradient:
    """T(x, *parameters) = prox_{t g}(x - t grad f(x)), a map for `fixed_point`, for min f(x) + g(x) with f convex.

    `gradient(x, *parameters)` is grad f at x (batch, *shape), and `prior(*parameters)` the prior g. The fixed points
    are the minimisers for every t > 0; Picard's iteration finds them for t < 2 / L, L the Lipschitz constant of
    grad f. With `adjoint=Implicit("manifold")` derivatives solve the small symmetric system on the active manifold,
    with the Hessian of f by automatic differentiation.
    Source: Combettes and Wajs, Signal recovery by proximal forward-backward splitting, 2005.
    """

    def __init__(self, gradient: Callable[..., Tensor], prior: Callable[..., Prior], step_size: float):
        if not step_size > 0:
            raise ConditionError(f"the step size is positive, given {step_size}")
        self.gradient, self.prior, self.step_size = gradient, prior, step_size

    def __call__(self, x: Tensor, *parameters: Tensor) -> Tensor:
        t = self.step_size
        return self.prior(*parameters).prox(x - t * self.gradient(x, *parameters), t)


class ProximalGradientSolver(ManifoldSolver):
    """The linear solver of `Implicit("manifold")` for a `ProximalGradient` on states (batch, *shape)."""

    def __init__(self, step: ProximalGradient, shape: tuple[int, ...]):
        self.step, self.shape = step, shape
        self.names: list[str] = []
        self.least_curvatures: list[float] = []

    def __call__(self, transposed: bool, x: Tensor, v: Tensor, parameters: tuple[Tensor, ...], tol: float) -> Tensor:
        self.smooth, self.tangent = Gradient(self.step, parameters), Tangent(self.step, parameters)
        return super().__call__(transposed, x, v, parameters[:1] or (x,), tol)


class Gradient(nn.Module):
    """The gradient of the smooth part, as a `ManifoldSolver` asks for it; the data are among the parameters."""

    def __init__(self, step: ProximalGradient, parameters: tuple[Tensor, ...]):
        super().__init__()
        self.step, self.given = step, parameters

    def forward(self, x: Tensor, data: Tensor) -> Tensor:
        return self.step.gradient(x, *self.given)


class Tangent(nn.Module):
    """The step size, and the manifold at T(x)."""

    def __init__(self, step: ProximalGradient, parameters: tuple[Tensor, ...]):
        super().__init__()
        self.step, self.given = step, parameters

    def forward(self, x: Tensor, slope: Tensor) -> tuple[float, Manifold]:
        t, prior = self.step.step_size, self.step.prior(*self.given)
        manifold = None if x.is_complex() else prior.manifold(prior.prox(x - t * slope, t))
        if manifold is None:
            raise SettingsError(
                f"{type(prior).__name__} does not know its active manifold for {x.dtype}: take Implicit('gmres')"
            )
        return t, manifold
