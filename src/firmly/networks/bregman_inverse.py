"""The inverse of an invertible layer F(u) = u + V rho(K u + c) + b, by Newton's method, differentiable, certifiable."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function

from firmly.algorithms.equilibrium import PeacemanRachford
from firmly.errors import ConditionError, DataError, NotConverged, ShapeError
from firmly.fixedpoint.adjoints import Implicit
from firmly.fixedpoint.equilibrium import _errors, equilibrium
from firmly.fixedpoint.gmres import gmres, norms
from firmly.fixedpoint.implicit_function import FixedPointFunction, Problem
from firmly.linear.algebra import Scale
from firmly.linear.map import LinearMap
from firmly.linear.mask import Diagonal
from firmly.linear.monotone import Monotone
from firmly.networks.bregman_invertible import Residual, invertibility, residual_of
from firmly.networks.bregman_scaling import Rescaled
from firmly.prox.prior import Prior, Slope
from firmly.replaced_tensors import call_with

SMALL = 256  # entries up to which Jacobians are matrices
HALVINGS = 40
EXACT = 1 + 1e-15  # a slope that was rounded


def inverse(layer: nn.Module, v: Tensor, max_iterations: int = 200) -> Tensor:
    """The u with u + V rho(K u + c) + b = v for every v (batch, *shape) of a batch: the inverse in dual coordinates.

    Damped Newton: (Id + V diag(rho') K) d = v - F(u), u <- u + t d with t halved until |F(u) - v| falls. Under each
    condition of `invertibility` the Jacobians have uniformly bounded inverses, so that |F(u) - v| has no stationary
    point but the solution, and the method converges from everywhere for continuously differentiable rho. Systems are
    factorised up to 256 entries, else solved by GMRES without a matrix. Every element ends for itself, at rounding.

    Derivatives of any order in v and all weights are implicit. Raises `ConditionError` for layers that are not proved
    to be invertible, and `NotConverged` where |F(u) - v| stays above eps^(3/4) (|v| + |u|). A traced v records a
    monotone loop, so that `certify` bounds the exact inverse. Source: docs/theory/bregman_invertibility.
    """
    residual, proof = residual_of(layer), invertibility(layer)
    if has_torch_function((v,)):
        return recorded(residual, v, proof.scale)
    if tuple(v.shape[1:]) != residual.outer.codomain:
        raise ShapeError(f"the inverse takes (batch, *{residual.outer.codomain}), given {tuple(v.shape)}")
    if not bool(torch.isfinite(v).all()):
        raise DataError("the inverse of NaN or infinite values does not exist")
    u = solved(residual, v, max_iterations)
    errors = _errors.get()
    if errors is not None:
        with torch.no_grad():
            away = norms(u + residual(u) - v) * proof.lipschitz
            errors.append(float((away / norms(u).clamp(min=torch.finfo(u.dtype).tiny)).max()))
    return u


class Inverse(nn.Module):
    """v -> the inverse of a layer, or `of.inverse(v)` of a whole network: a module to be certified and attacked."""

    def __init__(self, of: nn.Module):
        super().__init__()
        self.of = of

    def forward(self, v: Tensor) -> Tensor:
        return self.of.inverse(v) if hasattr(self.of, "inverse") else inverse(self.of, v)


# -- numbers -------------------------------------------------------------------------------------------------------


def solved(residual: Residual, v: Tensor, max_iterations: int) -> Tensor:
    """The solution as a differentiable function of v and of every tensor of the layer that requires gradients."""
    shape = v.shape
    tensors = {**dict(residual.named_parameters()), **dict(residual.named_buffers())}
    names = [name for name, tensor in tensors.items() if tensor.requires_grad]

    def bound(parameters: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {f"of.{name}": tensor for name, tensor in zip(names, parameters)}

    def T(x: Tensor, right: Tensor, *parameters: Tensor) -> Tensor:
        moved = call_with(Part(residual, "value"), bound(parameters), (x.reshape(-1, *shape[1:]),))
        return right - moved.flatten(1)

    def find(start: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        return newton(residual, parameters[0].reshape(shape), max_iterations).flatten(1)

    def linear(transposed: bool, x: Tensor, right: Tensor, parameters: tuple[Tensor, ...], tol: float) -> Tensor:
        u = x.reshape(-1, *shape[1:])
        J = call_with(Part(residual, "jacobian"), bound(parameters[1:]), (u,))
        return torch.linalg.solve(J.mT if transposed else J, right[:, :, None])[:, :, 0]

    adjoint = Implicit(linear if math.prod(shape[1:]) <= SMALL else "gmres")
    flat = v.flatten(1)
    x = FixedPointFunction.apply(Problem(T, find, adjoint), flat.detach(), flat, *(tensors[name] for name in names))
    return x.reshape(shape)


class Part(nn.Module):
    """g(u) or the Jacobian of F as a module, whose tensors can be replaced for one call."""

    def __init__(self, of: Residual, part: str):
        super().__init__()
        self.of = of
        self.part = part

    def forward(self, u: Tensor) -> Tensor:
        return self.of(u) if self.part == "value" else jacobian(self.of, u)


def jacobian(residual: Residual, u: Tensor) -> Tensor:
    """Id + V diag(rho'(K u + c)) K for every element, (batch, n, n) on flattened tensors."""
    slopes = residual.slopes(u).flatten(1)
    V = residual.outer.matrix().to(slopes)
    J = V * slopes[:, None, :]
    if residual.inner is not None:
        J = J @ residual.inner.matrix().to(slopes)
    return J + torch.eye(J.shape[1], dtype=J.dtype, device=J.device)


@torch.no_grad()
def newton(residual: Residual, v: Tensor, max_iterations: int) -> Tensor:
    eps = torch.finfo(v.dtype).eps
    direction = directions(residual, math.prod(v.shape[1:]) <= SMALL)
    u = v - residual.bias
    left = v - u - residual(u)
    size, magnitude = norms(left), norms(v) + norms(u)
    going = torch.ones(len(v), dtype=torch.bool, device=v.device)
    for _ in range(max_iterations):
        going &= size > eps * magnitude
        rows = going.nonzero()[:, 0]
        if len(rows) == 0:
            break
        d = direction(u[rows], left[rows])
        length = torch.ones(len(rows), dtype=v.dtype, device=v.device)
        near = size[rows] <= eps**0.75 * magnitude[rows]  # rounding is all that is left: no search
        for _ in range(HALVINGS):
            trial = u[rows] + length.reshape(-1, *[1] * (v.dim() - 1)) * d
            missing = v[rows] - trial - residual(trial)
            gained = norms(missing) <= (1 - 1e-4 * length) * size[rows]
            done = rows[gained]
            u[done], left[done], size[done] = trial[gained], missing[gained], norms(missing[gained])
            magnitude[done] = norms(v[done]) + norms(u[done])
            going[rows[near & ~gained]] = False
            open_rows = ~gained & ~near
            rows, d, length, near = rows[open_rows], d[open_rows], length[open_rows] / 2, near[open_rows]
            if len(rows) == 0:
                break
        going[rows] = False  # no step lowers the residual
    bad = ~(size <= eps**0.75 * magnitude)
    if bool(bad.any()):
        raise NotConverged(
            f"the inverse was not reached for {int(bad.sum())} of {len(v)} elements: |F(u) - v| is up to "
            f"{float((size / magnitude)[bad].max()):.3g} (|v| + |u|), the tolerance is {eps**0.75:.3g}; a larger "
            "margin, float64 or more iterations help"
        )
    return u


def directions(residual: Residual, small: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """(u, r) -> the solution d of (Id + V diag(rho') K) d = r."""

    def by_matrix(u: Tensor, r: Tensor) -> Tensor:
        return torch.linalg.solve(jacobian(residual, u), r.flatten(1)[:, :, None])[:, :, 0].reshape(r.shape)

    def by_gmres(u: Tensor, r: Tensor) -> Tensor:
        slopes = residual.slopes(u)

        def apply(d: Tensor) -> Tensor:
            return d + residual.outer(slopes * (d if residual.inner is None else residual.inner(d)))

        return gmres(apply, r, 100 * torch.finfo(r.dtype).eps)[0]

    return by_matrix if small else by_gmres


# -- symbols -------------------------------------------------------------------------------------------------------


def recorded(residual: Residual, v: Any, scale: Tensor | None) -> Any:
    """The inverse as a monotone equilibrium: y = rho(-K V y + K (v - b) + c) is the activation at u, u = v - b - V y.

    In the variable S y / L the activation has slopes in [0, 1] and the loop is -L S K V S^-1. W = f M with f near -1/L
    and M monotone by construction has the loop M in the variable -f y.
    """
    L = residual.activation.lipschitz
    square = residual.product()
    loop: LinearMap = Scale(-L, square)
    back: LinearMap = Scale(L, residual.outer)
    if isinstance(square, Scale) and isinstance(square.of, Monotone) and abs(1 + L * float(square.factor)) < 4e-16:
        loop, back = square.of, Scale(-1.0, square.of)
    w = residual.inside(v - residual.bias)
    if scale is not None:
        loop = Rescaled(loop, scale, scale)
        back = Rescaled(back, torch.ones(back.codomain, dtype=scale.dtype), scale)
        w = Diagonal(scale)(w)
    prior = ScaledActivation(residual.activation, scale)
    return v - residual.bias - back(equilibrium(PeacemanRachford(loop, prior), w))


class ScaledActivation(Prior):
    """S rho(S^-1 z) / L, the prox with unit step of some convex function: separable, with slopes in [0, 1]."""

    real_only = True

    def __init__(self, activation: Any, scale: Tensor | None = None):
        super().__init__()
        self.activation = activation
        self._hold("scale", torch.ones(()) if scale is None else scale)

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        if step != 1:
            raise ConditionError(f"an activation is a prox with unit step, given the step {step}")
        scale = self.scale.to(z)
        return scale * self.activation(z / scale) / self.activation.lipschitz

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        if step != 1:
            raise ConditionError(f"an activation is a prox with unit step, given the step {step}")
        power_of_two = math.frexp(self.activation.lipschitz)[0] == 0.5
        return Slope(0.0, 1.0 if power_of_two else EXACT)
