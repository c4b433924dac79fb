"""The matrix inequality of layers as a sparse matrix of blocks, and its Cholesky factorisation block by block.

    M(rho, mu) = rho |d|^2 - |output|^2 + sum_i sum_s mu_is (|v_is|^2 - (a_i + b_i) v_is z_is + a_i b_i |z_is|^2)

Eliminating variables in a good order creates few new blocks. For a chain there are none: with s = (a + b) / 2 and
slopes from 0, what is left of layer i is X_i = T_i - s^2 T_i W_i X_{i-1}^-1 W_i' T_i, and no matrix is larger than a
layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from firmly.certificates.layers import EPS, Layers, full

SMALLEST = 1e-200

BlockMatrix = dict[tuple[int, int], Tensor]  # (i, j) with i >= j: the block of rows i and columns j
Blocks = dict[int, Tensor]  # variable -> its rows


def block_matrix(found: Layers, mu: Tensor, rho: float | None = None) -> BlockMatrix:
    """M(rho, mu), or S(mu) = M(1, mu) without the output if rho is None."""
    M = identity_blocks(found, 1.0 if rho is None else rho)
    for i, T in enumerate(found.weights(mu)):
        add_constraint(M, found, i, T)
    for j, left in found.output.items() if rho is not None else ():
        for k, right in found.output.items():
            if k <= j:
                add(M, j, k, -full(left, found.outputs).value[0].mH @ full(right, found.outputs).value[0])
    return M


def identity_blocks(found: Layers, rho: float) -> BlockMatrix:
    """rho |d|^2."""
    return {(k, k): rho * torch.eye(found.sizes[k], dtype=torch.float64) for k in range(found.inputs)}


def add_constraint(M: BlockMatrix, found: Layers, i: int, T: Tensor) -> None:
    """Add sum_s T_s (|v_s|^2 - (a + b) v_s z_s + ab |z_s|^2) of nonlinearity i."""
    low, high = found.slopes[i]
    v = found.inputs + i
    add(M, v, v, torch.diag(T))
    for j, block in found.rows[i].items():
        weighted = T[:, None] * full(block, found.sizes[v]).value[0]
        if low + high:
            half = -0.5 * (low + high) * weighted
            add(M, v, j, half if j != v else half + half.mH)  # a loop sees its own output
        if low * high:
            for k, other in found.rows[i].items():
                if k <= j:
                    add(M, j, k, low * high * weighted.mH @ full(other, found.sizes[v]).value[0])


def add(M: BlockMatrix, i: int, j: int, block: Tensor) -> None:
    M[i, j] = M[i, j] + block if (i, j) in M else block


@dataclass
class Factor:
    """M = L L^H with L in blocks: `diagonal[i]` and `below[i]` = {j: L_ji} for variables j eliminated after i."""

    order: list[int]
    diagonal: dict[int, Tensor]
    below: dict[int, dict[int, Tensor]]

    def solve(self, B: Blocks) -> Blocks:
        """L^-1 B, for a right side given by its nonzero blocks."""
        B, Y = dict(B), {}
        for i in self.order:
            if i in B:
                Y[i] = torch.linalg.solve_triangular(self.diagonal[i], B.pop(i), upper=False)
                for j, L in self.below[i].items():
                    B[j] = B[j] - L @ Y[i] if j in B else -L @ Y[i]
        return Y

    def solve_adjoint(self, Y: Blocks) -> Blocks:
        """L^-H Y, all blocks."""
        X: Blocks = {}
        width = next(iter(Y.values())).shape[1]
        for i in reversed(self.order):
            right = Y[i] if i in Y else self.diagonal[i].new_zeros(len(self.diagonal[i]), width)
            for j, L in self.below[i].items():
                right = right - L.mH @ X[j]
            X[i] = torch.linalg.solve_triangular(self.diagonal[i].mH, right, upper=True)
        return X


def factorise(M: BlockMatrix, order: Sequence[int]) -> Factor | None:
    """The Cholesky factor, or None if M is not (numerically) positive definite.

    M is used up: what is left in it is the Schur complement on the variables that `order` leaves out.
    """
    factor = Factor(list(order), {}, {})
    for i in order:
        L, failed = torch.linalg.cholesky_ex(M.pop((i, i)))
        if int(failed):
            return None
        below: dict[int, Tensor] = {}
        for j, k in [place for place in M if i in place]:
            block = M.pop((j, k)) if k == i else M.pop((j, k)).mH
            below[j if k == i else k] = torch.linalg.solve_triangular(L.mH, block, upper=True, left=False)
        for j, left in below.items():
            for k, right in below.items():
                if k <= j:
                    add(M, j, k, -left @ right.mH)
        factor.diagonal[i], factor.below[i] = L, below
    return factor


def output_response(
    found: Layers, nu: Tensor, order: Sequence[int], margin: float
) -> tuple[Tensor, Factor, Blocks] | None:
    """R = O S^-1 O' = Y' Y with Y = L^-1 O', and L; None where S is not positive definite.

    S is S(nu) less `margin` times |d|^2 + sum_is nu_is |v_is|^2. Then M(rho, rho nu) >= 0 holds for rho >=
    lambda_max(R) with room for the errors of a proof.
    """
    M = block_matrix(found, nu)
    for i, T in enumerate([*(torch.ones(n, dtype=nu.dtype) for n in found.sizes[: found.inputs]), *found.weights(nu)]):
        M[i, i] = M[i, i] - torch.diag(margin * T)
    factor = factorise(M, order)
    if factor is None:
        return None
    Y = factor.solve({j: full(block, found.outputs).value[0].mH for j, block in found.output.items()})
    R = torch.stack([y.mH @ y for y in Y.values()]).sum(0)
    return (R, factor, Y) if bool(R.isfinite().all()) else None


def required_rho(found: Layers, nu: Tensor, order: Sequence[int]) -> float:
    """The smallest rho with M(rho, rho nu) >= 0 and room for a proof; infinite if there is none.

    At least `SMALLEST`: with rho = 0, for a network of zeros, all multipliers would vanish.
    """
    response = output_response(found, nu, order, proof_margin(found, order))
    return math.inf if response is None else max(float(torch.linalg.eigvalsh(response[0])[-1]), SMALLEST)


def proof_margin(found: Layers, order: Sequence[int]) -> float:
    """Above the relative errors that the proof of a factorisation in this order pays for."""
    width = max(found.sizes[i] + sum(found.sizes[j] for j in near) for i, near in enumerate(filled(found, order)))
    return 1e-10 + 100 * EPS * width**2


def elimination_order(found: Layers) -> list[int]:
    """From the inputs to the last layer, or the other way round: whichever takes fewer operations."""
    forward = list(range(len(found.sizes)))
    return min(forward, forward[::-1], key=lambda order: elimination_cost(found, order))


def elimination_cost(found: Layers, order: Sequence[int]) -> int:
    near, place = filled(found, order), {variable: p for p, variable in enumerate(order)}
    cost = 0
    for i in order:
        border = sum(found.sizes[j] for j in near[i] if place[j] > place[i])
        cost += found.sizes[i] * (found.sizes[i] + border) ** 2
    return cost


def filled(found: Layers, order: Sequence[int]) -> list[set[int]]:
    """The other variables that share a block of L with every variable."""
    neighbours = [near - {i} for i, near in enumerate(pattern(found))]
    left = set(order)
    for i in order:
        left.discard(i)
        near = neighbours[i] & left
        for j in near:
            neighbours[j] |= near - {j}
    return neighbours


def pattern(found: Layers) -> list[set[int]]:
    """The variables that share a block of M with every variable, itself included."""
    neighbours = [{i} for i in range(len(found.sizes))]
    cliques = [set(found.output)]
    for i, row in enumerate(found.rows):
        low, high = found.slopes[i]
        v = found.inputs + i
        if low + high:
            for j in row:
                neighbours[v].add(j)
                neighbours[j].add(v)
        if low * high:
            cliques.append(set(row))
    for clique in cliques:
        for j in clique:
            neighbours[j] |= clique
    return neighbours
