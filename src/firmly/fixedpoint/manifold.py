"""Derivatives of proximal fixed points on the active manifold, where their linear system is small and symmetric.

For T(x) = prox_{t g}(x - t grad f(x)) the Jacobian J = M (I - t H) is not symmetric, although the derivative M of the
prox and the Hessian H of f are. With P the projection onto the range of M, and M^+ = P + t G there, G the Hessian of g
along its active manifold,

    (I - J)^T u = v:    u = v + (I - t H) w,     t P (G + H) P w = P v,
    (I - J) x = b:      x = b + w,               t P (G + H) P w = P (I - t H) b,

by the eigenvalues of the system where images are small, else by conjugate gradients from zero: both give the
minimum-norm w where active columns are linearly dependent. What this leaves as residual is at most that of the small
system. Derived in docs/fixed_points.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from firmly.algorithms.algorithm import Algorithm
from firmly.algorithms.fista import Fista
from firmly.algorithms.forward_backward import ForwardBackward
from firmly.algorithms.heavy_ball import HeavyBall
from firmly.algorithms.smooth import gradient
from firmly.errors import SettingsError
from firmly.fixedpoint.state import norms
from firmly.prox.manifold import Manifold
from firmly.prox.prior import Prior, Zero
from firmly.replaced_tensors import call_with

DENSE = 128  # entries of an image whose system is written out ...
ENTRIES = 2**20  # ... if all systems of a batch have at most so many
PROBE = 30  # Lanczos steps for the smallest curvature
FLAT = 1000  # units of rounding: a smaller eigenvalue, relative to the largest, is taken for zero
LONGEST = 5000  # steps of conjugate gradients, beyond which rounding has taken over

Operator = Callable[[Tensor], Tensor]


class ManifoldSolver:
    """The linear solver of `Implicit("manifold")` for a forward-backward algorithm with tensors of these names.

    `least_curvatures` grows by one number a solve: the smallest eigenvalue of P (G + H) P on the tangent space over its
    largest, or, where images are large, the same of Ritz values from 30 Lanczos steps, which is never below the true
    ratio. One at the level of rounding says that the solution is not unique.
    """

    def __init__(self, algorithm: Algorithm, names: Sequence[str]):
        self.smooth, self.tangent = Smooth(algorithm), Tangent(algorithm)
        self.names = [f"algorithm.{name}" for name in names]
        self.shape = tuple(algorithm.image_shape)
        self.least_curvatures: list[float] = []

    @torch.no_grad()
    def __call__(self, transposed: bool, x: Tensor, v: Tensor, parameters: tuple[Tensor, ...], tol: float) -> Tensor:
        """(I - J)^-T v or (I - J)^-1 v at the state x (batch, entries): the image and, with momentum, its last value.

        `parameters` are the data and the tensors of the algorithm, in the order of their names.
        """
        count = math.prod(self.shape)
        image, data = x[:, :count].reshape(-1, *self.shape), parameters[0]
        tensors = dict(zip(self.names, parameters[1:], strict=True))

        def descend(z: Tensor) -> Tensor:
            return call_with(self.smooth, tensors, (z, data))

        linear = torch.func.vjp(descend, image)
        slope, pull = linear[0], linear[1]
        t, manifold = call_with(self.tangent, tensors, (image, slope))
        flat = Flat(manifold, lambda z: pull(z)[0], t, self.shape)
        first, copies = v[:, :count], v[:, count:].reshape(len(v), -1, count)  # the map keeps its argument there
        if transposed:
            first = first + copies.sum(1)
        goal = 0.5 * tol * norms(first)
        right = flat.project(first if transposed else first - flat.curvature(first))
        if count <= DENSE and right.numel() * count <= ENTRIES:
            w, curvature = solve_dense(flat.reduced, flat.project, right)
        else:
            w = conjugate_gradients(flat.reduced, right, goal)
            curvature = least_curvature(flat.reduced, flat.project, right)
        self.least_curvatures.append(curvature)
        if transposed:
            return torch.cat([first + w - flat.curvature(w), copies.flatten(1)], 1)
        return torch.cat([first + w, (copies + (first + w)[:, None]).flatten(1)], 1)


class Flat:
    """The operators of one solve on rows (batch, entries)."""

    def __init__(self, manifold: Manifold, hessian: Operator, t: Any, shape: tuple[int, ...]):
        self.manifold, self.hessian, self.t, self.shape = manifold, hessian, t, shape

    def on_images(self, operator: Operator, v: Tensor) -> Tensor:
        return operator(v.reshape(-1, *self.shape)).flatten(1)

    def project(self, v: Tensor) -> Tensor:
        return self.on_images(self.manifold.project, v)

    def curvature(self, v: Tensor) -> Tensor:
        """t H v."""
        return self.t * self.on_images(self.hessian, v)

    def reduced(self, v: Tensor) -> Tensor:
        """t P (G + H) v, for v in the tangent space."""
        return self.project(self.t * self.on_images(self.manifold.hessian, v) + self.curvature(v))


def prior_of(algorithm: Algorithm) -> Prior:
    """The prior of a forward-backward algorithm; raises `SettingsError` where its manifold is not known."""
    if not isinstance(algorithm, (ForwardBackward, Fista, HeavyBall)):
        raise SettingsError(
            "Implicit('manifold') differentiates ForwardBackward, Fista and HeavyBall, given "
            f"{type(algorithm).__name__}: take Implicit('gmres')"
        )
    prior = Zero() if isinstance(algorithm, HeavyBall) else algorithm.prior
    if type(prior).manifold is Prior.manifold:
        raise SettingsError(
            f"{type(prior).__name__} does not know its active manifold: take Implicit('gmres'), or write its "
            "`manifold` method"
        )
    return prior


class Smooth(nn.Module):
    """The gradient of the smooth part, as a module so that its tensors can be replaced."""

    def __init__(self, algorithm: Algorithm):
        super().__init__()
        self.algorithm: Any = algorithm

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return gradient(self.algorithm.A, self.algorithm.ridge, x, y)


class Tangent(nn.Module):
    """The step, and the manifold at T(x), where the Jacobian of the prox is taken."""

    def __init__(self, algorithm: Algorithm):
        super().__init__()
        self.algorithm: Any = algorithm

    def forward(self, x: Tensor, slope: Tensor) -> tuple[Any, Manifold]:
        t, prior = self.algorithm.step_size, prior_of(self.algorithm)
        if x.is_complex():
            raise SettingsError("Implicit('manifold') is for real images, given complex ones: take Implicit('gmres')")
        manifold = prior.manifold(prior.prox(x - t * slope, t))
        if manifold is None:
            raise SettingsError(f"{type(prior).__name__} does not know its manifold here: take Implicit('gmres')")
        return t, manifold


def solve_dense(apply: Operator, project: Operator, right: Tensor) -> tuple[Tensor, float]:
    """The least w with apply(w) = right (batch, n) on the tangent space, for a symmetric positive semidefinite `apply`,
    and its least eigenvalue there over its largest, the least of the batch."""
    units = torch.eye(right.shape[1], dtype=right.dtype, device=right.device)[:, None].expand(-1, *right.shape)
    systems = torch.func.vmap(lambda v: apply(project(v)))(units).movedim(0, 2)
    values, vectors = torch.linalg.eigh((systems + systems.mT) / 2)
    tangent = torch.func.vmap(project)(units).diagonal(dim1=0, dim2=2).sum(1).round().long()  # the trace of P
    largest = values[:, -1:].clamp(min=torch.finfo(right.dtype).tiny)
    coordinates = (vectors.mT @ right[:, :, None])[:, :, 0]
    bent = values > FLAT * torch.finfo(right.dtype).eps * largest
    w = (vectors @ (coordinates * torch.where(bent, 1 / torch.where(bent, values, 1), 0))[:, :, None])[:, :, 0]
    first = values.gather(1, (right.shape[1] - tangent).clamp(max=right.shape[1] - 1)[:, None])
    ratio = torch.where(tangent[:, None] > 0, first.clamp(min=0) / largest, 1)
    return w, float(ratio.min())


def conjugate_gradients(apply: Operator, right: Tensor, goal: Tensor) -> Tensor:
    """w with |right - apply(w)| <= goal (batch,) for a symmetric positive semidefinite `apply`, every row alone.

    Ends early where rounding stops it; the caller measures what is left. Source: Hestenes and Stiefel, 1952.
    """
    w, left, direction = torch.zeros_like(right), right, right
    power = left.square().sum(1)
    for _ in range(min(2 * right.shape[1], LONGEST) + 100):
        image = apply(direction)
        bend = (direction * image).sum(1)
        going = (power.sqrt() > goal) & (bend > 0)
        if not bool(going.any()):
            break
        length = torch.where(going, power / torch.where(going, bend, 1), 0)
        w, left = w + length[:, None] * direction, left - length[:, None] * image
        now = left.square().sum(1)
        direction = left + torch.where(going, now / torch.where(going, power, 1), 0)[:, None] * direction
        power = now
    return w


def least_curvature(apply: Operator, project: Operator, like: Tensor) -> float:
    """The least over the batch of the smallest Ritz value of `apply` on the tangent space over its largest."""
    generator = torch.Generator().manual_seed(0)
    vector = project(torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like))
    size = norms(vector)
    basis, diagonal, beside = [over(vector, size)], [], []
    for _ in range(min(PROBE, like.shape[1])):
        image = apply(basis[-1])
        alpha = (basis[-1] * image).sum(1)
        kept = torch.stack(basis, 2)
        for _ in range(2):
            image = image - (kept @ (kept.mT @ image[:, :, None]))[:, :, 0]
        beta = norms(image)
        beta = torch.where(beta > 1e4 * torch.finfo(like.dtype).eps * alpha_scale(diagonal, alpha), beta, 0)
        # a row that has ended repeats its first number, which lies between its extremes
        alive = norms(basis[-1]) > 0.5
        diagonal.append(torch.where(alive, alpha, diagonal[0] if diagonal else alpha))
        beside.append(beta)
        if not bool((beta > 0).any()):
            break
        basis.append(over(image, beta))
    ritz = torch.linalg.eigvalsh(
        torch.diag_embed(torch.stack(diagonal, 1))
        + torch.diag_embed(torch.stack(beside, 1)[:, :-1], 1)
        + torch.diag_embed(torch.stack(beside, 1)[:, :-1], -1)
    )
    largest = ritz[:, -1].clamp(min=torch.finfo(like.dtype).tiny)
    return float(torch.where(size > 0, ritz[:, 0].clamp(min=0) / largest, 1).min())


def alpha_scale(diagonal: list[Tensor], alpha: Tensor) -> Tensor:
    return torch.stack([*diagonal, alpha]).abs().amax(0)


def over(x: Tensor, size: Tensor) -> Tensor:
    return torch.where(size > 0, 1 / torch.where(size > 0, size, 1), 0)[:, None] * x
