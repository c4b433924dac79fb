"""What a layer of the plane does to a grid: lines stay apart where it is invertible, and fold over where it is not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from firmly.errors import ShapeError
from firmly.networks.bregman_inverse import jacobian
from firmly.networks.bregman_invertible import Residual, residual_of


class Grid(NamedTuple):
    """Lines of a square grid (lines, points, 2), their images under a layer, and the determinants of its Jacobian
    (lines, points), which are negative where the plane is folded over."""

    lines: Tensor
    images: Tensor
    determinants: Tensor

    @property
    def folded(self) -> float:
        """The proportion of points with a negative determinant."""
        return float((self.determinants < 0).double().mean())


@torch.no_grad()
def grid_lines(layer: nn.Module, extent: float = 3.0, lines: int = 13, points: int = 121) -> Grid:
    """The lines of a grid on [-extent, extent]^2, in dual coordinates, through u -> u + g(u), invertible or not.

    The first half of the lines are horizontal. Raises `ShapeError` for layers that are not of the plane.
    """
    residual: Residual = residual_of(layer)
    if residual.outer.codomain != (2,):
        raise ShapeError(f"a picture of a grid needs a layer of the plane, given {residual.outer.codomain}")
    across = torch.linspace(-extent, extent, lines, dtype=torch.float64)
    along = torch.linspace(-extent, extent, points, dtype=torch.float64)
    y, x = torch.meshgrid(across, along, indexing="ij")
    grid = torch.cat([torch.stack([x, y], -1), torch.stack([y, x], -1)])
    flat = grid.reshape(-1, 2)
    images = (flat + residual(flat)).reshape(grid.shape)
    return Grid(grid, images, torch.linalg.det(jacobian(residual, flat)).reshape(grid.shape[:2]))
