"""Proof of a bound from the multipliers of layers, by a Cholesky factorisation block by block. No solver takes part.

It is `verify.certified_gain` for matrices that are never formed as one. The factorisation is an ordinary Cholesky
factorisation in another order of summation, so that Rump's theorem holds for it; but an inner product has as many
terms as there are variables in the pattern, and blocks outside it are exact zeros, so that the error is far smaller
than that of a full matrix of the same size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from firmly.certificates.elimination import block_matrix, elimination_order, factorise, filled
from firmly.certificates.layers import EPS, Layers, Row, error
from firmly.linear.symbol import Symbol

EXCESSES = (0.0, *(10.0**k for k in range(-13, -1)))


def layered_gain(found: Layers, mu: Tensor, rho: float) -> float:
    """The smallest verified sqrt(rho), rounded up, from the given rho or up to one percent more; else infinite.

    The multipliers grow with rho, since M(rho, rho nu) >= 0 grows with rho also where the input is not seen.
    """
    if mu.numel() != found.multipliers or bool((mu < 0).any()) or not bool(mu.isfinite().all()):
        return math.inf
    if not 0 < rho < math.inf:
        return math.inf
    order = elimination_order(found)
    for excess in EXCESSES:
        if layers_hold(found, order, rho * (1 + excess), mu * (1 + excess)):
            return math.sqrt(rho * (1 + excess)) * (1 + 2 * EPS)
    return math.inf


def layers_hold(found: Layers, order: list[int], rho: float, mu: Tensor) -> bool:
    """Whether M(rho, mu) >= 0 is proved for the exact layers.

    With errors of the blocks of at most e_ij in norm, x^H E x <= sum_ij e_ij |x_i| |x_j| <= sum_i (sum_j e_ij) |x_i|^2,
    so that moving the diagonal of every variable down by sum_j e_ij pays for all of them.
    """
    M = block_matrix(found, mu, rho)
    scales = []
    for i in range(len(found.sizes)):
        diagonal = M[i, i].diagonal().real if (i, i) in M else mu.new_zeros(1)
        if not bool((diagonal > 0).all()) or not bool(diagonal.isfinite().all()):
            return False
        scales.append(torch.exp2(-torch.round(0.5 * torch.log2(diagonal))))  # powers of two: scaling is exact
    errors = block_errors(found, scales, rho, mu)
    traces = []
    for (i, j), block in M.items():
        M[i, j] = block * scales[i][:, None] * scales[j]
        if not bool(M[i, j].isfinite().all()):
            return False
    for i in range(len(found.sizes)):
        traces.append(float(M[i, i].diagonal().real.sum()))
    for i, near in enumerate(filled(found, order)):
        terms = found.sizes[i] + sum(found.sizes[j] for j in near)
        for j in near | {i}:
            other = terms + found.sizes[j]
            errors[i, j] += 8 * (other + 3) * EPS * math.sqrt(traces[i] * traces[j])
    shifts = 1.01 * errors.sum(1)
    if not bool(shifts.isfinite().all()):
        return False
    for i, shift in enumerate(shifts.tolist()):
        M[i, i] = M[i, i] - torch.diag(torch.full((found.sizes[i],), shift, dtype=torch.float64))
    return factorise(M, order) is not None


def block_errors(found: Layers, scales: list[Tensor], rho: float, mu: Tensor) -> Tensor:
    """Bounds of the norms of (computed - exact) blocks of M, scaled.

    `lost` is what the errors of the symbols cause, `sizes` the norms of all terms, of which rounding takes its part.
    """
    count = len(found.sizes)
    lost, sizes = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, count, dtype=torch.float64)

    def gram(row: Row, root: Tensor, factor: float) -> None:  # factor * B_j^H diag(root)^2 B_k for all j, k
        known = torch.zeros(count, dtype=torch.float64)
        wrong = torch.zeros(count, dtype=torch.float64)
        for j, block in row.items():
            known[j] = frobenius(block, root, scales[j])
            wrong[j] = root.max() * error(block) * scales[j].max()
        lost.add_(factor * (torch.outer(wrong, known + wrong) + torch.outer(known, wrong)))
        sizes.add_(factor * torch.outer(known, known))

    for k in range(found.inputs):
        sizes[k, k] += rho * scales[k].max() ** 2
    gram(found.output, torch.ones(1, dtype=torch.float64), 1.0)
    for i, T in enumerate(found.weights(mu)):
        v = found.inputs + i
        low, high = found.slopes[i]
        sizes[v, v] += (T * scales[v] ** 2).max()
        coupling = 0.5 * abs(low + high)
        for j, block in found.rows[i].items() if coupling else ():
            left = T * scales[v]
            wrong, size = left.max() * error(block) * scales[j].max(), frobenius(block, left, scales[j])
            for place in ((v, j), (j, v)):
                lost[place] += coupling * float(wrong)
                sizes[place] += coupling * size
        if low * high:
            gram(found.rows[i], T.sqrt(), abs(low * high))
    height = max(block.value.shape[1] for row in [*found.rows, found.output] for block in row.values())
    return lost + 8 * (height + len(found.rows) + 6) * EPS * sizes


def frobenius(block: Symbol, left: Tensor, right: Tensor) -> float:
    """|diag(left) B diag(right)|_F, B perhaps a multiple of the identity."""
    value = block.value[0]
    if value.numel() == 1:
        size = torch.linalg.vector_norm(left * right) if len(left) == len(right) else left.max() * right.norm()
        return float(value.abs() * size)
    return float(torch.linalg.vector_norm(left[:, None] * value.abs() * right))
