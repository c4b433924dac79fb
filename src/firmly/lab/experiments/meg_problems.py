"""Simulated fields of dipoles, and what a network that looks for them is trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from firmly.priors.sources import SourceModel

TRIALS = 50  # a simulated response is the mean of so many
TIMES = 30
CURRENT = 30.0  # nAm


def two_dipoles(model: SourceModel, positions: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The benchmark problem: indices of two sources at least 5 cm apart, and their whitened field (1, time, sensors).

    Courses 30 nAm sin(pi t) and 30 nAm sin(pi t) cos(4 pi t), noise of unit variance per trial, the mean of 50.
    """
    import numpy as np

    rng = np.random.RandomState(seed)
    while True:
        chosen = torch.from_numpy(rng.choice(model.sources, 2, replace=False))
        if float((positions[chosen[0]] - positions[chosen[1]]).norm()) >= 0.05:
            break
    t = torch.linspace(0, 1, TIMES, dtype=torch.float64)
    courses = torch.zeros(TIMES, model.sources, model.orientations, dtype=torch.float64)
    courses[:, chosen[0], 0] = CURRENT * (math.pi * t).sin()
    courses[:, chosen[1], 0] = CURRENT * (math.pi * t).sin() * (4 * math.pi * t).cos()
    noise = torch.from_numpy(rng.randn(model.sensors, TIMES)).mT
    return chosen, (math.sqrt(TRIALS) * courses.flatten(1) @ model.matrix.mT + noise)[None]


def random_sources(model: SourceModel, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Windows with one to three dipoles of random place, direction, strength and course, and who they are.

    Returns whitened fields (batch, time, sensors), courses (batch, time, sources, orientations) and indices.
    """
    t = torch.linspace(0, 1, TIMES, dtype=torch.float64)
    courses = torch.zeros(batch, TIMES, model.sources, model.orientations, dtype=torch.float64)
    chosen = []
    for b in range(batch):
        count = int(torch.randint(1, 4, (), generator=generator))
        chosen.append(torch.randperm(model.sources, generator=generator)[:count])
        for source in chosen[-1]:
            size, frequency, phase, *direction = torch.rand(3 + model.orientations, generator=generator).tolist()
            way = torch.tensor(direction, dtype=torch.float64) - 0.5
            wave = (math.pi * t).sin() * (4 * math.pi * frequency * t + 2 * math.pi * phase).cos()
            courses[b, :, source] = CURRENT * (0.3 + 0.7 * size) * wave[:, None] * way / way.norm()
    noise = torch.randn(batch, TIMES, model.sensors, generator=generator, dtype=torch.float64)
    return math.sqrt(TRIALS) * courses.flatten(2) @ model.matrix.mT + noise, courses, chosen


class WhereItIs(nn.Module):
    """How much of what a network finds lies near every source: shares (batch, sources) of the sum of all strengths."""

    near: Tensor

    def __init__(self, network: nn.Module, model: SourceModel, positions: Tensor, blur: float):
        super().__init__()
        self.network = network
        self.model = model
        near = (-(torch.cdist(positions, positions) / blur).square() / 2).exp()
        self.register_buffer("near", near.float(), persistent=False)

    def forward(self, y: Tensor) -> Tensor:
        power = self.network(y).unflatten(2, (self.model.sources, self.model.orientations)).square().sum((1, 3))
        strength = torch.where(power > 0, torch.where(power > 0, power, 1).sqrt(), 0)
        return strength / strength.sum(1, keepdim=True).clamp(min=1e-6) @ self.near


def missed(share: Tensor, active: Tensor) -> Tensor:
    """-log of the share near every active source, on average: to miss a weak source costs as much as a strong one.

    `active` (batch, sources) is one at the true sources and zero elsewhere.
    """
    return -(active * (share + 1e-3).log()).sum() / active.sum()


def as_mask(chosen: list[Tensor], sources: int) -> Tensor:
    """(batch, sources), one at the chosen sources."""
    mask = torch.zeros(len(chosen), sources)
    for row, indices in zip(mask, chosen):
        row[indices] = 1
    return mask
