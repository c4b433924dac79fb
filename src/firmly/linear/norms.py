"""Certified operator norms: what may be called the norm of a map in a step size or a certificate.

Upper bounds never rest on an iteration that has 'converged': a Cholesky factorisation proves t I - B*B >= 0, or a
positive vector bounds a non-negative map. Lower bounds are quotients |A v| / |v| of an explicit v. All rounding is paid
for.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from firmly.errors import NotCertifiable, NotDiagonal
from firmly.linear.basis import Dense, Fourier
from firmly.linear.map import Bracket, LinearMap
from firmly.linear.symbol import Symbol

EPS = torch.finfo(torch.float64).eps
SMALL_SIDE = 2048  # rows or columns up to which a matrix is factorised
LARGEST_SYMBOL = 2**26  # entries of a symbol, 1 GB


def norm_bracket(linear_map: LinearMap) -> Bracket:
    """A certified bracket of the norm of any map, by the best of what is known about it.

    Exact, up to the rounding that is paid for, if the map is diagonal in Fourier or small; else the upper bound
    of its own `_upper` with a Krylov lower bound. `NotCertifiable` if the map knows no upper bound.
    """
    symbol = exact_symbol(linear_map)
    if symbol is not None:
        return norm_of_blocks(symbol)
    upper = linear_map._upper()
    if not math.isfinite(upper):
        raise NotCertifiable(f"{linear_map._get_name()} has entries that are not finite numbers; check its weights")
    lower = krylov_lower_bound(linear_map, scale=upper)
    if lower > upper:
        raise NotCertifiable(
            f"{linear_map._get_name()} amplifies some vector {lower:.6g} times, above the bound {upper:.6g} of its "
            "parts: "
            "a declared norm of a part is too small"
        )
    return Bracket(lower, upper)


def exact_symbol(linear_map: LinearMap) -> Symbol | None:
    """The symbol of the map in Fourier, else in the dense basis if it is small, else None.

    The map is replaced by one that has the same singular values where a smaller one is known.
    """
    linear_map = linear_map.same_spectrum()
    spatial = linear_map.domain[1:]
    if spatial and spatial == linear_map.codomain[1:]:
        basis = Fourier(spatial, full=linear_map.is_complex)
        if basis.blocks * linear_map.domain[0] * linear_map.codomain[0] <= LARGEST_SYMBOL:
            try:
                symbol = linear_map.symbol(basis)
                if symbol.error is not None and bool(torch.isfinite(symbol.error).all()):
                    return symbol
            except NotDiagonal:
                pass
    return linear_map.symbol(Dense()) if is_small(linear_map) else None


def is_small(linear_map: LinearMap) -> bool:
    """Whether the matrices of the map and of all its parts are small enough to be formed and factorised."""
    sides = [(math.prod(m.codomain), math.prod(m.domain)) for m in linear_map.modules() if isinstance(m, LinearMap)]
    return min(sides[0]) <= SMALL_SIDE and all(rows * columns <= 4 * SMALL_SIDE**2 for rows, columns in sides)


def norm_of_blocks(symbol: Symbol) -> Bracket:
    """The norm of a block-diagonal map from its blocks and their errors.

    With B the block, or its adjoint, that has fewer columns: a floating-point Cholesky factorisation of t I - B*B that
    runs to its end proves |B|^2 <= t + c, with c from Rump, Verification of positive definiteness, BIT 2006, theorem
    2.3.
    """
    value = symbol.value.detach().to("cpu", torch.complex128 if symbol.value.is_complex() else torch.float64)
    if symbol.error is None:
        raise NotCertifiable("a norm needs a symbol with error bounds: use a basis with track=True")
    error = symbol.error.detach().to("cpu").expand(len(value))
    if not bool(torch.isfinite(value).all()) or not bool(torch.isfinite(error).all()):
        raise NotCertifiable("the map has entries that are not finite numbers; check its weights")
    top = float(value.abs().max()) if value.numel() else 0.0
    if top == 0.0:
        return Bracket(0.0, float(error.max()))
    scale = 2.0 ** max(-1000, min(math.frexp(top)[1], 1000))  # a power of two: scaling is exact
    value, error = value / scale, error / scale
    frobenius = torch.linalg.vector_norm(value, dim=(1, 2))
    rounding = 4 * (value.shape[1] * value.shape[2] + 4) * EPS * frobenius
    if min(value.shape[1:]) == 1:
        return Bracket(
            max(scale * float((frobenius - rounding - error).max()), 0.0),
            scale * float((frobenius + rounding + error).max()) * (1 + 4 * EPS),
        )
    tall = value if value.shape[1] >= value.shape[2] else value.mH
    gram = tall.mH @ tall
    square = _largest_eigenvalue(gram, value.is_complex())
    square = square + float((4 * (tall.shape[1] + 4) * EPS * frobenius**2).max())
    upper = math.sqrt(square) * (1 + 4 * EPS) + float(error.max())
    block = int(torch.argmax(_rayleigh(gram)[0]))
    vector = _top_vector(gram[block])
    image = torch.linalg.vector_norm(tall[block] @ vector) / torch.linalg.vector_norm(vector)
    lower = float(image - 8 * (max(tall.shape[1:]) + 4) * EPS * frobenius[block] - error[block])
    return Bracket(max(scale * lower, 0.0), scale * upper)


def _largest_eigenvalue(gram: Tensor, is_complex: bool) -> float:
    """An upper bound, proved by Cholesky, of the largest eigenvalue of Hermitian matrices (blocks, n, n)."""
    n = gram.shape[1]
    eye = torch.eye(n, dtype=gram.dtype)
    mean = gram.diagonal(dim1=1, dim2=2).real.mean(1)  # at most the largest eigenvalue, and not zero
    guess, slack = float(torch.maximum(_rayleigh(gram)[0], mean).max()), 8 * n * EPS
    if len(gram) == 1 and n > 64:
        vector = _top_vector(gram[0])
        guess = max(guess, float((vector.conj() @ (gram[0] @ vector)).real / (vector.conj() @ vector).real))
    while True:
        bound = guess * (1 + slack)
        failed = torch.linalg.cholesky_ex(bound * eye - gram).info > 0
        if not bool(failed.any()):
            return bound + (4 if is_complex else 1) * (n + 4) * EPS * n * bound
        if n <= 64:
            guess = max(guess * (1 + 8 * n * EPS), float(torch.linalg.eigvalsh(gram[failed]).max()))
            gram = torch.cat([gram[failed], gram[~failed]])
        slack *= 4


def _rayleigh(gram: Tensor, steps: int = 16) -> tuple[Tensor, Tensor]:
    """Rayleigh quotients of every block after some power steps: lower estimates of the largest eigenvalues."""
    vector = _start(gram.shape[1], gram.dtype).expand(len(gram), -1)[..., None]
    for _ in range(steps):
        vector = gram @ vector
        vector = vector / torch.linalg.vector_norm(vector, dim=1, keepdim=True).clamp(min=1e-300)
    return (vector.mH @ gram @ vector).real.flatten(), vector[..., 0]


def _top_vector(gram: Tensor) -> Tensor:
    if len(gram) <= 256:
        return torch.linalg.eigh(gram).eigenvectors[:, -1]
    return _lanczos(lambda v: gram @ v, _start(len(gram), gram.dtype), steps=100)


def _start(size: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A fixed direction that is not orthogonal to anything by design: smooth part and noise."""
    noise = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (1 + 0.5 * noise).to(device, dtype)


def _lanczos(apply: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """The Ritz vector of the largest Ritz value of a Hermitian map, with full reorthogonalisation."""
    basis = [start / torch.linalg.vector_norm(start)]
    images: list[Tensor] = []
    for _ in range(min(steps, len(start))):
        images.append(apply(basis[-1]))
        residual, rows = images[-1], torch.stack(basis)
        for _ in range(2):
            residual = residual - rows.mT @ (rows.conj() @ residual)
        size = torch.linalg.vector_norm(residual)
        if not float(size) > 1e-13 * float(torch.linalg.vector_norm(images[-1])):
            break
        basis.append(residual / size)
    rows, columns = torch.stack(basis[: len(images)]), torch.stack(images)
    small = rows.conj() @ columns.mT
    weights = torch.linalg.eigh((small + small.mH) / 2).eigenvectors[:, -1]
    return rows.mT @ weights


def krylov_vector(linear_map: LinearMap, steps: int = 24) -> Tensor:
    """A vector (1, *domain) with nearly the largest |A v| / |v|, from a Krylov space of A*A."""
    dtype = torch.complex128 if linear_map.is_complex else torch.float64
    device = next((t.device for t in (*linear_map.parameters(), *linear_map.buffers())), torch.device("cpu"))
    shape = (1, *linear_map.domain)

    def gram(vector: Tensor) -> Tensor:
        return linear_map.T(linear_map(vector.reshape(shape))).flatten().to(dtype)

    return _lanczos(gram, _start(math.prod(linear_map.domain), dtype, device), steps).reshape(shape)


def krylov_lower_bound(linear_map: LinearMap, scale: float, steps: int = 24) -> float:
    """|A v| / |v| for v from a Krylov space of A*A, less the rounding of applying A, whose norm is at most `scale`."""
    vector = krylov_vector(linear_map, steps)
    quotient = float(torch.linalg.vector_norm(linear_map(vector)) / torch.linalg.vector_norm(vector))
    if not math.isfinite(quotient):
        raise NotCertifiable(f"{linear_map._get_name()} gives values that are not finite numbers; check its weights")
    error = max(m.application_error for m in linear_map.modules() if isinstance(m, LinearMap))
    return max(quotient - error * (quotient + scale), 0.0)


def positive_upper_bound(
    forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], start: Tensor, terms: int, steps: int
) -> float:
    """An upper bound of |A| for A with non-negative entries: |A|^2 <= max_i (A*A x)_i / x_i for every x > 0.

    `terms` is the largest number of products in one entry of A x or of A* y: sums of non-negative numbers have that
    many relative rounding errors. Source: Collatz 1942, Wielandt 1950; it is the Schur test with weights.
    """
    x, best = start, math.inf
    for _ in range(steps):
        image = adjoint(forward(x))
        best = min(best, float((image / x).max()))
        top = float(image.max())
        if not top > 0:
            break
        x = (image / top).clamp(min=1e-9)
    return math.sqrt(best) * (1 + 4 * (terms + 4) * EPS)
