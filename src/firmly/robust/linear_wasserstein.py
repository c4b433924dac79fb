"""Logistic regression whose features and labels may both be wrong: the worst case in a Wasserstein ball, solved."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import softplus

from firmly.errors import DataError, NotConverged, SettingsError, ShapeError

Norm = Literal["l1", "l2", "linf"]
SHRINK = 0.15  # of the weight of the barrier, from one problem of the path to the next
PROVED = 1e-6  # gap that is always good enough: rounding spoils the slopes of the hinges, and with them the dual point
ROUNDING = 1e-13  # of the objective
STEPS = 100  # of Newton's method at most for one problem of the path


class RobustLogistic(NamedTuple):
    """`weight` (features,), `bias` (), and the worst-case `risk` () of these; above the least one by at most `gap`.

    The gap is that to a feasible point of the dual problem. `price` () is how fast the risk grows with the radius. All
    are in double precision.
    """

    weight: Tensor
    bias: Tensor
    price: Tensor
    risk: Tensor
    gap: float


def wasserstein_logistic(
    X: Tensor,
    y: Tensor,
    radius: float | Tensor,
    kappa: float | Tensor = math.inf,
    norm: Norm = "l2",
    intercept: bool = True,
    tol: float = 1e-9,
) -> RobustLogistic:
    """min over (b, b0) of the worst mean of log(1 + exp(-y (b'x + b0))) over the laws within `radius` of the samples.

    Features X (samples, features) and labels y of -1 and 1 (samples,). A law is within the radius if the samples become
    it at a mean cost of at most that, where moving x to x' costs `norm`(x - x') and turning a label over costs `kappa`
    (infinity: none is). The bias is not moved. With margins m_i = y_i (b'x_i + b0) and the dual norm |.|_*, this is

        min  radius price + mean_i ( log(1 + exp(-m_i)) + (m_i - kappa price)_+ )   subject to   |b|_* <= price,

    convex; kappa = infinity is logistic regression with the penalty radius |b|_*. Solved by Newton's method along the
    central path of a logarithmic barrier for the hinges and the cone of the norm, until the path is within `tol` of the
    least risk. A `radius` or `kappa` that is a tensor receives its gradient, from weight and bias through the last
    Newton system, and from the risk by Danskin's theorem, so that `fm.bilevel` can tune both.
    Raises `ShapeError`, `DataError` (labels; one class alone, which needs an infinite bias), `SettingsError`.
    Source: Shafieezadeh-Abadeh, Mohajerin Esfahani and Kuhn, Distributionally robust logistic regression, 2015, theorem
    1; with log(1 + e^m) = log(1 + e^-m) + m in its second constraint.
    """
    epsilon, cost = (torch.as_tensor(value, dtype=torch.float64, device=X.device) for value in (radius, kappa))
    checked(X, y, epsilon, cost, norm, tol)
    if intercept and bool((y == y[0]).all()) and bool(cost.isinf()):
        raise DataError("all labels are equal: the bias grows without end; give both classes, or intercept=False")
    signs = y.detach().double()
    columns = [signs[:, None] * X.detach().double(), *([signs[:, None]] if intercept else [])]
    problem = Barrier(torch.cat(columns, 1), X.shape[1], norm)
    with torch.no_grad():
        v, weight, bound = problem.path(
            float(epsilon.detach()), float(cost.detach()), tol, signs if intercept else None
        )
    b, bias = v[: X.shape[1]], v[X.shape[1]] if intercept else v.new_zeros(())
    with torch.no_grad():
        m = columns[0] @ b + signs * bias
        price = best_price(m, dual_norm(b, norm), float(epsilon.detach()), float(cost.detach()))
        risk = epsilon * price + softplus(-m).mean()
        if bool(cost.isfinite()):
            risk = risk + (m - cost * price).clamp(min=0).mean()
        gap = max(float(risk) - bound, 0.0)
        if gap > max(10 * tol, PROVED):
            raise NotConverged(
                f"the risk is up to {gap:.3g} above the least one: standardise the features, or raise tol"
            )
    if epsilon.requires_grad or cost.requires_grad:
        gradient, hessian = problem.derivatives(v, weight, epsilon, cost)
        v = v - torch.cholesky_solve(gradient[:, None], cholesky(hessian.detach())).squeeze(1)
        b, bias = v[: X.shape[1]], v[X.shape[1]] if intercept else bias
        of_risk = problem.value(v.detach(), weight, epsilon, cost)
        risk = risk + of_risk - of_risk.detach()
    return RobustLogistic(b, bias, price, risk, gap)


def checked(X: Tensor, y: Tensor, radius: Tensor, kappa: Tensor, norm: Norm, tol: float) -> None:
    if X.dim() != 2 or y.shape != X.shape[:1] or 0 in X.shape:
        raise ShapeError(
            f"X is (samples, features) and y (samples,), neither empty; given {tuple(X.shape)} and {tuple(y.shape)}"
        )
    if not bool((y.abs() == 1).all()) or not bool(X.isfinite().all()):
        raise DataError("labels are -1 and 1, and features are finite")
    if X.requires_grad or y.requires_grad:
        raise DataError("derivatives are in radius and kappa, not in the samples: detach them")
    if radius.shape != () or kappa.shape != () or norm not in get_args(Norm):
        raise SettingsError(f"radius and kappa are numbers and the norm is one of {get_args(Norm)}, given {norm!r}")
    if not (bool(0 < radius) and bool(radius.isfinite()) and bool(kappa > 0)):
        raise SettingsError(
            f"a finite radius > 0 and kappa > 0, given {float(radius.detach())} and {float(kappa.detach())}; without a "
            "radius this is logistic regression without a penalty, which may have no solution"
        )
    if not 1e-12 <= tol < math.inf:
        raise SettingsError(f"tol is a finite number of at least 1e-12, given {tol}")


def dual_norm(weight: Tensor, norm: Norm) -> Tensor:
    return torch.linalg.vector_norm(weight, {"l1": math.inf, "l2": 2, "linf": 1}[norm])


def best_price(margins: Tensor, least: Tensor, radius: float, kappa: float) -> Tensor:
    """The best price for given margins: at least |b|_*, and such that at most radius / kappa of the mass is above kappa
    price.
    """
    above = math.floor(radius / kappa * len(margins) * (1 + 1e-12)) if kappa < math.inf else len(margins)
    if above >= len(margins):
        return least
    return torch.maximum(margins.sort(descending=True).values[above] / kappa, least)


class Barrier:
    """The problem in v = (b, bias, price), for "linf" with bounds of |b_i| after it, and its barrier of weight w:

        radius price + mean_i ( log(1 + exp(-m_i)) + min over s of s - w log s - w log(s - h_i) ) + w cone(b, price),

    h = m - kappa price. At its minimum the objective is above the least one by at most `gap(w)`.
    """

    def __init__(self, margins: Tensor, features: int, norm: Norm):
        self.features, self.price, self.norm = features, margins.shape[1], norm
        self.size = self.price + 1 + (features if norm == "linf" else 0)
        self.margins = torch.nn.functional.pad(margins, (0, self.size - margins.shape[1]))

    def gap(self, weight: float) -> float:
        return weight * (2 + {"l2": 2, "l1": 2 * self.features, "linf": 2 * self.features + 1}[self.norm])

    def lower_bound(self, v: Tensor, weight: float, radius: Tensor, kappa: Tensor, signs: Tensor | None) -> Tensor:
        """The value of the dual problem, the mean entropy of a_i in [0, 1], at a feasible point near that of v.

        With slopes c_i in [0, 1] of the hinges (none for an infinite kappa), feasible are
        norm(mean (a_i - c_i) y_i x_i) + kappa mean c_i <= radius, and mean (a_i - c_i) y_i = 0 if there is a bias.
        """
        a, c = torch.sigmoid(-self.margins @ v), torch.zeros(len(self.margins)).to(v)
        if bool(kappa.isfinite()):
            c = self.hinge(self.margins @ v - kappa * v[self.price], weight)[1]
        if signs is not None:  # what is too much in one class is taken from its a, or from its c
            left = ((a - c) * signs).sum()
            for slopes, side in ((a, left.sign()), (c, -left.sign())):
                part = torch.where(signs == side, slopes, 0)
                share = (left.abs() / part.sum()).clamp(max=1) if float(part.sum()) > 0 else part.sum()
                slopes -= share * part
                left = left.sign() * (left.abs() - share * part.sum()).clamp(min=0)
        z = self.margins[:, : self.features].T @ (a - c) / len(a)
        needed = torch.linalg.vector_norm(z, {"l1": 1, "l2": 2, "linf": math.inf}[self.norm])
        if bool(kappa.isfinite()):
            needed = needed + kappa * c.mean()
        a = a * (radius / torch.maximum(needed, radius))
        return -(torch.xlogy(a, a) + torch.xlogy(1 - a, 1 - a)).mean()

    def cone(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The barrier of |b|_* <= price inside it, its gradient and its Hessian."""
        d, b, price = self.features, v[: self.features], v[self.price]
        if self.norm == "l2":
            left = price**2 - (b * b).sum()
            bend = torch.zeros_like(v)
            bend[:d], bend[self.price] = 2 / left, -2 / left
            gradient = v * bend
            return -left.log(), gradient, torch.diag(bend) + torch.outer(gradient, gradient)
        bounds = v[self.price + 1 :] if self.norm == "linf" else price.expand(d)  # of every |b_i|
        below, above = 1 / (bounds - b), 1 / (bounds + b)
        value = below.log().sum() + above.log().sum()
        # one variable for each entry and one for each bound, which are the same variable for "l1"
        places = torch.arange(self.price + 1, self.size) if self.norm == "linf" else torch.full((d,), self.price)
        own, places = torch.arange(d, device=v.device), places.to(v.device)
        gradient = torch.zeros_like(v).index_add(0, own, below - above).index_add(0, places, -below - above)
        hessian = v.new_zeros(self.size, self.size)
        for i, j, bend in (
            (own, own, below**2 + above**2), (places, places, below**2 + above**2),
            (own, places, above**2 - below**2), (places, own, above**2 - below**2),
        ):  # fmt: skip
            hessian.index_put_((i, j), bend, accumulate=True)
        if self.norm == "linf":
            left = price - bounds.sum()
            along = torch.zeros_like(v)
            along[self.price], along[self.price + 1 :] = -1 / left, 1 / left
            value, gradient, hessian = value - left.log(), gradient + along, hessian + torch.outer(along, along)
        return value, gradient, hessian

    def hinge(self, h: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """The barrier of (h)_+ with its first two derivatives, from the closed form of the best s."""
        root = (h * h + 4 * weight**2).sqrt()
        above = 0.5 * (h.abs() + root) + weight  # s for h >= 0, and s - h for h <= 0
        below = above - h.abs()  # without cancellation: s (s - h) = w (2 s - h)
        below = torch.where(h.abs() > weight, weight * (2 * above - h.abs()) / above, below)
        s, rest = torch.where(h >= 0, above, below), torch.where(h >= 0, below, above)
        first = torch.where(h >= 0, 1 - weight / above, weight / above)
        second = 1 / (s * s / weight + rest * rest / weight)
        return s - weight * (s.log() + rest.log()), first, second

    def value(self, v: Tensor, weight: float, radius: Tensor, kappa: Tensor) -> Tensor:
        m = self.margins @ v
        total = softplus(-m)
        if bool(kappa.isfinite()):
            total = total + self.hinge(m - kappa * v[self.price], weight)[0]
        return radius * v[self.price] + total.mean() + weight * self.cone(v)[0]

    def derivatives(self, v: Tensor, weight: float, radius: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient and Hessian in v; the gradient is differentiable in radius and kappa."""
        m, number = self.margins @ v, len(self.margins)
        slope = torch.sigmoid(-m)
        gradient = -self.margins.T @ slope / number
        hessian = (self.margins.T * (slope * (1 - slope))) @ self.margins / number
        unit = torch.zeros_like(v)
        unit[self.price] = 1
        gradient = gradient + radius * unit
        if bool(kappa.isfinite()):
            rows = self.margins - kappa * unit
            _, first, second = self.hinge(m - kappa * v[self.price], weight)
            gradient = gradient + rows.T @ first / number
            hessian = hessian + (rows.T * second) @ rows / number
        _, first, second = self.cone(v)
        return gradient + weight * first, hessian + weight * second

    def path(self, radius: float, kappa: float, tol: float, signs: Tensor | None) -> tuple[Tensor, float, float]:
        """The minimiser for the first weight with a gap below tol, this weight, and the best lower bound on the way."""
        v = self.margins.new_zeros(self.size)
        v[self.price :] = 1 / (2 * self.features)
        v[self.price] = 1
        epsilon, cost = (torch.tensor(value, dtype=torch.float64, device=v.device) for value in (radius, kappa))
        weight, bound = 1.0, 0.0
        while True:
            v = self.minimise(v, weight, epsilon, cost)
            bound = max(bound, float(self.lower_bound(v, weight, epsilon, cost, signs)))
            if self.gap(weight) <= tol:
                return v, weight, bound
            weight *= SHRINK

    def minimise(self, v: Tensor, weight: float, radius: Tensor, kappa: Tensor) -> Tensor:
        """Newton's method with a line search; below the rounding of the objective without one, while it converges."""
        value, last = self.value(v, weight, radius, kappa), math.inf
        for _ in range(STEPS):
            gradient, hessian = self.derivatives(v, weight, radius, kappa)
            step = -torch.cholesky_solve(gradient[:, None], cholesky(hessian)).squeeze(1)
            decrease, length = -float(gradient @ step), 1.0
            if decrease <= 1e-12 * weight or (decrease <= ROUNDING and decrease > last / 4):
                return v
            while not self.inside(v + length * step):
                length /= 2
            found = self.value(v + length * step, weight, radius, kappa)
            while length * decrease > ROUNDING and float(found) > float(value) - 0.1 * length * decrease:
                length /= 2
                found = self.value(v + length * step, weight, radius, kappa)
            v, value, last = v + length * step, found, decrease
        raise NotConverged(f"Newton's method needs more than {STEPS} steps at a barrier of {weight:g}: scale features")

    def inside(self, v: Tensor) -> bool:
        bounds = v[self.price + 1 :]
        if self.norm == "linf":
            return bool((bounds > v[: self.features].abs()).all()) and bool(bounds.sum() < v[self.price])
        return bool(dual_norm(v[: self.features], self.norm) < v[self.price])


def cholesky(hessian: Tensor) -> Tensor:
    """The factor of a positive definite matrix, with what rounding needs added to its diagonal scaled to one."""
    scale = hessian.diagonal().sqrt()
    unit, shift = hessian / scale[:, None] / scale, 0.0
    while True:
        factor, failed = torch.linalg.cholesky_ex(unit + shift * torch.eye(len(unit)).to(unit))
        if not int(failed):
            return scale[:, None] * factor
        shift = max(1e-15, 10 * shift)
