"""Losses of many atoms and their nominal masses, passed over in pieces that stay in the cache, in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import copy

import torch
from torch import Tensor

from firmly.errors import DataError

PIECE = 1 << 16  # atoms; on a CPU, temporaries of ten million would cost more than the arithmetic
FEW_ROWS = 32

Part = Callable[[Tensor, Tensor], Tensor]


class Rows:
    """Rows of losses (rows, atoms) with nominal laws on them, of which masses (rows, atoms) are a multiple.

    No masses are equal masses; an atom of mass 0 does not exist, whatever its loss. All sums are in float64, on losses
    shifted and scaled into [-1, 0]: `high` and `width` (rows, 1) take them back.
    """

    def __init__(self, losses: Tensor, masses: Tensor | None):
        if losses.shape[1] == 0:
            raise DataError("there are no losses")
        self.losses, self.masses = losses, masses
        if masses is None:
            low, high = losses.amin(1, keepdim=True), losses.amax(1, keepdim=True)
            self.total = low.new_full(low.shape, losses.shape[1], dtype=torch.float64)
        else:
            exists = masses > 0
            low = torch.where(exists, losses, torch.inf).amin(1, keepdim=True)
            high = torch.where(exists, losses, -torch.inf).amax(1, keepdim=True)
            self.total = masses.sum(1, keepdim=True, dtype=torch.float64)
            if bool((self.total == 0).any()):
                row = int((self.total == 0).flatten().nonzero()[0])
                raise DataError(f"row {row} has no valid loss: take it out of the batch")
        width = high.double() - low.double()
        if not bool(width.isfinite().all()):
            raise DataError("some of the valid losses are NaN, infinite or nearly so; mask them, or clip the loss")
        self.high, self.width = high.double(), torch.where(width > 1e-290, width, 0)
        self.unit = torch.where(self.width > 0, self.width, 1)
        self.low_loss, self.high_loss = low, high

    def scaled(self, losses: Tensor) -> Tensor:
        """Losses on the scale of the sums, equal ones to equal numbers."""
        return losses.to(torch.float64, copy=True).sub_(self.high).mul_(1 / self.unit)

    def pieces(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Where, the scaled losses (0 where nothing exists), and the nominal masses, of sum one over all pieces."""
        count = self.losses.shape[1]
        cut = self.losses.device.type == "cpu" and len(self.losses) <= FEW_ROWS
        size = max(PIECE // len(self.losses), 1) if cut else count
        for start in range(0, count, size):
            where = slice(start, start + size)
            scaled = self.scaled(self.losses[:, where])
            if self.masses is None:
                yield where, scaled, 1 / self.total
            else:
                mass = self.masses[:, where].double() / self.total
                yield where, torch.where(mass > 0, scaled, 0), mass

    def sums(self, *parts: Part) -> list[Tensor]:
        """The sums (rows, 1) over atoms of part(scaled losses, masses), for every part."""
        totals = [torch.zeros_like(self.total) for _ in parts]
        for _, scaled, mass in self.pieces():
            for total, part in zip(totals, parts, strict=True):
                total += part(scaled, mass).sum(1, keepdim=True)
        return totals

    def moments(self, weigh: Part) -> tuple[Tensor, Tensor, Tensor]:
        """The sums (rows, 1) of w, w l and w l^2 over the scaled losses l, for w = weigh(l, mass)."""
        zero, one, two = (torch.zeros_like(self.total) for _ in range(3))
        for _, scaled, mass in self.pieces():
            weights = weigh(scaled, mass)
            first = weights * scaled
            zero += weights.sum(1, keepdim=True)
            one += first.sum(1, keepdim=True)
            two += torch.linalg.vecdot(first, scaled).unsqueeze(1)
        return zero, one, two

    def law(self, weigh: Part) -> tuple[Tensor, Tensor]:
        """The law (rows, atoms) proportional to weigh(l, mass), in the precision of the losses, and its mean loss."""
        law = torch.empty_like(self.losses)
        total, mean = torch.zeros_like(self.total), torch.zeros_like(self.total)
        for where, scaled, mass in self.pieces():
            weights = weigh(scaled, mass)
            total += weights.sum(1, keepdim=True)
            mean += torch.linalg.vecdot(weights, scaled).unsqueeze(1)
            law[:, where] = weights
        return law.mul_((1 / total).to(law.dtype)), (self.high + self.unit * mean / total).squeeze(1)

    def nominal(self) -> tuple[Tensor, Tensor]:
        """The nominal law and its mean loss."""
        return self.law(lambda scaled, mass: mass.expand_as(scaled))

    def largest(self) -> Tensor:
        """The nominal mass (rows, 1) of the largest losses."""
        if self.masses is None:
            return torch.count_nonzero(self.losses == self.high_loss, 1).unsqueeze(1) / self.total
        return self.sums(lambda scaled, mass: torch.where(scaled == 0, mass, 0))[0]

    def largest_part(self, fraction: float) -> Part:
        """The part of the nominal masses that holds the largest losses and makes up `fraction` of the mass."""
        level, share = self.quantile(fraction)
        return lambda scaled, mass: torch.where(scaled > level, mass, torch.where(scaled == level, share * mass, 0))

    def quantile(self, fraction: float) -> tuple[Tensor, Tensor]:
        """The scaled loss at which the largest `fraction` of the mass ends, and how much of the masses there it takes.

        By a selection where all rows have equally many atoms of equal mass, else by a sort.
        """
        losses, masses = self.losses, self.masses
        if masses is not None:
            losses = torch.where(masses > 0, losses, -torch.inf)
        count = float(self.total[0])
        if (masses is None or masses.dtype == torch.bool) and bool((self.total == count).all()):
            rank = min(max(math.ceil(fraction * count * (1 - 1e-14)), 1), int(count))
            level = torch.kthvalue(losses, losses.shape[1] - rank + 1, dim=1, keepdim=True).values
        else:
            ordered, order = losses.sort(dim=1, descending=True)
            held = torch.ones_like(losses) if masses is None else masses
            reached = held.gather(1, order).cumsum(1, dtype=torch.float64) >= fraction * (1 - 1e-14) * self.total
            last = torch.where(reached, 0, 1).sum(1, keepdim=True).clamp(max=losses.shape[1] - 1)
            level = ordered.gather(1, last)
            level = torch.where(level.isinf(), self.low_loss, level)  # rounding of the last sum
        level = self.scaled(level)
        above, tied = self.sums(
            lambda scaled, mass: torch.where(scaled > level, mass, 0),
            lambda scaled, mass: torch.where(scaled == level, mass, 0),
        )
        return level, ((fraction - above) / tied).clamp(0, 1)

    def above(self, level: Tensor) -> Rows:
        """The same sums for functions that vanish up to a level, on fewer atoms where that is worth a copy."""
        if len(self.losses) > 1:
            return self
        kept = self.losses >= float(self.high + self.unit * (level - 1e-6))  # a superset, also where this is rounded
        if 4 * int(kept.sum()) > self.losses.shape[1]:
            return self
        fewer = copy(self)
        fewer.losses = self.losses[kept].unsqueeze(0)
        fewer.masses = None if self.masses is None else self.masses[kept].unsqueeze(0)
        return fewer

    def dense(self) -> tuple[Tensor, Tensor]:
        """Losses (0 where nothing exists) and nominal weights (rows, atoms), in float64."""
        losses = self.losses.double()
        if self.masses is None:
            return losses, torch.ones_like(losses) / self.total
        return torch.where(self.masses > 0, losses, 0), self.masses.double() / self.total
