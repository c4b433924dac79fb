"""Linear systems known by the products with their matrix, for a batch of right sides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

KRYLOV = 60  # vectors kept
LOOK = 5  # steps between estimates of the residual


def gmres(
    apply: Callable[[Tensor], Tensor], right: Tensor, tol: float, max_products: int = 1000
) -> tuple[Tensor, float]:
    """(x, residual) with apply(x) near right, both (batch, *shape), and residual = max over the batch of
    |right - apply(x)| / |right|, measured at this x (0 where right vanishes).

    `apply` is linear and treats every element of the batch alone. Restarted after 60 products; ends at a residual of at
    most `tol`, after `max_products` products, or when a restart gains nothing. Source: Saad and Schultz, 1986.
    """
    size = norms(right)
    x, left = torch.zeros_like(right), right
    residual = float(relative(norms(left), size).max())
    products = 0
    while residual > tol and products < max_products:
        step, used = krylov_step(apply, left, tol * size)
        trial = x + step
        left_after = right - apply(trial)
        after = float(relative(norms(left_after), size).max())
        products += used + 1
        if not after < residual:
            break
        x, left, residual = trial, left_after, after
    return x, residual


def krylov_step(apply: Callable[[Tensor], Tensor], left: Tensor, target: Tensor) -> tuple[Tensor, int]:
    """The element of the Krylov space of `left` with the least |left - apply(element)|, and the products it took."""
    size = norms(left)
    basis = over(left, size).flatten(1)[:, None]  # (batch, vectors, n), as long as needed or twice that
    columns: list[Tensor] = []  # of the Hessenberg matrix, each (batch, rows)
    weights = left.new_zeros(len(left), 0)
    limit = min(KRYLOV, left[0].numel())
    for k in range(limit):
        kept = basis[:, : k + 1]
        flat, coefficients = apply(kept[:, k].reshape(left.shape)).flatten(1), torch.zeros_like(kept[:, :, 0])
        for _ in range(2):
            part = (kept.conj() @ flat[:, :, None])[:, :, 0]
            flat, coefficients = flat - (kept.mT @ part[:, :, None])[:, :, 0], coefficients + part
        height = torch.linalg.vector_norm(flat, dim=1)
        columns.append(torch.cat([coefficients, height[:, None].to(coefficients.dtype)], dim=1))
        if k + 1 == basis.shape[1]:
            basis = torch.cat([basis, torch.zeros_like(basis)], 1)
        basis[:, k + 1] = over(flat, height)
        if (k + 1) % LOOK == 0 or k + 1 == limit:
            weights, missing = least_squares(columns, size)
            if bool((missing <= 0.5 * target).all()):
                break
    count = len(columns)
    return (basis[:, :count].mT @ weights[:, :, None])[:, :, 0].reshape(left.shape), count


def least_squares(columns: list[Tensor], size: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of the basis vectors, and the residual that they leave."""
    count = len(columns)
    H = torch.stack([torch.nn.functional.pad(c, (0, count + 1 - c.shape[1])) for c in columns], dim=2)
    first = torch.zeros_like(H[:, :, 0])
    first[:, 0] = size
    Q, R = torch.linalg.qr(H)
    pivots = R.diagonal(dim1=1, dim2=2).abs()
    if bool((pivots.amin(1) > 1e3 * torch.finfo(H.dtype).eps * pivots.amax(1)).all()):
        weights = torch.linalg.solve_triangular(R, Q.mH @ first[:, :, None], upper=True)[:, :, 0]
    else:  # some have reached an invariant subspace before others
        weights = (torch.linalg.pinv(H) @ first[:, :, None])[:, :, 0]
    return weights, torch.linalg.vector_norm(first - (H @ weights[:, :, None])[:, :, 0], dim=1)


def norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def over(x: Tensor, size: Tensor) -> Tensor:
    """Every element divided by its size, zero where that vanishes."""
    inverse = torch.where(size > 0, 1 / size, 0.0)
    return x * inverse.reshape(-1, *[1] * (x.dim() - 1))


def relative(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, part)
