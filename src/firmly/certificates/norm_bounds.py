"""Bounds from norms of the linear part: the product of layers, and the averaged recursion."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from firmly.certificates.blocks import Blocks, block_norms, sweep
from firmly.certificates.forward_backward import virtual_bound
from firmly.linear.symbol import Symbol

EPS = torch.finfo(torch.float64).eps


def product_bound(blocks: Blocks) -> float:
    """g_i = |M_i| + sum_j |L_ij| s_j g_j with s_j the steepest slope of R_j: every layer at its own worst."""
    steepest = [max(abs(float(s.low)), abs(float(s.high))) for s in blocks.slopes]
    return accumulated(blocks, steepest)


def averaged_bound(blocks: Blocks) -> float:
    """rho_i = |Lin_i| + sum_j |G_ij| rho_j after R = (a+b)/2 Id + (b-a)/2 N with N nonexpansive.

    For a chain of firmly nonexpansive layers this is the constant theta of Combettes and Pesquet (2020) in O(m^2)
    norms instead of 2^m; for forward-backward it is the direct bias recursion, and for algorithms on product spaces
    its general form. Derived in docs/theory/averaged.
    """
    return accumulated(sweep(blocks.system, blocks.basis, averaged=True), [1.0] * len(blocks.slopes))


def accumulated(blocks: Blocks, factors: list[float]) -> float:
    """x_i = |rows_i on d| + sum_{j<i} |rows_i on column j| factors_j x_j; the value for the output, rounded up."""
    groups = [slice(0, blocks.inputs[-1].stop), *blocks.columns]
    gains: list[float] = []
    for row in [*blocks.rows, blocks.output]:
        norms = group_norms(row, groups[: len(gains) + 1])
        total = norms[0] + sum(n * f * g for n, f, g in zip(norms[1:], factors, gains))
        gains.append(total * (1 + 4 * (len(gains) + 2) * EPS))
    return gains[-1]


def group_norms(row: Symbol, groups: list[slice]) -> list[float]:
    """The largest spectral norm over all blocks of the columns of every group."""
    if row.value.shape[1] > 1:
        return [float(block_norms(row, columns).max()) for columns in groups]
    squares = row.value[:, 0, : groups[-1].stop].abs().square()
    owner = torch.cat([torch.full((g.stop - g.start,), i) for i, g in enumerate(groups)])
    sums = torch.zeros(len(squares), len(groups), dtype=squares.dtype).index_add(1, owner, squares)
    error: Tensor | float = 0.0 if row.error is None else float(row.error.max())
    return [float(n) * (1 + len(owner) * 4 * EPS) + float(error) for n in sums.amax(0).sqrt()]


# 'direct' is the name of the averaged recursion where it runs on the data of forward-backward.
NORM_BOUNDS: dict[str, Callable[[Blocks], float]] = {
    "product": product_bound,
    "averaged": averaged_bound,
    "direct": averaged_bound,
    "virtual": virtual_bound,
}
