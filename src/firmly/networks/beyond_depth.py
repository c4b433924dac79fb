"""What a network does beyond its depth: iterate its last layers and see where they go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from firmly.algorithms.algorithm import Algorithm, Condition
from firmly.errors import SettingsError
from firmly.fixedpoint.solve import Status, solve
from firmly.networks.unroll import Unrolled


class BeyondDepth(NamedTuple):
    """The limit of the last layers, how it was reached, and how far the output of the network is from it.

    `distance` (batch,) is |net(y) - limit| / |limit|, the absolute distance where the limit is 0; it means something
    only if `status` is CONVERGED. `residuals` lists (iteration, |T z - z| / |z|, the largest of the batch).
    """

    limit: Tensor
    status: Status
    distance: Tensor
    residuals: list[tuple[int, float]]


class Cycle(Algorithm):
    """Several layers as one iteration."""

    def __init__(self, layers: Sequence[Algorithm]):
        super().__init__()
        self.parts = torch.nn.ModuleList(layers)
        self.data_shape, self.image_shape = layers[0].data_shape, layers[0].image_shape

    def start(self, y: Tensor, x: Tensor | None = None) -> Any:
        return self.parts[0].start(y, x)

    def step(self, state: Any, y: Tensor, k: int) -> Any:
        for part in self.parts:
            state = part.step(state, y, k)
        return state

    def read(self, state: Any) -> Tensor:
        return self.parts[-1].read(state)

    def conditions(self) -> list[Condition]:
        return []


@torch.no_grad()
def beyond_depth(
    net: Unrolled, y: Tensor, layers: int = 1, tol: float = 1e-8, max_iterations: int = 2000
) -> BeyondDepth:
    """Iterate the last `layers` layers of the network, as one map, from its output net(y).

    No condition is asked for: whether a learned network converges is what this finds out. Raises `SettingsError` if the
    network has fewer layers.
    """
    if not 1 <= layers <= len(net.layers):
        raise SettingsError(f"layers is between 1 and the depth {len(net.layers)}, given {layers}")
    last = Cycle(list(net.layers)[-layers:]) if layers > 1 else net.layers[-1]
    output = net(y)
    waive = [c.name for c in last.conditions()]
    found = solve(last, y, tol=tol, max_iterations=max_iterations, start=output, waive=waive)
    size = found.x.flatten(1).norm(dim=1)
    away = (output - found.x).flatten(1).norm(dim=1)
    return BeyondDepth(found.x, found.status, away / torch.where(size > 0, size, 1.0), found.stats["residuals"])
