"""Bounds from norms of the linear part: the product of layers, and the averaged recursion."""

from __future__ import annotations

import torch

from firmly.certificates.blocks import Blocks, block_norms, sweep
from firmly.certificates.system import System
from firmly.linear.basis import Basis


def product_bound(system: System, basis: Basis) -> float:
    """g_i = |M_i| + sum_j |L_ij| s_j g_j with s_j the steepest slope of R_j: every layer at its worst, independently."""
    blocks = sweep(system, basis)
    steepest = [max(abs(float(s.low)), abs(float(s.high))) for s in blocks.slopes]
    return accumulated(blocks, steepest)


def averaged_bound(system: System, basis: Basis) -> float:
    """rho_i = |Lin_i| + sum_j |G_ij| rho_j after R = (a+b)/2 Id + (b-a)/2 N with N nonexpansive.

    For a chain of firmly nonexpansive layers this is the constant theta of Combettes and Pesquet (2020) in O(m^2)
    norms instead of 2^m; for forward-backward it is the direct bias recursion, and for algorithms on product spaces
    its general form. Derived in docs/theory/averaged.
    """
    blocks = sweep(system, basis, averaged=True)
    return accumulated(blocks, [1.0] * len(blocks.slopes))


def accumulated(blocks: Blocks, factors: list[float]) -> float:
    """x_i = |rows_i on d| + sum_{j<i} |rows_i on column j| factors_j x_j; returns the value for the output, rounded up."""
    everything = slice(0, blocks.inputs[-1].stop)
    gains: list[float] = []
    for row in [*blocks.rows, blocks.output]:
        total = float(block_norms(row, everything).max())
        for columns, factor, gain in zip(blocks.columns, factors, gains):
            total += float(block_norms(row, columns).max()) * factor * gain
        gains.append(total * (1 + 4 * (len(gains) + 2) * torch.finfo(torch.float64).eps))
    return gains[-1]
