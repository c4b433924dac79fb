"""The exact worst case over all slopes, for few neurons or for signs that agree.

For separable nonlinearities the increments are v = diag(s) z with any slopes s_i in [a_i, b_i], so that the output is
F(s) d. Every slope enters F through the rank-one term of its neuron, once on every path, so that F is affine in each
slope and |F(s)| is convex in each: the maximum is at a corner. It is the exact constant of the class of networks with
these weights whose nonlinearities may be any functions with slopes in these intervals (piecewise linear ones with free
shifts attain it), and an upper bound for the network at hand.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from firmly.certificates.elimination import Blocks
from firmly.certificates.layers import EPS, Layers, Row, error, full, layers
from firmly.certificates.system import System
from firmly.errors import NotCertifiable
from firmly.linear.symbol import Symbol

UNDECIDED = 20
"""Neurons that branch and bound takes on."""
BATCH = 2**12
RELATIVE = 1e-9
"""Branches that can exceed the best corner found by less than this part of it are not followed."""


def exact_bound(system: System, multipliers: Tensor | None = None, undecided: int = UNDECIDED) -> float:
    """max over all slopes of |F(s)|, rounded up; raises `NotCertifiable` if that is out of reach.

    Good multipliers of LipSDP, one for each neuron, make it fast; none can make it wrong.
    """
    found = layers(system, reduced=False)
    if signs_agree(found):
        return signless_bound(found)
    if neurons(found) > undecided or not separable(found):
        raise NotCertifiable(
            f"the exact constant takes separable nonlinearities without loops and either at most {undecided} neurons "
            f"or weights whose signs agree, given {neurons(found)} neurons: use method='lipsdp'"
        )
    units = Units(layers(system))
    if multipliers is None or multipliers.shape != units.low.shape:
        multipliers = torch.zeros_like(units.low)
    return branch_and_bound(units, multipliers)


def neurons(found: Layers) -> int:
    """Neurons whose slopes are not fixed."""
    return sum(len(owner) for owner, (low, high) in zip(found.owner, found.slopes) if low < high)


def separable(found: Layers) -> bool:
    """Whether every nonlinearity acts entry by entry, and none is inside a loop: only then are slopes all there is."""
    entrywise = all(len(owner) == count for owner, count in zip(found.owner, found.counts))
    return entrywise and not any(found.has_loop(i) for i in range(len(found.rows)))


# -- signs that agree ----------------------------------------------------------------------------------------------


def signless_bound(found: Layers) -> float:
    """|F| with all weights and slopes replaced by their absolute values: never below |F(s)| for any s, and attained
    where signs agree.

    Entry by entry |F(s)| is at most the sum over all paths of the absolute values along them; and the spectral norm of
    nonnegative matrices increases with their entries.
    """
    inputs = [torch.eye(n, dtype=torch.float64) for n in found.sizes[: found.inputs]]
    columns = sum(found.sizes[: found.inputs])
    values: Blocks = dict(enumerate(torch.block_diag(*inputs).split(found.sizes[: found.inputs])))
    terms = 0
    for i, (row, (low, high)) in enumerate(zip(found.rows, found.slopes)):
        v = found.inputs + i
        z = torch.zeros(found.sizes[v], columns, dtype=torch.float64)
        for j, block in row.items():
            z = z + magnitude(block, found.sizes[v]) @ values[j]
            terms += found.sizes[j] + 4
        values[v] = max(abs(low), abs(high)) * z
    output = torch.zeros(found.outputs, columns, dtype=torch.float64)
    for j, block in found.output.items():
        output = output + magnitude(block, found.outputs) @ values[j]
        terms += found.sizes[j] + 4
    norm = float(torch.linalg.matrix_norm(output, 2)) * (1 + 1e-13 * max(output.shape))
    return norm * (1 + 2 * terms * EPS) if math.isfinite(norm) else math.inf


def magnitude(block: Symbol, size: int) -> Tensor:
    """At least the absolute values of the exact entries."""
    return full(block, size).value[0].abs() + (error(block) if float(error(block)) > 0 else 0.0)


def signs_agree(found: Layers) -> bool:
    """Whether nonlinearities are separable and all paths from an input entry to an output entry have one sign, up to a
    sign of each input and output.

    Then some signs of all entries make every weight nonnegative: a graph with edges of two kinds is searched for a
    contradiction. Slopes count as nonnegative when the upper end is the steeper one.
    """
    if not separable(found) or any(low + high < 0 for low, high in found.slopes):
        return False
    heights = [*found.sizes, found.outputs]
    first = [sum(heights[:i]) for i in range(len(heights))]
    pairs, negative = [], []
    for v, row in enumerate([*found.rows, found.output], found.inputs):
        for j, block in row.items():
            matrix = full(block, heights[v]).value[0]
            if not rows_agree(matrix.sign()):
                return False
            rows, columns = matrix.nonzero().T
            pairs.append(torch.stack([rows + first[v], columns + first[j]]))
            negative.append(matrix[rows, columns] < 0)
    return balanced(torch.cat(pairs, dim=1), torch.cat(negative), sum(heights))


def rows_agree(signs: Tensor) -> bool:
    """Whether every row has the signs of the first, or the opposite ones, where both are not zero: a quick test that
    most matrices fail."""
    products = signs * signs[:1]
    return not bool(((products > 0).any(1) & (products < 0).any(1)).any())


def balanced(pairs: Tensor, negative: Tensor, count: int) -> bool:
    """Whether signs of the nodes exist whose products are the signs of the edges.

    Every node becomes two, one for each sign, and every edge joins those that it allows together: signs exist if and
    only if no node is connected with its opposite (F. Harary, Michigan Math. J. 2, 1953).
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = torch.where(negative, count, 0)
    rows = torch.cat([pairs[0], pairs[0] + count])
    columns = torch.cat([pairs[1] + ends, pairs[1] + count - ends])
    graph = coo_array((torch.ones(len(rows)).numpy(), (rows.numpy(), columns.numpy())), shape=(2 * count, 2 * count))
    component = connected_components(graph, directed=False)[1]
    return bool((component[:count] != component[count:]).all())


# -- branch and bound ----------------------------------------------------------------------------------------------


class Units:
    """The layers neuron by neuron: z = Z v + D d, output = O v + P d, with Z strictly lower triangular.

    A box of slopes gives v = s z + r q with s the centres and r the radii of the intervals, and |q_i| <= |z_i|. So z
    and the output are rows on (d, q), and at a corner, where all r are zero, rows on d.
    """

    def __init__(self, found: Layers):
        sizes = found.sizes[found.inputs :]
        self.count = sum(sizes)
        self.inputs = sum(found.sizes[: found.inputs])
        ends = [slope for n, slope in zip(sizes, found.slopes) for _ in range(n)]
        self.low, self.high = torch.tensor(ends, dtype=torch.float64).reshape(-1, 2).T.contiguous()
        rows = [*((n, row) for n, row in zip(sizes, found.rows)), (found.outputs, found.output)]
        self.matrix, self.error = assembled(found, rows)

    def responses(self, matrix: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
        """All z_i and the output as rows on (d, q): (batch, neurons + outputs, inputs + neurons)."""
        n, d = self.count, self.inputs
        found = matrix.new_zeros(len(centre), n + len(matrix) - n, d + n)
        for i in range(n):  # row i of `found` becomes v_i for the rows after it
            row = found[:, i]
            row[:, :d] += matrix[i, :d]
            if i:
                row += torch.einsum("j,bjk->bk", matrix[i, d : d + i], self.outcomes(found[:, :i], centre, radius))
        last = torch.einsum("ij,bjk->bik", matrix[n:, d:], self.outcomes(found[:, :n], centre, radius))
        last[:, :, :d] += matrix[n:, :d]
        found[:, n:] = last
        return found

    def outcomes(self, z: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
        """v = centre z + radius q for the first rows."""
        k = z.shape[1]
        v = centre[:, :k, None] * z
        v.diagonal(offset=self.inputs, dim1=1, dim2=2).add_(radius[:, :k])
        return v

    def rows(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """z and the output on (d, q) for every box of a batch, and entrywise bounds of their errors."""
        n, d = self.count, self.inputs
        centre, radius = 0.5 * (low + high), 0.5 * (high - low) * (1 + 2 * EPS)
        found = self.responses(self.matrix, centre, radius)
        # Every entry is a sum over paths of products; rounding is relative to the sum of their absolute values.
        most = self.responses(self.matrix.abs() + self.error, centre.abs(), radius)
        wrong = 8 * (n + 1) * (n + d + 8) * EPS * most
        if bool((self.error > 0).any()):
            wrong = wrong + (most - self.responses(self.matrix.abs(), centre.abs(), radius))
        return found, wrong

    def norms(self, slopes: Tensor) -> Tensor:
        """Upper bounds of |F(s)| for a batch of corners."""
        found, wrong = (part[:, self.count :, : self.inputs] for part in self.rows(slopes, slopes))
        norms = torch.linalg.matrix_norm(found, 2) * (1 + 1e-13 * max(found.shape[1:]))
        return (norms + torch.linalg.vector_norm(wrong, dim=(1, 2))) * (1 + 8 * EPS)

    def proved(self, low: Tensor, high: Tensor, gain: float, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Whether |F(s)| <= gain is proved on every box, and how much each neuron matters.

        rho |d|^2 - |output|^2 + sum_i weight_i (|q_i|^2 - |z_i|^2) >= 0 proves it. It is the inequality of LipSDP
        after elimination of the neurons that are decided, with weight = mu r^2 for r of the largest box.
        """
        n, d = self.count, self.inputs
        found, wrong = self.rows(low, high)
        open_ = low < high
        importance = torch.linalg.vector_norm(found[:, n:, d:], dim=1) * torch.linalg.vector_norm(found[:, :n], dim=2)
        weights = torch.where(open_, weight, 0.0)
        diagonal = torch.cat([torch.full((len(low), d), gain**2), torch.where(open_, weight, 1.0)], dim=1)
        if not bool((diagonal > 0).all()):
            return torch.zeros(len(low), dtype=torch.bool), importance
        root = torch.cat([weights.sqrt(), torch.ones(len(low), len(self.matrix) - n)], dim=1)[:, :, None]
        scale = torch.exp2(-torch.round(0.5 * torch.log2(diagonal)))[:, None, :]
        found, wrong = root * found * scale, root * wrong * scale
        diagonal = diagonal * scale[:, 0].square()
        size, lost = torch.linalg.vector_norm(found, dim=(1, 2)), torch.linalg.vector_norm(wrong, dim=(1, 2))
        terms = len(self.matrix) + n + d + 8
        shift = 1.01 * (2 * size + lost) * lost + 8 * terms * EPS * (size**2 + diagonal.sum(1))
        M = torch.diag_embed(diagonal - shift[:, None]) - found.mH @ found
        return torch.linalg.cholesky_ex(M)[1] == 0, importance


def assembled(found: Layers, rows: list[tuple[int, Row]]) -> tuple[Tensor, Tensor]:
    """All rows as one matrix on (d, v), and entrywise bounds of its errors."""
    matrices, errors = [], []
    for height, row in rows:
        blocks = [torch.zeros(height, n, dtype=torch.float64) for n in found.sizes]
        wrong = [torch.zeros(height, n, dtype=torch.float64) for n in found.sizes]
        for j, block in row.items():
            blocks[j] = full(block, height).value[0]
            wrong[j] = wrong[j] + error(block)
        matrices.append(torch.cat(blocks, dim=1))
        errors.append(torch.cat(wrong, dim=1))
    return torch.cat(matrices), torch.cat(errors)


def branch_and_bound(units: Units, multipliers: Tensor) -> float:
    """Boxes of slopes are split until they are corners or proved to hold nothing that beats the best corner."""
    weight = multipliers * (0.5 * (units.high - units.low)).square()
    best = best_corner(units)
    gain = best * (1 + RELATIVE)
    proved = gain
    stack = [(units.low[None], units.high[None])]
    while stack:
        low, high = stack.pop()
        if len(low) > BATCH:
            stack.append((low[BATCH:], high[BATCH:]))
            low, high = low[:BATCH], high[:BATCH]
        corner = (low == high).all(1)
        if bool(corner.any()):
            best = max(best, float(units.norms(low[corner]).max()))
            proved, gain = max(proved, best), max(gain, best)
            low, high = low[~corner], high[~corner]
        if len(low) == 0:
            continue
        done, importance = units.proved(low, high, gain, weight)
        importance = torch.where(low < high, importance, -1.0)[~done]
        low, high = low[~done], high[~done]
        chosen = torch.nn.functional.one_hot(importance.argmax(1), units.count).bool()
        split = torch.where(chosen, high, low), torch.where(chosen, low, high)
        stack.append((torch.cat([split[0], low]), torch.cat([high, split[1]])))
    return proved * (1 + 4 * EPS)


def best_corner(units: Units) -> float:
    """A good corner, by flips of single slopes from the upper and from the lower ends of all."""
    best = 0.0
    for slopes in (units.high, units.low):
        value = float(units.norms(slopes[None])[0])
        while units.count:
            other = torch.where(slopes == units.high, units.low, units.high)
            flips = torch.where(torch.eye(units.count, dtype=torch.bool), other, slopes)
            values = units.norms(flips)
            if not float(values.max()) > value * (1 + RELATIVE):
                break
            value, slopes = float(values.max()), flips[int(values.argmax())]
        best = max(best, value)
    return best
