"""The primal-dual interior-point method for small dense quadratic programs, in batches."""

from __future__ import annotations

import torch
from torch import Tensor

STAY_INSIDE = 0.995  # of the way to the boundary
REGULAR = 1e-13  # added where constraints or objective leave a direction open


@torch.no_grad()
def interior_point(
    Q: Tensor, q: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor, max_iterations: int, goal: float = 1e-12
) -> Tensor:
    """(x, l, nu) (batch, n + m + p) near the solution of min 1/2 x'Q x + q'x with G x + s = h, s >= 0, A x = b.

    Predictor and corrector steps on the conditions with l_i s_i = mu, mu to 0; rows that have reached `goal` (the
    largest violation, or mu, relative to 1 + |x|) stay as they are. The last iterate is returned wherever it stands:
    the caller measures it.
    Sources: Mehrotra, On the implementation of a primal-dual interior point method, 1992; Colombo and Gondzio, Further
    development of multiple centrality correctors, 2008 (the weight of the correction).
    """
    count, n, m, p = len(q), q.shape[1], h.shape[1], b.shape[1]
    corner = torch.diag_embed(q.new_full((count, p), -REGULAR))
    identity = torch.eye(n, dtype=q.dtype, device=q.device)

    def newton(weight: Tensor, right: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
        """(dx, dnu) of the system in which slacks and multipliers of the inequalities are eliminated."""
        top = Q + G.mT @ (weight[:, :, None] * G) + REGULAR * identity
        matrix = torch.cat([torch.cat([top, A.mT], 2), torch.cat([A, corner], 2)], 1)
        found = torch.linalg.solve_ex(matrix, torch.cat([right, below], 1)[:, :, None]).result[:, :, 0]
        return found[:, :n], found[:, n:]

    x, nu = newton(torch.ones_like(h), -q + _times(G.mT, h), b)
    if not m:
        return torch.cat([x, nu], 1)
    slack = h - _times(G, x)
    multiplier = -slack
    slack, multiplier = (t + (1 - t.amin(1, keepdim=True)).clamp(min=0) for t in (slack, multiplier))
    for _ in range(max_iterations):
        dual = _times(Q, x) + q + _times(G.mT, multiplier) + _times(A.mT, nu)
        primal, equal = _times(G, x) + slack - h, _times(A, x) - b
        mu = (slack * multiplier).mean(1, keepdim=True)
        size = 1 + x.abs().amax(1)
        worst = torch.cat([dual, primal, equal, mu], 1).abs().amax(1)
        going = (worst > goal * size) & (mu[:, 0] > 0.01 * goal * size)  # beyond, rounding grows
        if not bool(going.any()):
            break

        def step(product: Tensor, slack=slack, multiplier=multiplier, dual=dual, primal=primal, equal=equal):
            """The Newton step to l s = l s - product."""
            right = -dual - _times(G.mT, (multiplier * primal - product) / slack)
            dx, dnu = newton(multiplier / slack, right, -equal)
            ds = -primal - _times(G, dx)
            return dx, dnu, ds, -(product + multiplier * ds) / slack

        _, _, ds, dl = step(slack * multiplier)
        length = _longest(slack, ds, multiplier, dl)
        ahead = ((slack + length * ds) * (multiplier + length * dl)).mean(1, keepdim=True)
        centre = (ahead / mu).clamp(0, 1) ** 3
        # the correction is trusted as far as the predictor went: in full it can make the iteration cycle
        dx, dnu, ds, dl = step(slack * multiplier + length**2 * ds * dl - centre * mu)
        length = STAY_INSIDE * _longest(slack, ds, multiplier, dl)
        finite = torch.isfinite(torch.cat([dx, dnu, ds, dl], 1)).all(1)
        length = torch.where((going & finite)[:, None], length, 0)
        x, nu, slack, multiplier = (
            t + torch.where(finite[:, None], length * d, 0)
            for t, d in ((x, dx), (nu, dnu), (slack, ds), (multiplier, dl))
        )
    return torch.cat([x, multiplier, nu], 1)


def _longest(slack: Tensor, ds: Tensor, multiplier: Tensor, dl: Tensor) -> Tensor:
    """The largest step in [0, 1 / STAY_INSIDE] that keeps slacks and multipliers at least zero: (batch, 1)."""
    values, moves = torch.cat([slack, multiplier], 1), torch.cat([ds, dl], 1)
    limits = torch.where(moves < 0, -values / torch.where(moves < 0, moves, -1), torch.inf)
    return limits.amin(1, keepdim=True).clamp(max=1 / STAY_INSIDE)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[:, :, None])[:, :, 0]
