"""Newton's method for the multipliers of layers, where a matrix with a row for each of them can be factored.

With S = M(rho, mu) + O'O, the inequality M(rho, mu) >= 0 is S > 0 and R = O S^-1 O' <= I. The central path minimises

    rho / tau - log det(I - R) - eps (log det S + sum_s log mu_s),

a convex function, with tau decreasing. Only the few rows of the output have the full barrier. The rest, with eps << 1,
keeps the steps inside; the minimiser is at most tau (outputs + eps (variables + multipliers)) above the optimum.

All derivatives are entrywise products of Gram matrices. The constraint of a neuron is [e, z] C [e, z]' with its unit
vector e, its row z of what the layer sees and C = [[1, -(a+b)/2], [-(a+b)/2, ab]]. For two symmetric matrices P and Q,
tr(P A_s Q A_t) = sum_ij (C_s G)_ij (H C_t)_ij, with G and H the products of [e_s, z_s] and [e_t, z_t] through P and Q.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from firmly.certificates.elimination import Blocks, Factor, elimination_order, output_response, proof_margin
from firmly.certificates.layers import Layers
from firmly.linear.symbol import Symbol

EPSILON = 0.1  # share of the barrier that S and the multipliers have
REDUCTION = 20.0  # of tau
CENTRED = 0.5  # decrement below which tau is reduced
STEPS = 80
CEILING = 1e6  # times the start: a multiplier that nothing limits would grow for ever


class Grams(NamedTuple):
    """Products of all [e, z] with all [e, z] through a symmetric matrix; `zv[s, t]` belongs to z_s and e_t."""

    vv: Tensor
    zv: Tensor
    zz: Tensor


@dataclass
class Path:
    """The best point met, and whether the central path was followed to the tolerance."""

    rho: float
    nu: Tensor
    steps: int
    finished: bool


@dataclass
class Point:
    """(rho, mu) with S > 0 and R < I, and what its barrier and derivatives are made of."""

    y: Tensor  # (1 + multipliers,): rho and mu
    factor: Factor  # of S / rho
    Y: Blocks
    root: Tensor  # the Cholesky factor of I - R
    required: float  # the smallest rho for these mu / rho
    barrier: float


def follow_central_path(found: Layers, rho: float, nu: Tensor, tolerance: float, deadline: float) -> Path:
    """From multipliers mu = rho nu that are feasible for `rho` to within about `tolerance` of the optimum in rho."""
    problem = CentralPath(found)
    best = Path(rho, nu, 0, False)
    y = 1.1 * rho * torch.cat([nu.new_ones(1), nu])
    point, ceiling, share = problem.point(y), CEILING * y, 0.1
    while point is not None and best.steps < STEPS and time.monotonic() < deadline:
        tau = share * float(point.y[0]) / problem.parameter
        step = problem.newton_step(point, tau, ceiling)
        if step is None:
            break
        direction, decrement = step
        moved, length = problem.search(point, direction, decrement, tau)
        best.steps += 1
        if moved is None:
            best.finished = share <= tolerance and decrement < problem.parameter
            break
        point = moved
        if point.required < best.rho:
            best.rho, best.nu = point.required, point.y[1:] / point.y[0]
        if length >= 0.5 and decrement < CENTRED:
            if share <= tolerance:
                best.finished = True
                break
            share = max(share / REDUCTION, tolerance)
    return best


class CentralPath:
    """The barrier of one network, its derivatives, and steps along it; unknowns are scaled by their values."""

    def __init__(self, found: Layers):
        self.found = found
        self.order = elimination_order(found)
        self.margin = proof_margin(found, self.order)
        self.variables = sum(found.sizes)
        self.parameter = min(found.outputs, self.variables) + EPSILON * (self.variables + found.multipliers)
        self.owner = torch.cat([o + start for o, start in zip(found.owner, starts(found.counts))])
        entries = [found.sizes[found.inputs + i] for i in range(len(found.rows))]
        low, high = (torch.tensor(side, dtype=torch.float64) for side in zip(*found.slopes))
        repeats = torch.tensor(entries)
        self.half = torch.repeat_interleave(0.5 * (low + high), repeats)
        self.product = torch.repeat_interleave(low * high, repeats)
        self.separate = found.multipliers == len(self.owner)

    def point(self, y: Tensor) -> Point | None:
        if not bool((y > 0).all()) or not bool(y.isfinite().all()):
            return None
        rho = float(y[0])
        response = output_response(self.found, y[1:] / rho, self.order, self.margin)
        if response is None:
            return None
        R, factor, Y = response
        root, failed = torch.linalg.cholesky_ex(torch.eye(len(R), dtype=R.dtype) - R / rho)
        if int(failed):
            return None
        interior = self.variables * math.log(rho) + log_determinant(factor) + float(y[1:].log().sum())
        barrier = -2 * float(root.diagonal().log().sum()) - EPSILON * interior
        return Point(y, factor, Y, root, float(torch.linalg.eigvalsh(R)[-1]), barrier)

    def newton_step(self, point: Point, tau: float, ceiling: Tensor) -> tuple[Tensor, float] | None:
        """The step relative to the point, and its decrement -gradient . step."""
        gradient, hessian = self.derivatives(point)
        gradient[0] += point.y[0] / tau
        L, failed = torch.linalg.cholesky_ex(hessian)
        if int(failed):
            return None
        direction = -torch.cholesky_solve(gradient[:, None], L)[:, 0]
        direction = torch.where(point.y > ceiling, direction.clamp(max=0), direction)
        decrement = -float(gradient @ direction)
        return (direction, decrement) if 0 < decrement < math.inf else None

    def search(self, point: Point, direction: Tensor, decrement: float, tau: float) -> tuple[Point | None, float]:
        """Backtracking to a point with a part of the predicted decrease; None if there is none."""
        length = min(1.0, 3.0 / float(direction.abs().max()))
        value = float(point.y[0]) / tau + point.barrier
        while length > 1e-7:
            trial = self.point(point.y * (1 + length * direction))
            if trial is not None and float(trial.y[0]) / tau + trial.barrier <= value - 0.05 * length * decrement:
                return trial, length
            length /= 2
        return None, 0.0

    def derivatives(self, point: Point) -> tuple[Tensor, Tensor]:
        """Gradient and Hessian of the barrier in (rho, mu), scaled by (rho, mu).

        With P = S^-1 and T T' = S^-1 O' (I - R)^-1 O S^-1, the derivatives of -log det(I - R) are -tr(T' A_s T) and
        2 tr(T T' A_s P A_t) + tr(T T' A_s T T' A_t); those of -log det S are -tr(P A_s) and tr(P A_s P A_t).
        """
        rho, n = float(point.y[0]), sum(self.found.sizes[: self.found.inputs])
        X = point.factor.solve_adjoint(point.Y)
        T = torch.cat([X[i] for i in range(len(self.found.sizes))]) / rho
        T = torch.linalg.solve_triangular(point.root, T.mT, upper=False).mT
        P = inverse(point.factor) / rho
        ZP, ZT = self.seen(P), self.seen(T)
        inner = Grams(P[n:, n:], ZP[:, n:], self.seen(ZP.mT).mT)
        outer = Grams(T[n:] @ T[n:].mT, ZT @ T[n:].mT, ZT @ ZT.mT)
        both = Grams(*(EPSILON * a + 2 * b for a, b in zip(inner, outer)))
        entries = self.traces(inner, both)
        entries = 0.5 * (entries + entries.mT) + self.traces(outer, outer)

        Pd, ZPd, Td = P[n:, :n], ZP[:, :n], T[:n]  # seen from the inputs, whose coefficient is rho
        square = Td.mT @ Td
        coupling = EPSILON * self.contract(Pd, ZPd, Pd, ZPd) + self.contract(
            2 * Pd @ Td + T[n:] @ square, 2 * ZPd @ Td + ZT @ square, T[n:], ZT
        )
        Pdd = P[:n, :n]
        corner = EPSILON * (Pdd * Pdd).sum() + 2 * (Pdd @ Td * Td).sum() + (square * square).sum()

        slope = self.contract(T[n:], ZT, T[n:], ZT)
        slope = slope + EPSILON * (
            inner.vv.diagonal() - 2 * self.half * inner.zv.diagonal() + self.product * inner.zz.diagonal()
        )
        first = EPSILON * Pdd.diagonal().sum() + (Td * Td).sum()
        gradient = -torch.cat([first[None], self.collected(slope)]) * point.y
        gradient[1:] -= EPSILON
        hessian = torch.empty(len(point.y), len(point.y), dtype=P.dtype)
        hessian[0, 0] = corner
        hessian[0, 1:] = hessian[1:, 0] = self.collected(coupling)
        hessian[1:, 1:] = self.collected(self.collected(entries).mT)
        hessian *= point.y[:, None] * point.y
        hessian.diagonal()[1:] += EPSILON
        return gradient, hessian

    def seen(self, x: Tensor) -> Tensor:
        """z of all layers, for all variables x stacked."""
        parts = x.split(self.found.sizes)
        rows = []
        for i, row in enumerate(self.found.rows):
            zero = x.new_zeros(self.found.sizes[self.found.inputs + i], x.shape[1])
            rows.append(sum((image(block, parts[j]) for j, block in row.items()), zero))
        return torch.cat(rows)

    def contract(self, v: Tensor, z: Tensor, other_v: Tensor, other_z: Tensor) -> Tensor:
        """[v, z] C [v, z]' of every entry, summed over the columns."""
        mixed = (v * other_z + z * other_v).sum(1)
        return (v * other_v).sum(1) - self.half * mixed + self.product * (z * other_z).sum(1)

    def traces(self, G: Grams, H: Grams) -> Tensor:
        """tr(P A_s Q A_t) for all entries s and t."""
        c, q = self.half, self.product
        C, Q = c[:, None], q[:, None]
        total = (G.vv - C * G.zv) * (H.vv - c * H.zv.mT)
        total += (G.zv.mT - C * G.zz) * (q * H.zv.mT - c * H.vv)
        total += (Q * G.zv - C * G.vv) * (H.zv - c * H.zz)
        total += (Q * G.zz - C * G.zv.mT) * (q * H.zz - c * H.zv)
        return total

    def collected(self, entries: Tensor) -> Tensor:
        """Sums over the entries of every multiplier, along the first dimension."""
        if self.separate:
            return entries
        shape = (self.found.multipliers, *entries.shape[1:])
        return entries.new_zeros(shape).index_add(0, self.owner, entries)


def inverse(factor: Factor) -> Tensor:
    """M^-1 as one matrix, variables in ascending order, from an elimination in ascending or in descending order.

    With K = L_ji L_ii^-1, the columns of variable i in the rows of those eliminated after it are -M^-1 K, and its
    diagonal block is (L_ii L_ii')^-1 + K' M^-1 K (K. Takahashi, J. Fagan, M.-S. Chin, PICA 1973).
    """
    sizes = [len(factor.diagonal[i]) for i in range(len(factor.order))]
    first = starts([*sizes, 0])
    whole = factor.diagonal[0].new_empty(first[-1], first[-1])
    for i in reversed(factor.order):
        mine = slice(first[i], first[i + 1])
        later = slice(first[i]) if factor.order[0] > factor.order[-1] else slice(first[i + 1], None)
        identity = torch.eye(sizes[i], dtype=whole.dtype, device=whole.device)
        root = torch.linalg.solve_triangular(factor.diagonal[i], identity, upper=False)
        block = root.mT @ root
        columns = whole.new_zeros(whole[later].shape[0], sizes[i])
        couplings = [(slice(first[j], first[j + 1]), L @ root) for j, L in factor.below[i].items()]
        for other, K in couplings:
            columns -= whole[later, other] @ K
        whole[later, mine], whole[mine, later] = columns, columns.mT
        for other, K in couplings:
            block -= K.mT @ whole[other, mine]
        whole[mine, mine] = block
    return whole


def log_determinant(factor: Factor) -> float:
    return 2 * sum(float(L.diagonal().log().sum()) for L in factor.diagonal.values())


def starts(counts: list[int]) -> list[int]:
    return [sum(counts[:i]) for i in range(len(counts))]


def image(block: Symbol, x: Tensor) -> Tensor:
    """The block times x; a single number is that multiple of the identity."""
    return block.value[0, 0, 0] * x if block.value.numel() == 1 else block.value[0] @ x
