"""The multipliers of layers by a conic solver (Clarabel), to its full accuracy: slow, and for small networks only.

    minimise rho  subject to  M(rho, mu) >= 0,  mu >= 0

is handed over as one sparse cone. Clarabel splits it into those of the cliques of its pattern (chordal decomposition),
so that no cone of a chain is wider than two layers. Rows and columns of M and the unknowns are scaled by the
multipliers of ECLipsE-Fast, without which Clarabel gives up after some ten layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from firmly.certificates.eclipse import eclipse_multipliers
from firmly.certificates.elimination import elimination_order, filled, required_rho
from firmly.certificates.layered_newton import starts
from firmly.certificates.layers import Layers, full
from firmly.certificates.lipsdp import LayeredResult
from firmly.errors import NotCertifiable

WIDEST = 80  # variables of a clique: Clarabel factors matrices with the square of half its square entries
GAP = 1e-9
SHARES = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1)  # of an interior point: optima on the boundary are not proved


def conic_multipliers(found: Layers, budget_s: float = 60.0) -> LayeredResult:
    """The optimal multipliers, moved inside as little as a proof needs, and Clarabel's iterations as evaluations.

    Raises `NotCertifiable` where the cliques are wider than `WIDEST` variables, or if Clarabel finds nothing.
    """
    order = elimination_order(found)
    widest = max(found.sizes[i] + sum(found.sizes[j] for j in near) for i, near in enumerate(filled(found, order)))
    if widest > WIDEST:
        raise NotCertifiable(
            f"Clarabel takes layers that see at most {WIDEST} variables together, given {widest}: "
            "use solver='layered', which has no such limit"
        )
    scale, start = eclipse_multipliers(found)
    if not 0 < scale < math.inf or found.multipliers == 0:
        return LayeredResult(scale, scale * start, 0)
    unknowns, iterations = solved(found, start, scale, budget_s)
    if not unknowns[0] > 0 or not bool((unknowns >= 0).all()):
        raise NotCertifiable("Clarabel found no multipliers for this network: use solver='layered'")
    nu = start * unknowns[1:] / unknowns[0]
    trials = [(1 - share) * nu + share * start for share in SHARES]
    rho, nu = min(((required_rho(found, trial, order), trial) for trial in trials), key=lambda pair: pair[0])
    return LayeredResult(rho, rho * nu, iterations)


def solved(found: Layers, start: Tensor, scale: float, budget_s: float) -> tuple[Tensor, int]:
    """rho / scale and mu / (scale start), and the iterations."""
    import clarabel
    from scipy import sparse

    width, count = sum(found.sizes), found.multipliers + 1
    rows = width * (width + 1) // 2
    p, q, unknown, value = quadratic_form(found, start, scale)
    place, value = torch.maximum(p, q) * (torch.maximum(p, q) + 1) // 2 + torch.minimum(p, q), value.clone()
    value[p != q] *= math.sqrt(0.5)  # half of it on either side of the diagonal, and Clarabel's factor sqrt(2)
    columns = sparse.csc_matrix((value.numpy(), (place.numpy(), unknown.numpy())), (rows, count + 1))
    A = -sparse.vstack([columns[:, :count], sparse.identity(count)])
    b = sparse.vstack([columns[:, count], sparse.csc_matrix((count, 1))]).toarray().ravel()
    settings = clarabel.DefaultSettings()
    settings.verbose, settings.time_limit = False, budget_s
    settings.chordal_decomposition_enable = True
    settings.tol_gap_rel = settings.tol_gap_abs = settings.tol_feas = GAP
    cones = [clarabel.PSDTriangleConeT(width), clarabel.NonnegativeConeT(count)]
    objective, none = torch.eye(count, dtype=value.dtype)[0].numpy(), sparse.csc_matrix((count, count))
    solution = clarabel.DefaultSolver(none, objective, sparse.csc_matrix(A), b, cones, settings).solve()
    return torch.tensor(solution.x, dtype=torch.float64), int(solution.iterations)


def quadratic_form(found: Layers, start: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x' M x as terms: two entries of x, the unknown (rho is 0, the last stands for 1) and the coefficient, scaled."""
    first = starts(found.sizes)
    weights = found.weights(start)
    root = torch.cat([*(start.new_ones(n) for n in found.sizes[: found.inputs]), *weights]).rsqrt()
    terms: list[Tensor] = []

    def add(i: int, j: int, unknown: Tensor, coefficients: Tensor) -> None:
        """Coefficients (unknowns, entries of variable i, entries of variable j)."""
        s, p, q = coefficients.nonzero().T
        value = coefficients[s, p, q] * root[p + first[i]] * root[q + first[j]]
        terms.append(torch.stack([p + first[i], q + first[j], unknown[s], value]))

    for k in range(found.inputs):
        add(k, k, torch.tensor([0]), torch.eye(found.sizes[k], dtype=start.dtype)[None])
    seen = {j: full(block, found.outputs).value[0] for j, block in found.output.items()}
    for j, left in seen.items():
        for k, right in seen.items():
            add(j, k, torch.tensor([found.multipliers + 1]), -(left.mT @ right)[None] / scale)
    for i, (row, (low, high), T) in enumerate(zip(found.rows, found.slopes, weights)):
        v, unknown = found.inputs + i, found.owner[i] + 1 + sum(found.counts[:i])
        own = torch.diag_embed(torch.diag(T))  # a term of its own for every entry of v
        add(v, v, unknown, own)
        blocks = {j: full(block, found.sizes[v]).value[0] for j, block in row.items()}
        for j, block in blocks.items():
            add(v, j, unknown, -(low + high) * own @ block)
            for k, other in blocks.items() if low * high else ():
                add(j, k, unknown, low * high * T[:, None, None] * block[:, :, None] * other[:, None, :])
    p, q, unknown, value = torch.cat(terms, dim=1)
    return p.long(), q.long(), unknown.long(), value
