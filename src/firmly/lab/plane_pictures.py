"""Pictures of the plane: a grid through a layer, in another colour where it folds, and where points are."""

from __future__ import annotations

import io

import torch
from torch import Tensor

from firmly.networks.bregman_grid import Grid

SIDE = 420  # pixels
STRAIGHT, FOLDED = (40, 70, 120), (214, 72, 40)


def grid_picture(grid: Grid, extent: float | None = None) -> bytes:
    """A PNG of the images of the lines; pieces where the plane is folded over are orange.

    `extent` is the half side of what is shown (None: everything).
    """
    from PIL import Image, ImageDraw

    half = float(grid.images.abs().max()) * 1.02 if extent is None else extent
    scale = 2  # drawn larger and reduced, for smooth lines
    picture = Image.new("RGB", (SIDE * scale, SIDE * scale), "white")
    pen = ImageDraw.Draw(picture)

    def pixel(point: list[float]) -> tuple[float, float]:
        return (point[0] / half + 1) / 2 * SIDE * scale, (1 - point[1] / half) / 2 * SIDE * scale

    for folded in (False, True):  # folded pieces on top
        for line, signs in zip(grid.images.tolist(), grid.determinants.tolist()):
            for k in range(len(line) - 1):
                if (min(signs[k], signs[k + 1]) < 0) == folded:
                    pen.line([pixel(line[k]), pixel(line[k + 1])], FOLDED if folded else STRAIGHT, 2 * scale)
    buffer = io.BytesIO()
    picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS).quantize(32).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def histogram(points: Tensor, extent: float, bins: int = 140) -> Tensor:
    """How many of the points (count, 2) are in each of bins x bins squares of [-extent, extent]^2, relative to the
    99.5 percent quantile of those that are not empty: (bins, bins), the first row is the top."""
    cell = torch.floor((points.detach().cpu().double() / extent + 1) / 2 * bins).long()
    cell = cell[((cell >= 0) & (cell < bins)).all(1)]
    counts = torch.zeros(bins, bins, dtype=torch.float64)
    counts.index_put_((bins - 1 - cell[:, 1], cell[:, 0]), torch.ones(len(cell), dtype=torch.float64), accumulate=True)
    filled = counts[counts > 0]
    return counts / torch.quantile(filled, 0.995) if len(filled) else counts
