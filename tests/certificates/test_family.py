"""Merged blocks stand for their groups: their error bounds reach every block that was left out."""

from __future__ import annotations

import torch

from firmly.certificates.family import Family
from firmly.certificates.signal import trace
from firmly.linear import Convolution, FourierBasis


def test_errors_of_representatives_cover_blocks_that_are_only_nearly_equal():
    kernel = torch.ones(3, 3, dtype=torch.float64) / 9
    kernel[0, 1] += 3e-13  # the symmetry holds to twelve digits only, far above the rounding of the symbol
    A = Convolution(kernel, (1, 16, 16))
    system = trace(torch.nn.Sequential(A), {"data": (1, 16, 16)}, ("data",))
    basis = FourierBasis((16, 16))
    family = Family(system, basis)
    assert len(family) < basis.blocks
    (traced,) = system.maps
    full, merged = traced.symbol(basis), family.symbol(traced)
    distance = (full.value[:, None, 0, 0] - merged.value[None, :, 0, 0]).abs()
    assert float(distance.amin(1).max()) > 5 * float(full.error.max())  # else the test could not fail
    covered = distance + full.error.reshape(-1, 1) <= merged.error * (1 + 1e-9)
    assert bool(covered.any(1).all())
