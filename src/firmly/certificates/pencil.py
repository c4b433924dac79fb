"""The linear matrix inequality of a system in a basis, one small Hermitian matrix per block.

    M(rho, mu) = rho |d|^2 - |output|^2 + sum_i mu_i (|v_i|^2 - (a_i + b_i) Re <v_i, z_i> + a_i b_i |z_i|^2)  >= 0

for all (d, v) on every block proves |output| <= sqrt(rho) |d|, because every bracket is minus a quadratic constraint
that the nonlinearities satisfy once the blocks are summed. The multipliers mu >= 0 are shared by all blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from firmly.certificates.blocks import Blocks

CHUNK_ENTRIES = 2**18  # matrix entries worked on at once: what fits in the cache is ten times faster


@dataclass(frozen=True)
class Pencil:
    """The matrices M(rho, mu) of selected blocks; columns 0 .. inputs-1 are d, the others v.

    The constraints are sums of scalar ones, the *entries*: entry e couples column `column[e]` of v and row `row[e]`
    of Z with slopes [low, high] under multiplier `owner[e]`. A column or a row of zeros stands at the end for entries
    with only one side.
    """

    Z: Tensor  # (blocks, rows + 1, width)
    O: Tensor  # (blocks, output rows, width)
    column: Tensor  # (entries,)
    row: Tensor  # (entries,)
    owner: Tensor  # (entries,)
    low: Tensor  # (entries,)
    high: Tensor  # (entries,)
    inputs: int
    multipliers: int
    layer: Tensor | None = None  # (multipliers,): the nonlinearity that each belongs to; None: one for each

    def shared(self) -> Pencil:
        """The same inequality with one multiplier per nonlinearity."""
        if self.layer is None:
            return self
        return replace(self, owner=self.layer[self.owner], multipliers=int(self.layer.max()) + 1, layer=None)

    @property
    def width(self) -> int:
        return self.O.shape[2]

    def __len__(self) -> int:
        return len(self.O)

    def select(self, index: Tensor | slice) -> Pencil:
        return replace(self, Z=self.Z[index], O=self.O[index])

    def chunks(self) -> list[Pencil]:
        """The same blocks in pieces of bounded memory."""
        size = max(1, CHUNK_ENTRIES // self.width**2)
        return [self.select(slice(start, start + size)) for start in range(0, len(self), size)]

    def matrix(self, rho: float | Tensor, mu: Tensor) -> Tensor:
        """M(rho, mu): (blocks, width, width)."""
        M = -(self.O.mH @ self.O)
        weight = mu[self.owner]
        coupled = (self.low + self.high != 0).nonzero().squeeze(1)
        if len(coupled):
            factor = -0.5 * weight[coupled] * (self.low + self.high)[coupled]
            half = torch.zeros_like(M)
            half[:, self.column[coupled], :] = factor[:, None] * self.Z[:, self.row[coupled], :]
            M = M + half + half.mH
        curved = (self.low * self.high != 0).nonzero().squeeze(1)
        if len(curved):
            Z = self.Z[:, self.row[curved], :]
            M = M + (Z.mH * (weight * self.low * self.high)[curved]) @ Z
        diagonal = torch.zeros(self.width + 1, dtype=mu.dtype).index_add(0, self.column, weight)[:-1]
        diagonal = diagonal + torch.as_tensor(rho, dtype=mu.dtype) * (torch.arange(self.width) < self.inputs)
        return M + torch.diag(diagonal)

    def required(self, mu: Tensor) -> Tensor:
        """The smallest rho with M(rho, mu) >= 0 for every block, infinite where none is; differentiable."""
        return torch.cat([largest_eigenvalue(*part.eliminated(mu)) for part in self.chunks()])

    def eliminated(self, mu: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """R = C + G^H S^-1 G with M(0, mu) = [[-C, G^H], [G, S]], and S = L L^H, L^-1 G, and where S is not
        definite."""
        M = self.matrix(0.0, mu)
        n = self.inputs
        factor, failed = torch.linalg.cholesky_ex(M[:, n:, n:])
        X = torch.linalg.solve_triangular(factor, M[:, n:, :n], upper=False)
        return -M[:, :n, :n] + X.mH @ X, factor, X, failed > 0


def largest_eigenvalue(R: Tensor, factor: Tensor, X: Tensor, failed: Tensor) -> Tensor:
    if R.shape[1] == 1:
        values = R[:, 0, 0].real
    else:
        values = torch.linalg.eigvalsh(torch.where(failed[:, None, None], torch.zeros_like(R), R))[:, -1]
    return torch.where(failed | values.isnan(), torch.inf, values)


def pencil(blocks: Blocks, per_channel: bool) -> Pencil:
    """The pencil of all blocks: one multiplier per nonlinearity, or one per channel of the separable ones."""
    count = max(s.value.shape[0] for s in [*blocks.rows, blocks.output])
    parts = [r.value.expand(count, -1, -1) for r in blocks.rows]
    output = blocks.output.value.expand(count, -1, -1)
    dtype = torch.complex128 if any(t.is_complex() for t in [*parts, output]) else torch.float64
    parts.append(torch.zeros(count, 1, blocks.width, dtype=dtype, device=output.device))
    no_row = sum(part.shape[1] for part in parts) - 1
    no_column = blocks.width
    entries: list[tuple[int, int, int, float, float]] = []
    layers: list[int] = []
    multiplier = first = 0
    for part, columns, slope, separable in zip(parts, blocks.columns, blocks.slopes, blocks.separable):
        height, size = part.shape[1], columns.stop - columns.start
        channelwise = per_channel and separable and height == size
        for c in range(max(height, size)):
            column = columns.start + c if c < size else no_column
            row = first + c if c < height else no_row
            entries.append((column, row, multiplier + c * channelwise, float(slope.low), float(slope.high)))
        layers += [max(layers, default=-1) + 1] * (size if channelwise else 1)
        multiplier = len(layers)
        first += height
    column, row, owner, low, high = zip(*entries) if entries else ((), (), (), (), ())
    return Pencil(
        Z=torch.cat([part.to(dtype) for part in parts], dim=1),
        O=output.to(dtype),
        column=torch.tensor(column, dtype=torch.long),
        row=torch.tensor(row, dtype=torch.long),
        owner=torch.tensor(owner, dtype=torch.long),
        low=torch.tensor(low, dtype=torch.float64),
        high=torch.tensor(high, dtype=torch.float64),
        inputs=blocks.inputs[-1].stop,
        multipliers=multiplier,
        layer=torch.tensor(layers) if len(layers) > len(blocks.rows) else None,
    )
