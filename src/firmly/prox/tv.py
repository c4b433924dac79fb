"""Total variation, whose prox is computed to an accuracy that a duality gap certifies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from firmly.errors import DataError, NotConverged
from firmly.linear.gradient import Gradient
from firmly.prox.prior import Prior, Slope, over_entries, positive, sum_over_sample


class TV(Prior):
    """g(x) = weight sum of |(D x)[c, :, p]| over channels c and pixels p, D the discrete gradient (Neumann border).

    |.| is the Euclidean norm over the axes (isotropic), or the l1 norm (`isotropic=False`). The prox is
    x = z - D* u, where u minimises |z - D* u|^2 / 2 over |u[c, :, p]| <= t weight, by an accelerated projected
    gradient in float64 with step 1 / |D|^2. The objective P of the prox is 1-strongly convex, so that
    |x - prox|^2 <= 2 (P(x) - min P) <= 2 gap(x, u): iterations end once this certifies for every sample a root mean
    square error over its entries of at most `accuracy`, and raise `NotConverged` after `max_iterations`.
    Gradients are those of the exact prox on the set of jumps that was found, by conjugate gradients.

    Sources: Chambolle, An algorithm for total variation minimization and applications, 2004; Beck and Teboulle, Fast
    gradient-based algorithms for constrained total variation image denoising, 2009; the restart is that of O'Donoghue
    and Candes, Adaptive restart for accelerated gradient schemes, 2015.
    """

    structure = "whole"

    def __init__(
        self,
        weight: float | Tensor = 1.0,
        isotropic: bool = True,
        accuracy: float = 1e-3,
        max_iterations: int = 10000,
    ):
        super().__init__()
        self._hold("weight", positive("the weight of total variation", weight, allow_zero=True))
        self.isotropic = isotropic
        self.accuracy = positive("the accuracy", accuracy)
        self.max_iterations = max_iterations

    def value(self, x: Tensor) -> Tensor:  # (batch, channel, *spatial) -> (batch,)
        differences, _ = gradient_maps(x)
        return self.weight * sum_over_sample(self.magnitude(differences(x)))

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        wide = torch.complex128 if z.is_complex() else torch.float64
        threshold = torch.as_tensor(step * self.weight, dtype=torch.float64, device=z.device)
        return _Denoise.apply(z.to(wide), threshold, self).to(z.dtype)

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        positive("the weight of total variation", self.weight, allow_zero=True)
        return super().slope_at(step)

    def magnitude(self, field: Tensor) -> Tensor:
        """|.| of the vectors of a field (batch, channel, axes, *spatial), broadcastable against it."""
        return torch.linalg.vector_norm(field, dim=2, keepdim=True) if self.isotropic else field.abs()

    def extra_repr(self) -> str:
        return f"isotropic={self.isotropic}, accuracy={self.accuracy}"


Field = Callable[[Tensor], Tensor]


def gradient_maps(x: Tensor) -> tuple[Field, Field]:
    """D: (batch, channel, *spatial) -> (batch, channel, axes, *spatial), and its adjoint."""
    D, axes = Gradient(x.shape[1:]), x.dim() - 2
    return lambda image: D(image).unflatten(1, (-1, axes)), lambda field: D.T(field.flatten(1, 2))


def solve_dual(prior: TV, z: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, float]:
    """The prox x = z - D* u and its dual u, with the step size that was used; raises `NotConverged`."""
    if not bool(torch.isfinite(z).all()):
        raise DataError("total variation was given data that are not finite")
    D, adjoint = gradient_maps(z)
    norm = Gradient(z.shape[1:]).norm().upper
    step = 1 / norm**2 if norm > 0 else 1.0
    allowed = prior.accuracy**2 / 2 * z[0].numel()
    u = D(z).zero_()
    ahead, momentum = u, z.real.new_ones(len(z))
    gap = z.real.new_full((len(z),), torch.inf)
    for iteration in range(prior.max_iterations + 1):
        if iteration % 10 == 0:
            x = z - adjoint(u)
            jumps = D(x)
            # P(x) minus the dual value, written as a sum of terms that are not negative: no cancellation
            gap = sum_over_sample(threshold * prior.magnitude(jumps))
            gap = gap - sum_over_sample((u.conj() * jumps).real)
            if bool((gap <= allowed).all()):
                return x, u, step
        forward = ahead + step * D(z - adjoint(ahead))
        new = forward * (threshold / prior.magnitude(forward).clamp(min=threshold.clamp(min=1e-300)))
        # restart the momentum of every sample that moves against its last step
        against = sum_over_sample(((ahead - new).conj() * (new - u)).real) > 0
        momentum = torch.where(against, 1.0, momentum)
        grown = (1 + (1 + 4 * momentum**2).sqrt()) / 2
        ahead = new + over_entries((momentum - 1) / grown, new) * (new - u)
        u, momentum = new, grown
    certified = float((2 * gap.max() / z[0].numel()).sqrt())
    raise NotConverged(
        f"the prox of total variation is certified to {certified:.3g} per entry after {prior.max_iterations} "
        f"iterations, asked for {prior.accuracy:.3g}; allow more max_iterations or a larger accuracy"
    )


class _Denoise(torch.autograd.Function):
    """(z, threshold) -> prox: the dual solver forward, its linearised optimality conditions backward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, prior: TV) -> Tensor:
        x, dual, ctx.step = solve_dual(prior, z, threshold)
        ctx.prior = prior
        ctx.save_for_backward(x, dual, threshold)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        prior, step, (x, dual, threshold) = ctx.prior, ctx.step, ctx.saved_tensors
        D, adjoint = gradient_maps(x)
        # u = P(q), q = u + step D x: P' is the identity inside the ball, and outside tangential and shrunk
        q = dual + step * D(x)
        size = prior.magnitude(q)
        outside = size > threshold
        size = torch.where(outside, size, 1)
        normal = torch.where(outside, q / size, 0)
        shrink = torch.where(outside, threshold / size, 1).sqrt()

        def root(field: Tensor) -> Tensor:  # the square root of P'
            along = (normal.conj() * field).real
            along = along.sum(2, keepdim=True) if prior.isotropic else along
            return shrink * (field - normal * along)

        def system(s: Tensor) -> Tensor:  # 1 - P' + step root D D* root, positive semidefinite
            m = root(s)
            return s - root(m) + step * root(D(adjoint(m)))

        source = -D(gradients[0])
        m = root(conjugate_gradients(system, root(source), prior.max_iterations))
        change = step * adjoint(m)
        of_threshold = (normal.conj() * (source + m - D(change))).real.sum()
        return gradients[0] + change, of_threshold.reshape(threshold.shape), None


def conjugate_gradients(system: Field, source: Tensor, max_iterations: int, tol: float = 1e-10) -> Tensor:
    """The solution of a consistent positive semidefinite system, for every sample to a relative residual of `tol`."""

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return sum_over_sample((a.conj() * b).real)

    s, residual = torch.zeros_like(source), source
    direction, square = source, inner(source, source)
    target = tol**2 * square
    for _ in range(max_iterations):
        if bool((square <= target).all()):
            return s
        image = system(direction)
        curvature = inner(direction, image)
        length = torch.where(square > target, square / torch.where(curvature > 0, curvature, 1), 0)
        s = s + over_entries(length, s) * direction
        residual = residual - over_entries(length, s) * image
        new_square = inner(residual, residual)
        ratio = torch.where(square > target, new_square / torch.where(square > 0, square, 1), 0)
        direction = residual + over_entries(ratio, s) * direction
        square = torch.where(square > target, new_square, square)
    raise NotConverged(f"the gradient of the prox of total variation needs more than {max_iterations} iterations")
