"""ECLipsE-Fast: multipliers in closed form, one per layer, by one pass over the layers.

Forwards (Y. Xu, S. Sivaranjani, ECLipsE, NeurIPS 2024, for chains with slopes in [0, 1]): let all values so far cost
at least `x' S x` of |d|^2. What layer i sees, z = Z x, then costs at least z' Q^-1 z with Q = Z S^-1 Z'. With the
constraint of its nonlinearity, slopes in [a, b], s = (a+b)/2, r = (b-a)/2, times t, the least cost of its output v is
v' X v with X = t - s^2 t^2 Q (I + ab t Q)^-1, which at the largest eigenvalue q of Q is largest for t = 1 / (q r (|s| +
r)), where it is 1 / (q max(|a|, |b|)^2). For [0, 1] that is t = 2/q and X = t - t^2 Q / 4.

Backwards (derived): let the output be at most v' K v, with largest eigenvalue k. With the constraint times t, it is at
most z' (s^2 t^2 (t - K)^-1 - ab t) z, which increases with K and at K = k is least for t = k (1 + |s|/r), where it is
max(|a|, |b|)^2 k |z|^2. So by induction the bound is at most the product of norms and slopes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from firmly.certificates.elimination import (
    add_constraint,
    elimination_order,
    factorise,
    identity_blocks,
    required_rho,
)
from firmly.certificates.layers import Layers, full

MARGIN = 1e-4
UNSEEN = 1e100  # for a layer that the input does not reach


def eclipse_multipliers(found: Layers) -> tuple[float, Tensor]:
    """(rho, nu) with M(rho, rho nu) >= 0 up to rounding: the better of both passes and of their mean."""
    order = elimination_order(found)
    rho, nu = forward_multipliers(found)
    if is_chain(found):
        backward = backward_multipliers(found)
        best = min(((required_rho(found, c, order), c) for c in (backward, 0.5 * (nu + backward))), key=lambda c: c[0])
        if best[0] <= rho:
            return best
    return required_rho(found, nu, order), nu


def is_chain(found: Layers) -> bool:
    """Whether every layer sees the one before it and nothing else."""
    return found.inputs == 1 and all(set(row) == {i} for i, row in enumerate([*found.rows, found.output]))


def centre_and_radius(slopes: tuple[float, float]) -> tuple[float, float]:
    """|s| and r, neither much smaller than the other: at zero the formulas for t have limits on the edge of what is
    feasible."""
    centre, radius = abs(slopes[0] + slopes[1]) / 2, (slopes[1] - slopes[0]) / 2
    size = max(centre, radius) or 1.0
    return max(centre, MARGIN * size), max(radius, MARGIN * size)


def forward_multipliers(found: Layers) -> tuple[float, Tensor]:
    """rho and one factor per layer, for any connections: S is kept factored over the variables that later layers see.

    The factor of a loop is that of its outer view, slopes [0, h] of what enters it, over b / h: with slopes [0, b]
    inside, its own constraint is then at least as strong (docs/theory/loops).
    """
    last_use = {j: i for i, row in enumerate([*found.rows, found.output]) for j in row}
    M, alive, nu, rho = identity_blocks(found, 1.0), list(range(found.inputs)), [], math.inf
    for i, row in enumerate([*found.rows, found.output]):
        v = found.inputs + i
        factor = factorise(dict(M), alive)
        if factor is None:
            break
        Q, q = None, 0.0
        size = found.outputs if row is found.output else found.sizes[v]
        seen = {j: full(block, size).value[0].mH for j, block in row.items() if j != v}
        if seen:
            Y = factor.solve(seen)
            Q = torch.stack([y.mH @ y for y in Y.values()]).sum(0)
            q = float(torch.linalg.eigvalsh(Q)[-1])
        if row is found.output:
            rho = q
            break
        s, r = centre_and_radius(found.outer[i])
        t = (1 - MARGIN**2) / (q * r * (s + r)) if q > 0 else UNSEEN
        if found.has_loop(i):
            t *= found.outer[i][1] / found.slopes[i][1]
        nu.append(torch.full((found.counts[i],), t, dtype=torch.float64))
        done = [j for j in alive if last_use.get(j, -1) <= i]
        if Q is not None and done == alive and not found.has_loop(i):
            M = {(v, v): constrained(Q, t, found.slopes[i])}
        else:
            add_constraint(M, found, i, torch.full((found.sizes[v],), t, dtype=torch.float64))
            if done and factorise(M, done) is None:
                break
        alive = [*(j for j in alive if j not in done), v]
    missing = found.counts[len(nu) :]
    return rho, torch.cat([*nu, torch.ones(sum(missing), dtype=torch.float64)])


def constrained(Q: Tensor, t: float, slopes: tuple[float, float]) -> Tensor:
    """X = t - s^2 t^2 Q (I + ab t Q)^-1, what v costs at least."""
    identity = torch.eye(len(Q), dtype=Q.dtype)
    if slopes[0] * slopes[1]:
        Q = torch.linalg.solve(identity + slopes[0] * slopes[1] * t * Q, Q)
        Q = 0.5 * (Q + Q.mH)
    return t * identity - (0.5 * (slopes[0] + slopes[1]) * t) ** 2 * Q


def backward_multipliers(found: Layers) -> Tensor:
    """One factor per layer of a chain, from the last to the first."""
    O = full(found.output[len(found.rows)], found.outputs).value[0]
    K, mu = O.mH @ O, []
    for i in reversed(range(len(found.rows))):
        s, r = centre_and_radius(found.slopes[i])
        k = max(float(torch.linalg.eigvalsh(K)[-1]), 0.0) or 1.0
        t = k * (1 + s / r)
        mu.append(torch.full((found.counts[i],), t, dtype=torch.float64))
        low, high = found.slopes[i]
        Z = full(found.rows[i][i], found.sizes[i + 1]).value[0]
        L = torch.linalg.cholesky(t * torch.eye(len(K), dtype=K.dtype) - K)
        half = torch.linalg.solve_triangular(L, 0.5 * (low + high) * t * Z, upper=False)
        K = half.mH @ half
        if low * high:
            K = K - low * high * t * Z.mH @ Z
    rho = float(torch.linalg.eigvalsh(K)[-1])
    return torch.cat(mu[::-1] or [torch.zeros(0, dtype=torch.float64)]) / (rho if rho > 0 else 1.0) * (1 - MARGIN)
