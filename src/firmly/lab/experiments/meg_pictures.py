"""Sources in the head as a picture: three views, a disc for every source."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.lab.pictures import coloured

VIEWS = ((0, 1, 2, 1.0), (1, 2, 0, -1.0), (1, 2, 0, 1.0))  # across, up, depth axis, sign of what is in front
SIZE = 150  # pixels of a view
REACH = 0.125  # metres from the middle to the border


def picture_of_sources(strength: Tensor, positions: Tensor) -> bytes:
    """Sources from above, from the left and from the right, (nose up, to the left, to the right), as a PNG."""
    share = strength / strength.max().clamp(min=1e-300)
    centred = positions - (positions.amin(0) + positions.amax(0)) / 2
    return coloured(torch.cat([_view(share, centred, *view) for view in VIEWS], 1))


def _view(share: Tensor, centred: Tensor, across: int, up: int, depth: int, front: float) -> Tensor:
    flip = -1.0 if front < 0 else 1.0
    grid = (torch.arange(SIZE) + 0.5) / SIZE * 2 * REACH - REACH
    picture = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    seen = centred[:, depth] * front >= -0.02
    for point, value in zip(centred[seen], share[seen].tolist()):
        radius = 0.002 + 0.008 * value
        x, y = flip * float(point[across]), -float(point[up])
        disc = (grid[None, :] - x).square() + (grid[:, None] - y).square() <= radius**2
        picture[disc] = picture[disc].clamp(min=0.12 + 0.88 * value)
    return picture
