"""Densities to learn with a normalising flow: three in the plane that are known exactly, and tables that are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from firmly.errors import SettingsError

Table = Literal["wine", "breast-cancer"]


class Density(Protocol):
    """Points of the plane with a density that is known."""

    @property
    def name(self) -> str: ...

    def sample(self, count: int, generator: torch.Generator) -> Tensor: ...  # (count, 2)

    def log_prob(self, x: Tensor) -> Tensor: ...  # (batch, 2) -> (batch,), in nats


@dataclass(frozen=True)
class NoisyCurve:
    """A point of a curve at uniform t in [0, 1], plus normal noise of deviation `noise` in every direction."""

    name: str
    curve: Callable[[Tensor], Tensor]  # (count,) -> (count, 2)
    noise: float
    nodes: int = 2000

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        t = torch.rand(count, generator=generator)
        return self.curve(t) + self.noise * torch.randn(count, 2, generator=generator)

    def log_prob(self, x: Tensor) -> Tensor:
        """By the midpoint rule along the curve, whose nodes lie several times denser than the noise."""
        t = (torch.arange(self.nodes, dtype=torch.float64, device=x.device) + 0.5) / self.nodes
        squared = torch.cdist(x.double(), self.curve(t)).square()
        normal = -squared / (2 * self.noise**2) - math.log(2 * math.pi * self.noise**2)
        return normal.logsumexp(1) - math.log(self.nodes)


@dataclass(frozen=True)
class Checkerboard:
    """Uniform on the eight dark squares, of side 2, of a board on [-4, 4]^2."""

    name: str = "checkerboard"

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        row = torch.randint(0, 4, (count,), generator=generator)
        column = 2 * torch.randint(0, 2, (count,), generator=generator) + row % 2
        corner = torch.stack([column, row], 1) * 2.0 - 4.0
        return corner + 2 * torch.rand(count, 2, generator=generator)

    def log_prob(self, x: Tensor) -> Tensor:
        square = torch.floor(x / 2)
        dark = (square.sum(1) % 2 == 0) & (x.abs() < 4).all(1)
        return torch.where(dark, -math.log(32), -math.inf).to(torch.float64)


def moons(t: Tensor) -> Tensor:
    """Two half circles, one for t below 1/2."""
    angle, upper = math.pi * ((2 * t) % 1), t < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    return torch.stack([x, torch.where(upper, angle.sin(), 0.5 - angle.sin())], 1)


def spirals(t: Tensor) -> Tensor:
    """Two arms of one and a half turns, one for t below 1/2, with points spread evenly over their length."""
    angle = 3 * math.pi * ((2 * t) % 1).sqrt()
    arm = torch.where(t < 0.5, 1.0, -1.0) * angle / 3
    return torch.stack([-arm * angle.cos(), arm * angle.sin()], 1)


PLANE: tuple[Density, ...] = (
    NoisyCurve("two moons", moons, 0.1),
    NoisyCurve("two spirals", spirals, 0.15),
    Checkerboard(),
)


class Split(NamedTuple):
    """Rows (count, features) of a table, standardised by the mean and deviation of the training rows."""

    train: Tensor
    validation: Tensor
    test: Tensor


def table_split(name: Table, seed: int) -> Split:
    """A random split, 60, 20 and 20 percent, of a table that comes with scikit-learn.

    "wine" has 178 rows of 13 chemical measurements, "breast-cancer" 569 rows of 30 of cell nuclei (UCI). Raises
    `SettingsError` without scikit-learn.
    """
    try:
        from sklearn.datasets import load_breast_cancer, load_wine
    except ImportError as error:
        raise SettingsError("the tables come with scikit-learn: pip install 'firmly[sklearn]'") from error
    loaders = {"wine": load_wine, "breast-cancer": load_breast_cancer}
    if name not in loaders:
        raise SettingsError(f"a table is one of {', '.join(loaders)}; given {name!r}")
    rows = torch.from_numpy(loaders[name]().data).to(torch.float64)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    ends = [int(0.6 * len(rows)), int(0.8 * len(rows))]
    train, validation, test = rows[order].tensor_split(ends)
    mean, deviation = train.mean(0), train.std(0)
    return Split(*((part - mean) / deviation for part in (train, validation, test)))
