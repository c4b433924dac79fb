"""Minimise rho over the multipliers of a pencil: Newton's method on a smoothed maximum, on a growing working set.

After elimination of v, a block asks for rho >= lambda_max(R_f(mu)) with R_f = C + G^H S^-1 G, a convex function of
mu. So the problem is to minimise the largest eigenvalue over thousands of blocks in a handful of unknowns. It is
smoothed by (1/beta) log sum_f tr exp(beta R_f), whose Newton steps are cheap, with beta increasing; a vanishing
multiple of -log det S_f keeps the steps inside the domain, where blocks that the input hardly reaches would stop
them. Few blocks are ever near the maximum: the minimisation sees a working set, and the worst violators among all
blocks join it. The best mu that is feasible for *all* blocks is kept throughout, and is the result whenever the loop
ends.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from firmly.certificates.pencil import Pencil

SMALLEST = 1e-200
"""Of the multipliers for an output of zeros, so that they prove a bound that is almost zero."""


@dataclass
class SpectralResult:
    """`rho` is feasible for all blocks with multipliers `mu`; `relaxed` estimates the optimum from below.

    `interior` is feasible with a larger rho and room on all sides: a little of it makes a proof of mu easier.
    """

    rho: float
    relaxed: float
    mu: Tensor
    interior: Tensor
    rounds: int
    cuts: int


def minimise_rho(
    pencil: Pencil, tolerance: float = 1e-4, budget_s: float = 60.0, start: Tensor | None = None
) -> SpectralResult:
    """The smallest certified rho = (Lipschitz bound)^2, to a relative tolerance or until the time budget is spent."""
    if pencil.multipliers == 0:  # a linear network
        mu = torch.zeros(0, dtype=torch.float64)
        rho = float(pencil.required(mu).max())
        return SpectralResult(rho, rho, mu, mu, 0, 0)
    size = float(pencil.O.detach().abs().max())
    if size == 0:  # the output does not move, and every rho > 0 will do
        mu = SMALLEST * causal_multipliers(pencil)
        return SpectralResult(float(pencil.required(mu).detach().max()), 0.0, mu, mu, 0, 0)
    deadline = time.monotonic() + budget_s
    if start is None and pencil.layer is not None:  # few unknowns first: many are slow to come from far away
        start = minimise_rho(pencil.shared(), max(tolerance, 1e-2), budget_s / 4).mu[pencil.layer]
    mu = causal_multipliers(pencil) if start is None else start
    values = pencil.required(mu)
    if not bool(values.isfinite().all()) and start is not None:
        mu = causal_multipliers(pencil)
        values = pencil.required(mu)
    rho = float(values.detach().max())
    if not 0 < rho < math.inf:  # nothing to improve, or nothing to start from
        return SpectralResult(rho, 0.0, mu, mu, 0, 0)
    working = torch.unique(torch.cat([spread(len(pencil), 64), worst(values, 64)]))
    interior, _ = smoothed_newton(pencil.select(working), mu, 0.3, deadline)
    if not bool(pencil.required(interior).isfinite().all()):
        interior = mu
    relaxed, rounds = 0.0, 0
    while time.monotonic() < deadline:
        rounds += 1
        trial, relaxed_here = smoothed_newton(pencil.select(working), mu, 0.3 * tolerance, deadline)
        relaxed = max(relaxed, relaxed_here)
        for share in (1.0, 0.7, 0.3, 0.1):  # the incumbent is feasible everywhere, the trial on the working set
            mixed = mu + share * (trial - mu)
            trial_values = pencil.required(mixed)
            if share == 1.0:
                values = trial_values
            if float(trial_values.max()) < rho:
                rho, mu = float(trial_values.max()), mixed
                break
        if rho - relaxed <= tolerance * rho:
            break
        larger = torch.unique(torch.cat([working, worst(values, 32)]))
        if len(larger) == len(working):
            break
        working = larger
    return SpectralResult(rho, relaxed, mu, interior, rounds, len(working))


def causal_multipliers(pencil: Pencil) -> Tensor:
    """Multipliers that are feasible for some rho, whatever the blocks: chosen from the last nonlinearity to the first.

    Eliminating the later v leaves a form with -|C^(1/2) v_j|^2 on v_j, so that mu_j > lambda_max(C) makes it definite.
    What then remains on z_j is at most mu^2 s^2 / (mu - C) - mu a b for slopes of centre s and radius r, smallest at
    mu = (1 + |s| / r) C; for slopes in [0, 1] and one block this is the closed form of ECLipsE-Fast (Xu and
    Sivaranjani, 2024). Careful growth matters: a start that is worse by a factor per layer stalls the search.
    """
    if pencil.layer is not None:
        return causal_multipliers(pencil.shared())[pencil.layer]
    M = -(pencil.O.mH @ pencil.O).detach()
    left = torch.ones(pencil.width, dtype=torch.bool)  # the columns that are not eliminated yet; M is on them
    floor = 1e-9 * (float(M.abs().amax()) or 1.0)
    mu = torch.zeros(pencil.multipliers, dtype=torch.float64)
    for j in range(pencil.multipliers - 1, -1, -1):
        mine = (pencil.owner == j).nonzero().squeeze(1)
        low, high = float(pencil.low[mine[0]]), float(pencil.high[mine[0]])
        centre, radius = 0.5 * (low + high), 0.5 * (high - low)
        columns = pencil.column[mine][pencil.column[mine] < pencil.width]
        place = (left.cumsum(0) - 1)[columns]
        N = constraint(pencil, mine)[:, left][:, :, left]
        own = N[:, place[:, None], place]  # the identity where there is no loop
        need = floor
        if len(place):
            stiffness = torch.linalg.eigvalsh(own)[:, 0].clamp(min=1e-12)
            need = max(float((torch.linalg.eigvalsh(-M[:, place[:, None], place])[:, -1] / stiffness).max()), floor)
        mu[j] = need * max(1.5, 1 + abs(centre) / max(radius, 0.1 * abs(centre), 1e-300))
        M = M + mu[j] * N
        others = torch.ones(M.shape[1], dtype=torch.bool)
        others[place] = False
        left[columns] = False
        coupling = M[:, place][:, :, others]
        rest = M[:, others][:, :, others]
        M = rest - coupling.mH @ torch.linalg.solve(M[:, place[:, None], place], coupling)
    return mu


def constraint(pencil: Pencil, entries: Tensor) -> Tensor:
    """sum_e |v|^2 - (a + b) Re <v, z> + a b |z|^2 of some entries with unit multipliers, (blocks, width, width)."""
    chosen = replace(
        pencil,
        O=torch.zeros_like(pencil.O[:, :1]),
        column=pencil.column[entries],
        row=pencil.row[entries],
        owner=torch.zeros_like(pencil.owner[entries]),
        low=pencil.low[entries],
        high=pencil.high[entries],
        multipliers=1,
    )
    return chosen.matrix(0.0, torch.ones(1, dtype=torch.float64)).detach()


def smoothed_newton(pencil: Pencil, mu: Tensor, tolerance: float, deadline: float) -> tuple[Tensor, float]:
    """Minimise max_f lambda_max(R_f(mu)) on the working set; returns mu and a lower estimate of the minimum."""
    count = math.log(len(pencil) * pencil.inputs + 1)
    top = float(pencil.required(mu).max())
    beta, relaxed = 4 * count / top, 0.0
    value, ceiling = top, 1e6 * mu
    while True:
        barrier = max(count / (beta * len(pencil) * (pencil.width - pencil.inputs)), 0.05 * tolerance * value)
        for _ in range(50):
            value, mean, gradient, hessian = smoothed_maximum(pencil, mu, beta, barrier)
            scaled = hessian * mu[:, None] * mu  # unknowns log-scaled, so that regularisation is relative
            scaled.diagonal().add_(1e-12 * scaled.diagonal().max())
            step, singular = torch.linalg.solve_ex(scaled, mu * gradient)
            if bool(singular) or not bool(step.isfinite().all()):  # no multiplier matters on these blocks
                return mu, relaxed
            direction = -mu * step
            # a multiplier that no block limits (of a unit whose input never moves) would grow for ever
            direction = torch.where(mu > ceiling, direction.clamp(max=0), direction)
            decrement = float(-gradient @ direction)
            length = step_length(pencil, mu, direction, beta, barrier, value, decrement)
            mu = mu + length * direction
            if decrement < 0.01 * count / beta or length == 0 or time.monotonic() > deadline:
                break
        relaxed = max(relaxed, mean - 2 * count / beta)
        if 2 * count / beta <= tolerance * abs(mean) or time.monotonic() > deadline:
            return mu, relaxed
        beta *= 6


def step_length(
    pencil: Pencil, mu: Tensor, direction: Tensor, beta: float, barrier: float, value: float, decrement: float
) -> float:
    """Backtracking to a feasible point with a tenth of the predicted decrease; 0 if there is none."""
    length = 1.0
    while length > 1e-9 and decrement > 0:
        candidate = mu + length * direction
        if float(candidate.min()) > 0 and (
            smoothed_value(pencil, candidate, beta, barrier) <= value - 0.1 * length * decrement
        ):
            return length
        length /= 2
    return 0.0


def smoothed_value(pencil: Pencil, mu: Tensor, beta: float, barrier: float) -> float:
    R, L, _, failed = pencil.eliminated(mu)
    if bool(failed.any()):
        return math.inf
    eigenvalues = R[:, :, 0].real if R.shape[1] == 1 else torch.linalg.eigvalsh(R)
    return float(torch.logsumexp(beta * eigenvalues.flatten(), 0) / beta - barrier * logdet(L))


def logdet(L: Tensor) -> Tensor:
    return 2 * L.diagonal(dim1=1, dim2=2).real.log().sum()


def smoothed_maximum(pencil: Pencil, mu: Tensor, beta: float, barrier: float) -> tuple[float, float, Tensor, Tensor]:
    """Value, weighted mean of the R_f, gradient and Hessian of (1/beta) log sum_f tr exp(beta R_f) - barrier log det
    S_f.

    With X = [I; -S^-1 G] one has R = -X^H M(0, mu) X, dR_j = -X^H A_j X and d2R_jl = 2 sym (A_j X)_v^H S^-1 (A_l X)_v.
    Every A_j is a sum over its entries of terms of rank two, [e_v, z^H] [[1, -(a+b)/2], [-(a+b)/2, ab]] [e_v, z^H]^H,
    so all products reduce to Gram matrices and entrywise products.
    """
    R, L, Y, _ = pencil.eliminated(mu)
    n = pencil.inputs
    eigenvalues, U = torch.linalg.eigh(R)
    logarithm = torch.logsumexp(beta * eigenvalues.flatten(), 0)
    weight = torch.exp(beta * eigenvalues - logarithm)  # (blocks, n): eigenvalues of the density matrices

    identity = torch.eye(n, dtype=R.dtype).expand(len(R), n, n)
    X = torch.cat([identity, -torch.linalg.solve_triangular(L.mH, Y, upper=True)], dim=1) @ U
    X = torch.cat([X, X.new_zeros(len(X), 1, n)], dim=1)
    v = X[:, pencil.column]  # (blocks, entries, n)
    z = (pencil.Z @ X[:, :-1])[:, pencil.row]
    half, product = (0.5 * (pencil.low + pencil.high))[:, None], (pencil.low * pencil.high)[:, None]
    along_v, along_z = v - half * z, product * z - half * v  # A_e X = e_v along_v + conj(z-row) along_z

    first = -(v.conj() * along_v + z.conj() * along_z).real  # diagonal of U^H dR_e U: (blocks, entries, n)
    slope = torch.einsum("ben,bn->e", first, weight)

    columns = torch.cat([torch.eye(pencil.width, dtype=R.dtype)[n:], R.new_zeros(pencil.width - n, 1)], dim=1)
    sides = torch.cat([columns[:, pencil.column].expand(len(R), -1, -1), pencil.Z[:, pencil.row, n:].mH], dim=2)
    sides = torch.linalg.solve_triangular(L, sides, upper=False)  # L^-1 of both sides of every entry
    gram = sides.mH @ sides
    strength = torch.cat([along_v, along_z], dim=1)  # (blocks, 2 entries, n)
    second = 2 * (gram * ((strength.conj() * weight[:, None, :]) @ strength.mT)).real.sum(0)
    entries = len(pencil.column)
    near, far = gram[:, :entries], gram[:, entries:]
    inner = torch.cat([near - half * far, product * far - half * near], dim=1)  # S^-1 A_e, seen from the sides
    pull = inner.diagonal(dim1=1, dim2=2).real.sum(0).reshape(2, entries).sum(0)
    second = second + barrier * (inner * inner.mT).real.sum(0)
    entry_hessian = second.reshape(2, entries, 2, entries).sum((0, 2))

    if n == 1:
        flat = first[:, :, 0]
        spread_term = beta * (flat.T * weight[:, 0]) @ flat
    else:
        dR = -(torch.einsum("bek,bel->bekl", v.conj(), along_v) + torch.einsum("bek,bel->bekl", z.conj(), along_z))
        difference = eigenvalues[:, :, None] - eigenvalues[:, None, :]
        divided = torch.where(
            (beta * difference).abs() < 1e-6,
            beta * 0.5 * (weight[:, :, None] + weight[:, None, :]),
            (weight[:, :, None] - weight[:, None, :]) / torch.where(difference == 0, 1.0, difference),
        )
        spread_term = torch.einsum("bekl,bfkl->ef", (dR * divided[:, None]), dR.conj()).real
    collect = torch.zeros(pencil.multipliers, entries, dtype=torch.float64)
    collect[pencil.owner, torch.arange(entries)] = 1.0
    mean_slope = collect @ slope
    gradient = mean_slope - barrier * (collect @ pull)
    hessian = collect @ (entry_hessian + spread_term) @ collect.T - beta * mean_slope[:, None] * mean_slope
    value = float(logarithm / beta - barrier * logdet(L))
    return value, float((weight * eigenvalues).sum()), gradient, hessian


def worst(values: Tensor, count: int) -> Tensor:
    return values.topk(min(count, len(values))).indices


def spread(size: int, count: int) -> Tensor:
    return torch.linspace(0, size - 1, min(count, size)).long()
