"""The proof of a certificate once more in ball arithmetic (python-flint, F. Johansson's Arb), as a second opinion.

Weights are binary numbers and enter exactly; roots of unity are enclosed in balls. M(rho, mu) with rho = upper^2 is
formed in balls, and a factorisation L D L^H with D certainly positive proves it, for every block of the basis. No
rounding error bound of ours takes part where maps are known exactly; a map that only its symbol is known of (a
resolvent, say) enters as a ball of the radius of its error bound. Precision is doubled until the proof is decided.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from firmly.certificates.certificate import Certificate
from firmly.certificates.embedding import EMBEDDED
from firmly.certificates.family import Family
from firmly.certificates.pencil import Pencil, pencil
from firmly.certificates.relax import relaxed
from firmly.certificates.representation import make_basis
from firmly.certificates.signal import trace
from firmly.certificates.system import Input, Linear, Sum, System
from firmly.certificates.torch_maps import TorchConvolution
from firmly.errors import SettingsError, VerificationError
from firmly.linear.algebra import Compose, Scale
from firmly.linear.algebra import Sum as SumOfMaps
from firmly.linear.basis import Basis, Dense, Fourier
from firmly.linear.convolution import Convolution
from firmly.linear.map import Adjoint, LinearMap

PRECISIONS = (128, 256, 512, 1024)  # bits
LARGEST = 2e8  # blocks * width^3: about a minute

Ball = Any  # flint.arb or flint.acb
Matrix = Any  # flint.arb_mat or flint.acb_mat


@torch.no_grad()
def prove_exactly(cert: Certificate, net: nn.Module) -> None:
    """Prove M(upper^2, mu) > 0 on every block in ball arithmetic; raises `VerificationError` if that fails.

    For certificates with multipliers in a basis that has every map, up to a few hundred variables; others are refused
    with the reason. Raises `SettingsError` without python-flint.
    """
    try:
        from flint import ctx
    except ImportError as error:
        raise SettingsError("exact verification needs python-flint: pip install 'firmly[exact]'") from error
    if cert.method == "exact":
        raise VerificationError("the bound by 'exact' is an enumeration of slopes; method='lipsdp' has multipliers")
    if cert.multipliers is None:
        raise VerificationError(
            f"the bound by '{cert.method}' is made of norms and has no multipliers to prove exactly; "
            "certify(..., method='spectral') gives one that has"
        )
    system = trace(net, cert.inputs, cert.wrt, cert.is_complex)
    basis = make_basis(cert.basis, system)
    blocked, notes = relaxed(system, basis)
    norms = [note for note in notes if not note.startswith(EMBEDDED)]
    if norms:
        raise VerificationError(f"this bound rests on norms that only floating point has bounded: {'; '.join(norms)}")
    shapes = pencil(Family(blocked, basis).blocks(torch.zeros(1, dtype=torch.long)), cert.per_channel)
    if basis.blocks * shapes.width**3 > LARGEST:
        raise VerificationError(
            f"{basis.blocks} blocks of width {shapes.width} are too many for ball arithmetic; verify without --exact"
        )
    if cert.multipliers.numel() != shapes.multipliers or not bool((cert.multipliers >= 0).all()):
        raise VerificationError("the multipliers of this certificate do not fit its inequality")
    pending = list(range(basis.blocks))
    for precision in PRECISIONS:
        with ctx.workprec(precision):
            arithmetic = Balls(blocked, basis, shapes)
            failed = [b for b in pending if not arithmetic.holds(b, cert.upper, cert.multipliers)]
        if not failed:
            return
        pending = failed
    raise VerificationError(
        f"the upper bound {cert.upper!r} could not be proved in ball arithmetic: {len(pending)} of {basis.blocks} "
        f"blocks are not certainly positive at {PRECISIONS[-1]} bits"
    )


class Balls:
    """A system whose maps are diagonal in a basis, in ball arithmetic at the present precision."""

    def __init__(self, system: System, basis: Basis, shapes: Pencil):
        from flint import acb, acb_mat, arb, arb_mat

        self.system, self.basis, self.shapes = system, basis, shapes
        self.real = not (isinstance(basis, Fourier) or system.is_complex)
        self.scalar, self.matrix, self.arb = (arb, arb_mat, arb) if self.real else (acb, acb_mat, arb)
        self._symbols: dict[int, Any] = {}

    # -- the inequality ----------------------------------------------------------------------------------------

    def holds(self, block: int, upper: float, mu: Tensor) -> bool:
        """Whether M(upper^2, mu) is certainly positive definite on this block."""
        rows, output = self.rows(block)
        return positive_definite(self.inequality(rows, output, self.arb(upper) ** 2, mu))

    def inequality(self, rows: list[list[Ball]], output: Matrix, rho: Ball, mu: Tensor) -> list[list[Ball]]:
        """M(rho, mu) of `pencil`, as a list of rows."""
        shapes, width = self.shapes, self.shapes.width
        M = (-(adjoint(output) * output)).tolist()
        weighted, plain = [], []
        entries = zip(shapes.column.tolist(), shapes.row.tolist(), shapes.owner.tolist())
        for (column, row, owner), low, high in zip(entries, shapes.low.tolist(), shapes.high.tolist()):
            weight, a, b = (self.arb(float(v)) for v in (mu[owner], low, high))
            if column < width:
                M[column][column] += weight
            if row == len(rows):  # the row of zeros
                continue
            if column < width and low + high != 0:
                factor = weight * (a + b) / 2
                for j, z in enumerate(rows[row]):
                    M[column][j] -= factor * z
                    M[j][column] -= factor * conjugate(z)
            if low * high != 0:
                plain.append(rows[row])
                weighted.append([weight * a * b * z for z in rows[row]])
        if plain:
            curved = (adjoint(self.matrix(plain)) * self.matrix(weighted)).tolist()
            M = [[m + c for m, c in zip(*pair)] for pair in zip(M, curved)]
        for i in range(shapes.inputs):
            M[i][i] += rho
        return M

    def rows(self, block: int) -> tuple[list[list[Ball]], Matrix]:
        """All rows of Z and the matrix of the output, on the columns (d, v), as in `blocks.sweep`."""
        width = self.shapes.width
        column = 0
        values: dict[int, Matrix] = {}
        nodes = self.system.nodes
        ordered = [i for i, n in enumerate(nodes) if isinstance(n, Input)]
        for i in ordered:
            values[i], column = self.unit(nodes[i].shape, column), column + self.basis.channels(nodes[i].shape)
        rows: list[list[Ball]] = []
        for i, node in enumerate(nodes):
            if isinstance(node, Input):
                continue
            if isinstance(node, Linear):
                values[i] = self.symbol(node.map, block) * values[node.parent]
            elif isinstance(node, Sum):
                terms = [values[k] * self.scalar(float(c)) for c, k in node.terms]
                values[i] = sum(terms[1:], terms[0])
            else:
                z = values[node.parent]
                values[i], column = self.unit(node.shape, column), column + self.basis.channels(node.shape)
                if node.loop is not None:
                    z = z + self.symbol(node.loop.map, block) * values[i]
                rows += z.tolist()
        assert column == width
        return rows, values[self.system.output]

    def unit(self, shape: tuple[int, ...], first: int) -> Matrix:
        size = self.basis.channels(shape)
        result = self.matrix(size, self.shapes.width)
        for i in range(size):
            result[i, first + i] = 1
        return result

    # -- maps --------------------------------------------------------------------------------------------------

    def symbol(self, linear_map: LinearMap, block: int) -> Matrix:
        """The action of a map on one block, as tightly as it is known."""
        if isinstance(linear_map, Adjoint):
            return adjoint(self.symbol(linear_map.of, block))
        if isinstance(linear_map, Compose):
            return self.symbol(linear_map.outer, block) * self.symbol(linear_map.inner, block)
        if isinstance(linear_map, SumOfMaps):
            parts = [self.symbol(part, block) for part in summands(linear_map)]
            return sum(parts[1:], parts[0])
        if isinstance(linear_map, Scale):
            return self.symbol(linear_map.of, block) * self.scalar(float(linear_map.factor))
        if isinstance(self.basis, Fourier) and isinstance(linear_map, Convolution):
            return self.response(linear_map, block)
        return self.known(linear_map, block)

    def known(self, linear_map: LinearMap, block: int) -> Matrix:
        """Exact entries where the map has them, else its symbol with balls as large as its error."""
        if id(linear_map) not in self._symbols:
            symbol = linear_map.symbol(self.basis)
            value, error = symbol.value, symbol.error
            assert error is not None
            if isinstance(self.basis, Dense) and one_tap_per_entry(linear_map):
                value, error = linear_map.matrix()[None], torch.zeros(1, dtype=torch.float64)
            self._symbols[id(linear_map)] = value, error
        value, error = self._symbols[id(linear_map)]
        value, radius = value[block if len(value) > 1 else 0], float(error[block if len(error) > 1 else 0])
        return self.matrix([[self.ball(v, radius) for v in row] for row in value.tolist()])

    def ball(self, value: float | complex, radius: float) -> Ball:
        if self.real:
            return self.arb(value, radius)
        return self.scalar(self.arb(complex(value).real, radius), self.arb(complex(value).imag, radius))

    def response(self, convolution: Convolution, block: int) -> Matrix:
        """sum_j kernel[j] exp(2 pi i f (j - centre) / size), the frequency response at one frequency."""
        from flint import acb, arb, fmpq

        assert isinstance(self.basis, Fourier)
        place = [int(n) for n in torch.unravel_index(torch.tensor(block), self.basis.grid)]
        kernel, shape = convolution.kernel.detach().double(), convolution.domain
        waves = []
        for tap in taps(kernel.shape[-len(self.basis.spatial) :]):
            angle = fmpq(0)
            for f, j, centre, size in zip(place, tap, convolution.centre, self.basis.spatial):
                angle += fmpq(2 * f * (j - centre) % (2 * size), size)
            waves.append(acb(arb.cos_pi_fmpq(angle), arb.sin_pi_fmpq(angle)))
        values = kernel.flatten(-len(self.basis.spatial)).tolist()
        if convolution.per_channel:
            one = sum((wave * arb(v) for wave, v in zip(waves, values)), acb(0))
            return self.matrix([[one if o == c else acb(0) for c in range(shape[0])] for o in range(shape[0])])
        rows = [[sum((wave * arb(v) for wave, v in zip(waves, entry)), acb(0)) for entry in row] for row in values]
        return self.matrix(rows)


def taps(sizes: torch.Size) -> Iterator[tuple[int, ...]]:
    for index in range(math.prod(sizes)):
        yield tuple(int(n) for n in torch.unravel_index(torch.tensor(index), sizes))


def summands(linear_map: SumOfMaps) -> list[LinearMap]:
    return [part for part in linear_map.children() if isinstance(part, LinearMap)]


def one_tap_per_entry(linear_map: LinearMap) -> bool:
    """Whether every entry of the matrix is a tap of the kernel or zero, so that forming it rounds nothing."""
    if isinstance(linear_map, TorchConvolution):
        return True
    if not isinstance(linear_map, Convolution) or linear_map.padding == "reflect":
        return False
    sizes = linear_map.kernel.shape[-len(linear_map.domain) + 1 :]
    return linear_map.padding == "zero" or all(k <= n for k, n in zip(sizes, linear_map.domain[1:]))


def conjugate(z: Ball) -> Ball:
    return z.conjugate() if hasattr(z, "conjugate") else z


def adjoint(matrix: Matrix) -> Matrix:
    transposed = matrix.transpose()
    return transposed.conjugate() if hasattr(transposed, "conjugate") else transposed


def positive_definite(M: list[list[Ball]]) -> bool:
    """Whether L D L^H with D > 0 for certain; M is Hermitian and is overwritten below its diagonal."""
    for k in range(len(M)):
        pivot = M[k][k].real if hasattr(M[k][k], "imag") else M[k][k]
        if not pivot > 0:
            return False
        inverse = 1 / pivot
        for i in range(k + 1, len(M)):
            if M[i][k] == 0:
                continue
            factor, row = M[i][k] * inverse, M[i]
            for j in range(k + 1, i + 1):
                row[j] -= factor * conjugate(M[j][k])
    return True
