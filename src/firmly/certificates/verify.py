"""Check a certificate without trusting whoever found it.

Given multipliers mu, M(rho, mu) is formed again from error-bounded symbols and shown to be positive definite on every
block by a Cholesky factorisation, which succeeds in floating point only if the matrix, moved down by a bound of all
errors, is positive definite in exact arithmetic (S. M. Rump, Verification of positive definiteness, BIT 46, 2006). No
solver takes part.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from firmly.certificates.blocks import Blocks
from firmly.certificates.certificate import Certificate
from firmly.certificates.exact import exact_bound
from firmly.certificates.family import Family
from firmly.certificates.layered_proof import layered_gain
from firmly.certificates.layers import layers
from firmly.certificates.lower import as_function, measured
from firmly.certificates.norm_bounds import NORM_BOUNDS
from firmly.certificates.pencil import Pencil, pencil
from firmly.certificates.relax import relaxed
from firmly.certificates.representation import make_basis
from firmly.certificates.signal import trace
from firmly.certificates.system import System, weights_hash
from firmly.errors import FirmlyError, VerificationError

UNIT = torch.finfo(torch.float64).eps
ROOM = 1 + 1e-11
"""What `certify` reports is so much above what it proved: with other rounding, on another machine, the proof may need a
little more, and still ends below what was reported."""


def certified_gain(source: Blocks | Family, mu: Tensor, per_channel: bool, rho: float | None = None) -> float:
    """The smallest verified sqrt(rho), rounded up; infinite if these multipliers prove nothing.

    Starts from `rho` (or from the value that floating point suggests) and enlarges it, by parts in 10^12 up to a
    third, until the factorisations of all blocks succeed.
    """
    if bool((mu < 0).any()) or not bool(mu.isfinite().all()):
        return math.inf
    if rho is None:
        rho = max(float(pencil(part, per_channel).required(mu).max()) for part in source.parts())
    if not math.isfinite(rho):
        return math.inf
    rho = max(rho, 1e-300)
    excesses = (0.0, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3)
    needed = 0
    for part in source.parts():
        family = pencil(part, per_channel)
        if mu.numel() != family.multipliers:
            return math.inf
        errors = entry_errors(part, family)
        while not holds(family, errors, rho * (1 + excesses[needed]), mu):
            needed += 1
            if needed == len(excesses):
                return math.inf
    return math.sqrt(rho * (1 + excesses[needed])) * (1 + 2 * UNIT)


def entry_errors(blocks: Blocks, family: Pencil) -> tuple[Tensor, Tensor]:
    """Error bounds of the rows of Z and of the output, (blocks, rows + 1) and (blocks,)."""
    count = len(family)
    columns = []
    for row in blocks.rows:
        if row.error is None:
            raise ValueError("a certificate needs a basis that tracks errors: Basis(..., track=True)")
        columns.append(row.error.expand(count)[:, None].expand(-1, row.value.shape[1]))
    columns.append(torch.zeros(count, 1, dtype=torch.float64))
    assert blocks.output.error is not None
    return torch.cat(columns, dim=1), blocks.output.error.expand(count)


def holds(family: Pencil, errors: tuple[Tensor, Tensor], rho: float, mu: Tensor) -> bool:
    """Whether M(rho, mu) >= 0 is proved on every block."""
    start = 0
    for part in family.chunks():
        stop = start + len(part)
        if not _proved(part, errors[0][start:stop], errors[1][start:stop], rho, mu):
            return False
        start = stop
    return True


def _proved(part: Pencil, row_error: Tensor, output_error: Tensor, rho: float, mu: Tensor) -> bool:
    M = part.matrix(rho, mu)
    diagonal = M.diagonal(dim1=1, dim2=2).real
    if not bool((diagonal > 0).all()) or not bool(M.isfinite().all()):
        return False
    scale = torch.exp2(-torch.round(0.5 * torch.log2(diagonal)))  # powers of two: scaling is exact
    error = matrix_error(part, row_error, output_error, rho, mu)
    n = part.width
    shift = torch.linalg.matrix_norm(error * scale[:, :, None] * scale[:, None, :])
    scaled = M * scale[:, :, None] * scale[:, None, :]
    trace = scaled.diagonal(dim1=1, dim2=2).real.sum(1)
    shift = 1.01 * shift + 8 * (n + 3) * UNIT * trace
    eye = torch.eye(n, dtype=torch.float64)
    _, failed = torch.linalg.cholesky_ex(scaled - shift[:, None, None] * eye)
    return not bool(failed.any())


def matrix_error(part: Pencil, row_error: Tensor, output_error: Tensor, rho: float, mu: Tensor) -> Tensor:
    """Entrywise bound of |computed M - exact M|: errors of the symbols, and rounding of the sums that form M."""
    rounding = 8 * (part.O.shape[1] + len(part.column) + 4) * UNIT
    O, Z = part.O.abs(), part.Z.abs()
    O_column = torch.linalg.vector_norm(O, dim=1)  # (blocks, width)
    e = output_error[:, None]
    size = O_column[:, :, None] * O_column[:, None, :]
    error = e[:, :, None] * (O_column[:, :, None] + O_column[:, None, :] + e[:, :, None]) + rounding * size
    weight = mu[part.owner]
    coupling = 0.5 * weight * (part.low + part.high).abs()
    coupled = (coupling != 0).nonzero().squeeze(1)
    if len(coupled):
        half = torch.zeros_like(error)
        rows = part.row[coupled]
        half[:, part.column[coupled], :] = coupling[coupled][:, None] * (
            row_error[:, rows, None] + rounding * Z[:, rows, :]
        )
        error = error + half + half.transpose(1, 2)
    curvature = weight * (part.low * part.high).abs()
    curved = (curvature != 0).nonzero().squeeze(1)
    if len(curved):
        rows = part.row[curved]
        z, e = Z[:, rows, :], row_error[:, rows, None].expand(-1, -1, part.width)
        w = curvature[curved]
        error = error + (z.mT * w) @ e + (e.mT * w) @ z + (e.mT * w) @ e + rounding * ((z.mT * w) @ z)
    diagonal = torch.zeros(part.width + 1, dtype=torch.float64).index_add(0, part.column, weight)[:-1]
    diagonal = diagonal + rho * (torch.arange(part.width) < part.inputs)
    return error + torch.diag(rounding * diagonal)


# -- whole certificates --------------------------------------------------------------------------------------------


def verify(certificate: str | Path | Certificate, net: nn.Module, exact: bool = False) -> Certificate:
    """Check a certificate, or the file of one, against a network, without any solver; returns it if it holds.

    The network is traced anew, its linear part turned into error-bounded blocks, and the inequality proved again with
    the stored multipliers; the stored pair of inputs is run through the network. Raises `VerificationError` if the
    certificate belongs to other weights, or if either side of the bracket does not hold. With `exact` the inequality is
    proved once more in ball arithmetic (extra `exact`), for systems up to a few hundred variables.
    """
    cert = certificate if isinstance(certificate, Certificate) else Certificate.load(certificate)
    try:
        check(cert, net)
    except VerificationError:
        raise
    except (FirmlyError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise VerificationError(f"this certificate does not fit this network: {error}") from error
    if exact:
        from firmly.certificates.exact_arithmetic import prove_exactly

        prove_exactly(cert, net)
    return cert


def check(cert: Certificate, net: nn.Module) -> None:
    system = trace(net, cert.inputs, cert.wrt, cert.is_complex)
    if weights_hash(net) != cert.weights_hash or system.fingerprint() != cert.system_hash:
        raise VerificationError(
            "this certificate was made for other weights or another architecture: "
            "certify the network that you have, or load the weights that the certificate belongs to"
        )
    upper = recomputed_upper(system, cert)
    if not upper <= cert.upper:
        raise VerificationError(f"the upper bound {cert.upper:.9g} does not hold: only {upper:.9g} could be proved")
    attained = measured(as_function(net, cert.inputs, cert.wrt, cert.is_complex), cert.point, cert.perturbation).ratio
    if not attained >= cert.lower * (1 - 1e-6):
        raise VerificationError(f"the stored inputs attain {attained:.9g}, not the lower bound {cert.lower:.9g}")


@torch.no_grad()
def recomputed_upper(system: System, cert: Certificate) -> float:
    rho = (cert.upper / ROOM) ** 2
    if cert.method == "exact":
        return exact_bound(system, cert.multipliers)
    if cert.method in ("eclipse", "lipsdp"):
        if cert.multipliers is None:
            raise VerificationError(f"a certificate by '{cert.method}' needs its multipliers, and has none")
        return layered_gain(layers(system), cert.multipliers, rho)
    basis = make_basis(cert.basis, system)
    family = Family(relaxed(system, basis)[0], basis)
    if cert.multipliers is None:
        return NORM_BOUNDS[cert.method](family)
    return certified_gain(family, cert.multipliers, cert.per_channel, rho)
