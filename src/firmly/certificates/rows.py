"""Bounds for every single entry of the output: from Euclidean norms to the maximum norm.

One factorisation serves all rows. With P = diag(|d|^2 terms) + sum_i mu_i (quadratic constraints) the inequality
|o (d, v)|^2 <= rho |d|^2 of one output row o follows from rho P >= o^H o, that is from rho = o P^-1 o^H. In Fourier an
entry of the output is an average over frequencies, the same for all pixels of a channel.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from firmly.certificates.certify import Shapes, assumptions, input_shapes, perturbed_inputs, spectral_bound
from firmly.certificates.family import Family
from firmly.certificates.norm_bounds import accumulated, averaged_bound, gain_table
from firmly.certificates.pencil import Pencil, pencil
from firmly.certificates.representation import BasisChoice, represent
from firmly.certificates.signal import trace
from firmly.certificates.spectral import minimise_rho
from firmly.certificates.system import Input, Linear, Nonlinear, Sum, System
from firmly.certificates.verify import UNIT, entry_errors, matrix_error
from firmly.linear.basis import Dense, Fourier
from firmly.linear.map import LinearMap

LARGEST_DENSE = 4096  # columns up to which rows are formed in the dense basis
LARGEST_INEQUALITY = 600  # columns up to which the matrix inequality of a single block is worth its time


@dataclass(frozen=True)
class RowBounds:
    """|F(x + d)_i - F(x)_i| <= bounds[i] |d|_2 for every entry i of the output, whatever x; `bounds` has its shape."""

    bounds: Tensor
    wrt: tuple[str, ...]
    basis: str
    assumptions: list[str]

    @property
    def upper(self) -> float:
        """The largest of them: the Lipschitz constant from the Euclidean norm to the maximum norm is at most this."""
        return float(self.bounds.max())


@torch.no_grad()
def rows(
    net: nn.Module, wrt: str | Sequence[str] = "data", shape: Shapes | None = None, budget_s: float = 10.0
) -> RowBounds:
    """Bounds of the change of every single output entry for perturbations of the inputs `wrt` in Euclidean norm.

    Arguments as in `certify`. All rows share one set of multipliers, which makes their mean square small; for the best
    bound of one entry, certify a network that returns this entry alone.
    """
    inputs = input_shapes(net, shape)
    names = perturbed_inputs(inputs, wrt)
    is_complex = any(m.is_complex for m in net.modules() if isinstance(m, LinearMap))
    system = trace(net, inputs, names, is_complex)
    bounds, basis, notes = entry_bounds(system, budget_s)
    return RowBounds(bounds, names, basis, [*assumptions(net, inputs, names), *system.assumptions, *notes])


def entry_bounds(system: System, budget_s: float) -> tuple[Tensor, str, list[str]]:
    """For every entry of the output of a traced system, a bound of |entry| / |d|; the basis used, and what it relaxed.

    The smaller of two: the averaged recursion with the norm of this row alone, and the matrix inequality.
    """
    shape = system.nodes[system.output].shape
    choice, basis, blocked, notes = represent(system)
    if choice.name == "norms" and columns_of(system) <= LARGEST_DENSE:
        choice, basis, blocked, notes = BasisChoice("dense"), Dense(), system, []
    family = Family(blocked, basis)
    reduced = reduction(family)
    if reduced is None:
        return torch.full(shape, averaged_bound(family), dtype=torch.float64), choice.name, notes
    best = averaged_rows(family, reduced)
    if choice.name == "fourier" or columns_of(blocked) <= LARGEST_INEQUALITY:
        for mu in multipliers(family, reduced, budget_s):
            best = torch.minimum(best, inequality_rows(family, mu, reduced))
    if isinstance(basis, Fourier):
        best = best.reshape(-1, *[1] * (len(shape) - 1)).expand(-1, *shape[1:])
    return best.reshape(shape).clone(), choice.name, notes


def columns_of(system: System) -> int:
    return sum(math.prod(n.shape) for n in system.nodes if isinstance(n, Input | Nonlinear))


def reduction(family: Family) -> Callable[[Tensor], Tensor] | None:
    """How squared rows (blocks, channels) become squares of entries: themselves in the dense basis, in Fourier the mean
    over all frequencies for pixels, the maximum for entries that are frequencies; None for bases without entries."""
    basis = family.basis
    if isinstance(basis, Dense):
        return lambda squares: squares[0]
    if not isinstance(basis, Fourier):
        return None
    if not in_pixels(family, family.system.output):
        return lambda squares: squares.amax(0)
    mirrored = torch.full(basis.grid, 1.0 if basis.full else 2.0, dtype=torch.float64)
    if not basis.full:
        mirrored[..., 0] = 1.0
        if basis.spatial[-1] % 2 == 0:
            mirrored[..., -1] = 1.0
    weights = torch.zeros(len(family), dtype=torch.float64).index_add(0, family.group, mirrored.flatten())
    weights = weights * ((1 + len(family) * 4 * UNIT) / math.prod(basis.spatial))
    return lambda squares: (weights[:, None] * squares).sum(0)


def in_pixels(family: Family, index: int) -> bool:
    """Whether a value of a Fourier basis is known to be an image and not data over frequencies."""
    symbols = {id(m): family.symbol(m) for m in family.system.maps}
    if all({s.rows, s.columns} <= {"pixel", None} for s in symbols.values()):
        return True
    node = family.system.nodes[index]
    if isinstance(node, Sum):
        return in_pixels(family, node.terms[0][1])
    if isinstance(node, Linear) and symbols[id(node.map)].rows is not None:
        return symbols[id(node.map)].rows == "pixel"
    if isinstance(node, Linear) or (isinstance(node, Nonlinear) and node.slope.low + node.slope.high != 0):
        return in_pixels(family, node.parent)
    return False


# -- the averaged recursion, row by row ----------------------------------------------------------------------------


def averaged_rows(family: Family, reduced: Callable[[Tensor], Tensor]) -> Tensor:
    """|row on d| + sum_j |row on q_j| rho_j in the averaged form, with rho_j as in `averaged_bound`; (channels,)."""
    table, slopes = gain_table(family, "averaged")
    ones = [1.0] * len(slopes)
    sizes = [1.0, *(accumulated(table[: i + 1], ones) for i in range(len(slopes)))]
    squares: list[Tensor] = []
    for blocks in family.parts("averaged"):
        value, error = blocks.output.value, blocks.output.error
        assert error is not None
        groups = [slice(0, blocks.inputs[-1].stop), *blocks.columns]
        norms = torch.stack([torch.linalg.vector_norm(value[:, :, g], dim=2) for g in groups], dim=2)
        norms = norms * (1 + 4 * blocks.width * UNIT) + error[:, None, None]
        squares.append(norms.square().expand(blocks.basis.blocks, -1, -1))
    joined = torch.cat(squares)
    total = torch.zeros(joined.shape[1], dtype=torch.float64)
    for j, size in enumerate(sizes):
        total = total + reduced(joined[:, :, j]).sqrt() * size
    return total * (1 + 8 * (len(sizes) + 2) * UNIT)


# -- the matrix inequality -----------------------------------------------------------------------------------------


def multipliers(family: Family, reduced: Callable[[Tensor], Tensor], budget_s: float) -> list[Tensor]:
    """Those of the smallest joint bound, which no row exceeds with them, and those of the smallest mean square of all
    rows; none if no feasible ones were found."""
    deadline = time.monotonic() + budget_s
    index = family.search_index()
    if len(index) < len(family):  # too many blocks to hold at once for the mean over all of them
        bound, mu = spectral_bound(family, True, 1e-3, budget_s)
        return [mu / (1.001 * bound.value**2)] if 0 < bound.value < math.inf else []
    searched = pencil(family.blocks(index), per_channel=True)
    if not bool(searched.O.any()):  # the output does not move
        return []
    found = minimise_rho(searched, 1e-3, budget_s / 2)
    if not 0 < found.rho < math.inf:
        return []
    start = found.mu / (1.001 * found.rho)
    if not len(start):
        return [start]

    def objective(mu: Tensor) -> Tensor:
        factor, failed = torch.linalg.cholesky_ex(constraint(searched).matrix(1.0, mu))
        if bool(failed.any()):
            return torch.tensor(math.inf, dtype=torch.float64)
        X = torch.linalg.solve_triangular(factor, searched.O.mH, upper=False)
        return reduced(X.abs().square().sum(1)).sum()

    return [start, descend(objective, start, deadline)]


def constraint(family: Pencil) -> Pencil:
    """The same pencil without its output: M(rho, mu) = rho |d|^2 + sum_i mu_i (...)."""
    return replace(family, O=torch.zeros_like(family.O[:, :1]))


def descend(objective: Callable[[Tensor], Tensor], start: Tensor, deadline: float) -> Tensor:
    """The BFGS method on the logarithms of the multipliers, with backtracking."""
    x, inverse = start.clamp(min=1e-300).log(), torch.eye(len(start), dtype=torch.float64)
    value, gradient = value_and_gradient(objective, x)
    for _ in range(100):
        direction = -inverse @ gradient
        decrease = float(-gradient @ direction)
        if not decrease > 1e-7 * value or time.monotonic() > deadline:
            break
        length = min(1.0, 2.0 / float(direction.abs().max()))
        while length > 1e-6:
            with torch.no_grad():
                reached = float(objective((x + length * direction).exp()))
            if reached <= value - 1e-4 * length * decrease:
                break
            length /= 2
        else:
            break
        step = length * direction
        value, after = value_and_gradient(objective, x + step)
        change, x = after - gradient, x + step
        gradient = after
        curvature = float(step @ change)
        if curvature > 1e-14 * float(step.norm() * change.norm()):
            left = torch.eye(len(x), dtype=torch.float64) - torch.outer(step, change) / curvature
            inverse = left @ inverse @ left.T + torch.outer(step, step) / curvature
    return x.exp()


def value_and_gradient(objective: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        value = objective(x.exp())
        (gradient,) = torch.autograd.grad(value, x)
    return float(value.detach()), gradient.nan_to_num()


def inequality_rows(family: Family, mu: Tensor, reduced: Callable[[Tensor], Tensor]) -> Tensor:
    """sqrt(o P^-1 o^H) of every output row, verified, rounded up; (channels,); infinite where P > 0 is not proved."""
    squares = []
    for blocks in family.parts():
        part = pencil(blocks, per_channel=True)
        row_error, output_error = entry_errors(blocks, part)
        squares.append(verified_squares(part, row_error, output_error, mu).expand(blocks.basis.blocks, -1))
    return reduced(torch.cat(squares)).sqrt() * (1 + 4 * UNIT)


def verified_squares(part: Pencil, row_error: Tensor, output_error: Tensor, mu: Tensor) -> Tensor:
    """Upper bounds of o P^-1 o^H for the exact P and o, whatever the inverse is computed by; (blocks, rows).

    With any x and r = o^H - P x: o P^-1 o^H = 2 Re(o x) - x^H P x + r^H P^-1 r, and the last term is at most |r|^2 over
    a lower bound of the smallest eigenvalue of P, which a Cholesky factorisation of a shifted P proves.
    """
    plain = constraint(part)
    P = plain.matrix(1.0, mu)
    error = matrix_error(plain, row_error, torch.zeros_like(output_error), 1.0, mu)
    n = part.width
    diagonal = P.diagonal(dim1=1, dim2=2).real
    if not bool((diagonal > 0).all()) or not bool(P.isfinite().all()):
        return torch.full(part.O.shape[:2], math.inf, dtype=torch.float64)
    scale = torch.exp2(-torch.round(0.5 * torch.log2(diagonal)))  # powers of two: scaling is exact
    P = P * scale[:, :, None] * scale[:, None, :]
    away = 1.01 * torch.linalg.matrix_norm(error * scale[:, :, None] * scale[:, None, :])
    o = (part.O * scale[:, None, :]).mH  # (blocks, width, rows)
    o_error = output_error * scale.amax(1)
    factor, _ = torch.linalg.cholesky_ex(P)
    eye = torch.eye(n, dtype=P.dtype)
    X = torch.cholesky_solve(o, factor)
    smallest = 0.5 / torch.linalg.matrix_norm(torch.cholesky_solve(eye.expand_as(P), factor))
    shift = smallest + away + 8 * (n + 3) * UNIT * P.diagonal(dim1=1, dim2=2).real.sum(1)
    _, failed = torch.linalg.cholesky_ex(P - shift[:, None, None] * eye)
    size, x, t = torch.linalg.matrix_norm(P), torch.linalg.vector_norm(X, dim=1), torch.linalg.vector_norm(o, dim=1)
    PX = P @ X
    rounding = 8 * (n + 4) * UNIT * (size[:, None] * x + t)
    residual = torch.linalg.vector_norm(o - PX, dim=1) * (1 + 4 * n * UNIT) + away[:, None] * x + rounding
    square = 2 * (o.conj() * X).real.sum(1) - (X.conj() * PX).real.sum(1)
    square = square + away[:, None] * x**2 + rounding * 4 * x + residual**2 / smallest[:, None]
    total = (square.clamp(min=0).sqrt() + (o_error / smallest.sqrt())[:, None]).square() * (1 + 16 * UNIT)
    return torch.where((failed > 0)[:, None] | total.isnan(), math.inf, total)
