"""The Radon transform in parallel-beam geometry, the forward model of tomography."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from firmly.errors import ShapeError
from firmly.linear.sparse import Sparse


class Radon(Sparse):
    """Line integrals of an image (1, height, width) at `angles` (radians): data (1, angles, detectors).

    The ray at angle a and offset s is x cos a + y sin a = s, with x to the right and y up from the image's centre;
    pixels and the gaps between rays have size one. Each ray steps along its steeper axis and interpolates linearly
    between the two pixels at every row or column. The matrix is built once and has non-negative entries; the adjoint is
    exact. `detectors` defaults to the smallest odd number that covers the diagonal.
    Source: Joseph, An improved algorithm for reprojecting rays through pixel images, 1982.
    """

    def __init__(self, shape: Sequence[int], angles: Tensor | Sequence[float], detectors: int | None = None):
        if len(shape) != 3 or shape[0] != 1:
            raise ShapeError(f"Radon takes a domain (1, height, width), given {tuple(shape)}")
        angles = torch.as_tensor(angles, dtype=torch.float64).flatten()
        if detectors is None:
            detectors = 2 * math.ceil(math.hypot(*shape[1:]) / 2) + 1
        if len(angles) == 0 or detectors < 1:
            raise ShapeError(f"Radon takes at least one angle and one detector, given {len(angles)} and {detectors}")
        super().__init__(_joseph(shape[1], shape[2], angles, detectors), shape, (1, len(angles), detectors))
        self.hold("angles", angles)


def _joseph(height: int, width: int, angles: Tensor, detectors: int):
    """The sparse matrix (angles * detectors, height * width) of all rays."""
    from scipy.sparse import coo_array

    offsets = torch.arange(detectors, dtype=torch.float64) - (detectors - 1) / 2
    pieces: list[tuple[Tensor, Tensor, Tensor]] = []
    for number, angle in enumerate(angles.tolist()):
        cosine, sine = math.cos(angle), math.sin(angle)
        rays = (number * detectors + torch.arange(detectors))[:, None]
        if abs(cosine) >= abs(sine):  # steep: one crossing in every row
            line = torch.arange(height)
            y = (height - 1) / 2 - line.to(torch.float64)
            crossing = (offsets[:, None] - y * sine) / cosine + (width - 1) / 2
            size, start, stride = width, line * width, 1
        else:
            line = torch.arange(width)
            x = line.to(torch.float64) - (width - 1) / 2
            crossing = (height - 1) / 2 - (offsets[:, None] - x * cosine) / sine
            size, start, stride = height, line, width
        length = 1 / max(abs(cosine), abs(sine))
        below = crossing.floor()
        for pixel, share in ((below, 1 - (crossing - below)), (below + 1, crossing - below)):
            inside = (pixel >= 0) & (pixel <= size - 1) & (share > 0)
            column = start + pixel.long() * stride
            pieces.append((rays.expand_as(column)[inside], column[inside], length * share[inside]))
    rows, columns, values = (torch.cat(part).numpy() for part in zip(*pieces))
    return coo_array((values, (rows, columns)), shape=(len(angles) * detectors, height * width)).tocsr()
