"""Bounds from norms of the linear part: the product of layers, and the averaged recursion."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from firmly.certificates.blocks import Blocks, Form, block_norms
from firmly.certificates.family import Family
from firmly.certificates.forward_backward import virtual_bound
from firmly.linear.symbol import Symbol
from firmly.prox.prior import Slope

EPS = torch.finfo(torch.float64).eps


def product_bound(source: Blocks | Family) -> float:
    """g_i = |M_i| + sum_j |L_ij| s_j g_j with s_j the steepest slope of R_j: every layer at its own worst."""
    table, slopes = gain_table(source, "closed")
    return accumulated(table, [max(abs(float(s.low)), abs(float(s.high))) for s in slopes])


def averaged_bound(source: Blocks | Family) -> float:
    """rho_i = |Lin_i| + sum_j |G_ij| rho_j after R = (a+b)/2 Id + (b-a)/2 N with N nonexpansive.

    For a chain of firmly nonexpansive layers this is the constant theta of Combettes and Pesquet (2020) in O(m^2)
    norms instead of 2^m; for forward-backward it is the direct bias recursion, and for algorithms on product spaces
    its general form. Derived in docs/theory/averaged.
    """
    table, slopes = gain_table(source, "averaged")
    return accumulated(table, [1.0] * len(slopes))


def accumulated(table: Tensor, factors: list[float]) -> float:
    """x_i = |rows_i on d| + sum_{j<i} |rows_i on column j| factors_j x_j; the value for the output, rounded up."""
    gains: list[float] = []
    for norms in table.tolist():
        total = norms[0] + sum(n * f * g for n, f, g in zip(norms[1:], factors, gains))
        gains.append(total * (1 + 4 * (len(gains) + 2) * EPS))
    return gains[-1]


def gain_table(source: Blocks | Family, form: Form) -> tuple[Tensor, list[Slope]]:
    """The largest norm over all blocks of every row (z_1, z_2, ..., output) on every source (d, v_1, v_2, ...)."""
    table, slopes = None, []
    for blocks in source.parts(form):
        groups, slopes = [slice(0, blocks.inputs[-1].stop), *blocks.columns], blocks.slopes
        norms = torch.stack([group_norms(row, groups) for row in [*blocks.rows, blocks.output]])
        table = norms if table is None else torch.maximum(table, norms)
    assert table is not None
    return table, slopes


def group_norms(row: Symbol, groups: list[slice]) -> Tensor:
    """The largest spectral norm over the blocks of the columns of every group."""
    if row.value.shape[1] > 1:
        return torch.stack([block_norms(row, columns).max() for columns in groups])
    squares = row.value[:, 0].abs().square()
    owner = torch.cat([torch.full((g.stop - g.start,), i) for i, g in enumerate(groups)])
    sums = torch.zeros(len(squares), len(groups), dtype=squares.dtype).index_add(1, owner, squares)
    error = 0.0 if row.error is None else row.error.max()
    return sums.amax(0).sqrt() * (1 + len(owner) * 4 * EPS) + error


# 'direct' is the name of the averaged recursion where it runs on the data of forward-backward.
NORM_BOUNDS: dict[str, Callable[[Blocks | Family], float]] = {
    "product": product_bound,
    "averaged": averaged_bound,
    "direct": averaged_bound,
    "virtual": virtual_bound,
}
