"""The ambiguity sets with exact duals: Kullback-Leibler, chi-square, conditional value at risk, total variation."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.errors import NotConverged
from firmly.robust.ambiguity import AmbiguitySet
from firmly.robust.rows import Rows

MAX_ITERATIONS = 200
MANY, SAMPLE = 1 << 18, 1 << 15  # atoms from which a guess by a sample is worth it, and those of the sample
TINY = torch.finfo(torch.float64).tiny


class KL(AmbiguitySet):
    """KL(q, p) <= radius, with KL(q, p) = sum_i q_i log(q_i / p_i).

    sup = min over eta > 0 of eta radius + eta log sum_i p_i exp(l_i / eta), q_i proportional to p_i exp(l_i / eta).
    t = 1 / eta is found by Newton's method on log KL(q_t, p) = log radius in log t, inside a bracket. From
    radius >= -log(mass of the largest losses) on, q is p restricted to the largest losses.

    Source: Hu and Hong, Kullback-Leibler divergence constrained distributionally robust optimization, 2013.
    """

    def worst(self, rows: Rows) -> tuple[Tensor, Tensor]:
        if self.size == 0:
            return rows.nominal()
        saturated = self.size >= -rows.largest().log()
        _, mean, square = rows.moments(lambda scaled, mass: mass.expand_as(scaled))
        t = (2 * self.size / (square - mean**2).clamp(min=1e-12)).sqrt()  # the root for small radii
        low, high = torch.zeros_like(t), torch.full_like(t, torch.inf)
        done = saturated | (rows.width == 0)
        for _ in range(MAX_ITERATIONS):
            divergence, growth, rounding = self.divergence(rows, t)
            done = done | ((divergence - self.size).abs() <= rounding) | (high <= low * (1 + 4e-16))
            if bool(done.all()):
                break
            below = divergence < self.size
            low, high = torch.where(below, t, low), torch.where(below, high, t)
            step = (divergence.clamp(min=TINY) / self.size).log() * divergence / growth.clamp(min=TINY)
            newton = t * (-step).clamp(-3, 3).exp()
            middle = torch.where(high.isinf(), 8 * t, torch.where(low == 0, t / 8, (low * high).sqrt()))
            t = torch.where(done, t, torch.where((newton > low) & (newton < high), newton, middle))
        else:
            raise NotConverged(f"the dual of a Kullback-Leibler ball of radius {self.size:g} did not settle")
        t = torch.where(saturated, torch.inf, t)
        return rows.law(lambda scaled, mass: mass * torch.where(scaled < 0, t * scaled, 0).exp())

    @staticmethod
    def divergence(rows: Rows, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For q proportional to p exp(t l): KL(q, p), its derivative in log t, and what rounding may make of it."""
        total, mean, square = rows.moments(lambda scaled, mass: mass * (t * scaled).exp())
        mean, square = mean / total, square / total
        rounding = 16 * torch.finfo(torch.float64).eps * ((t * mean).abs() + total.log().abs() + 1)
        return t * mean - total.log(), t**2 * (square - mean**2), rounding

    def curvature(self, losses: Tensor, nominal: Tensor, weights: Tensor, direction: Tensor) -> Tensor:
        t, centred, variance = exponent(losses, nominal, weights)
        change = direction - (weights * direction).sum(1, keepdim=True)
        along = (weights * change * centred).sum(1, keepdim=True) / torch.where(variance > 0, variance, 1)
        return t * weights * (change - along * centred)

    def drift(self, losses: Tensor, nominal: Tensor, weights: Tensor) -> Tensor:
        t, centred, variance = exponent(losses, nominal, weights)
        growth = t * variance
        return torch.where(growth > 0, weights * centred / torch.where(growth > 0, growth, 1), 0)


class KLPenalty(AmbiguitySet):
    """No ball but a price: sup over q of sum_i q_i l_i - temperature KL(q, p).

    The value is temperature log sum_i p_i exp(l_i / temperature): tilted losses, from the mean (temperature -> inf) to
    the maximum (-> 0). Among all adversaries it selects one that is unique, inside, and smooth in the losses.
    Source: Li, Beirami, Sanjabi and Smith, Tilted empirical risk minimization, 2021.
    """

    def __init__(self, temperature: float | Tensor = 1.0):
        super().__init__(temperature, low=TINY, meaning="temperature")

    def worst(self, rows: Rows) -> tuple[Tensor, Tensor]:
        t = rows.unit / self.size
        (less,) = rows.sums(lambda scaled, mass: mass * (t * scaled).expm1())  # keeps the digits of high temperatures
        (total,) = rows.sums(lambda scaled, mass: mass * (t * scaled).exp())
        logarithm = torch.where(less > -0.5, less.clamp(min=-0.75).log1p(), total.log())
        law, _ = rows.law(lambda scaled, mass: mass * (t * scaled).exp())
        return law, (rows.high + self.size * logarithm).squeeze(1)

    def curvature(self, losses: Tensor, nominal: Tensor, weights: Tensor, direction: Tensor) -> Tensor:
        return weights * (direction - (weights * direction).sum(1, keepdim=True)) / self.size

    def drift(self, losses: Tensor, nominal: Tensor, weights: Tensor) -> Tensor:
        return -weights * (losses - (weights * losses).sum(1, keepdim=True)) / self.size**2

    def slope(self, losses: Tensor, nominal: Tensor, weights: Tensor) -> Tensor:
        return -(torch.special.xlogy(weights, weights) - torch.special.xlogy(weights, nominal)).sum(1)


class Chi2(AmbiguitySet):
    """sum_i p_i (q_i / p_i - 1)^2 / 2 <= radius.

    sup = min over eta of eta + sqrt(1 + 2 radius) sqrt(sum_i p_i (l_i - eta)_+^2), and q_i is proportional to
    p_i (l_i - eta)_+. In closed form on the set A = {l > eta}: with its mass P, mean m and variance v, and
    a = 1 + 2 radius, eta = m - sqrt(v / (a P - 1)) and sup = m + sqrt((a P - 1) v); A shrinks from all atoms until it
    is unchanged. From a (mass of the largest losses) >= 1 on, q is p restricted to them.

    Sources: Duchi and Namkoong, Learning models with uniform performance via distributionally robust optimization,
    2021; the active sets are derived in docs/theory/robust_risks.
    """

    def worst(self, rows: Rows) -> tuple[Tensor, Tensor]:
        if self.size == 0:
            return rows.nominal()
        saturated = (1 + 2 * self.size) * rows.largest() >= 1
        eta = self.threshold(rows, saturated, None if bool(saturated.any()) else self.guess(rows))
        if bool(saturated.any()):
            slope = torch.where(saturated, torch.inf, -1 / eta)
            return rows.law(lambda scaled, mass: mass * torch.where(scaled < 0, 1 + slope * scaled, 1).clamp_(min=0))
        return rows.law(lambda scaled, mass: (1 - scaled / eta).clamp_(min=0).mul_(mass))

    def threshold(self, rows: Rows, saturated: Tensor, guess: Tensor | None = None) -> Tensor:
        """The scaled eta by shrinking active sets, from that of all atoms or of a guess.

        eta solves sum p (l - eta)_+^2 = a (sum p (l - eta)_+)^2. If a guess is too high, the closed form on its active
        set A is too low as long as a (mass of A) > 1/2: an atom between the two adds p x^2 on the left, and on the
        right at least 2 a (mass of A) p x^2.
        """
        eta = torch.full_like(rows.total, -1.0) if guess is None else guess  # the smallest loss: no cancellation
        held = rows
        for iteration in range(MAX_ITERATIONS):
            part, first, second = excess_moments(held, eta)
            part = torch.ones_like(part) if iteration == 0 and guess is None else part
            mean = first / part
            slack = ((1 + 2 * self.size) * part - 1).clamp(min=TINY)
            rise = mean - ((second / part - mean**2).clamp(min=0) / slack).sqrt()
            eta, from_guess = eta + rise, iteration == 0 and guess is not None
            if from_guess and not bool((slack > 1e-3).all()):
                return self.threshold(rows, saturated)
            if not from_guess and bool((saturated | (rise <= 1e-15)).all()):
                return eta
            held = held.above(eta) if bool((part < 0.25).all()) else held
        raise NotConverged(f"the dual of a chi-square ball of radius {self.size:g} did not settle")

    def guess(self, rows: Rows) -> Tensor | None:
        """eta of a sample of many atoms; None where they are few, or the sample cannot tell."""
        if len(rows.losses) > 1 or rows.losses.shape[1] < MANY:
            return None
        stride = rows.losses.shape[1] // SAMPLE
        masses = None if rows.masses is None else rows.masses[:, ::stride]
        if masses is not None and not bool((masses > 0).any()):
            return None
        sample = Rows(rows.losses[:, ::stride], masses)
        saturated = (1 + 2 * self.size) * sample.largest() >= 1
        if bool(saturated):
            return None
        found = (sample.high + sample.unit * self.threshold(sample, saturated) - rows.high) / rows.unit
        return found if -1 < float(found) < 0 else None

    def curvature(self, losses: Tensor, nominal: Tensor, weights: Tensor, direction: Tensor) -> Tensor:
        held, part, centred, variance = self._active(losses, nominal, weights)
        change = torch.where(held > 0, direction - (held * direction).sum(1, keepdim=True) / part, 0)
        along = (held * change * centred).sum(1, keepdim=True) / torch.where(variance > 0, variance, 1)
        spread = (weights * centred).sum(1, keepdim=True)  # the density q / p is affine in the loss, with this factor
        return torch.where(variance > 0, spread / variance, 0) * held * (change - along * centred)

    def drift(self, losses: Tensor, nominal: Tensor, weights: Tensor) -> Tensor:
        held, _, centred, _ = self._active(losses, nominal, weights)
        spread = (weights * centred).sum(1, keepdim=True)
        return torch.where(spread > 0, held * centred / torch.where(spread > 0, spread, 1), 0)

    @staticmethod
    def _active(losses: Tensor, nominal: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """On the atoms in play: nominal weights, their mass, centred losses, and sum of p times their squares."""
        held = torch.where(weights > 0, nominal, 0)
        part = held.sum(1, keepdim=True)
        shifted = below_top(losses, nominal)
        centred = torch.where(held > 0, shifted - (held * shifted).sum(1, keepdim=True) / part, 0)
        return held, part, centred, (held * centred**2).sum(1, keepdim=True)


class CVaR(AmbiguitySet):
    """q_i <= p_i / fraction: the mean of the largest `fraction` of the losses (of the smallest, where sense is "inf").

    sup = min over eta of eta + sum_i p_i (l_i - eta)_+ / fraction. By selection, without a sort where masses are equal;
    losses that tie at the end share what is left.
    Source: Rockafellar and Uryasev, Optimization of conditional value-at-risk, 2000.
    """

    def __init__(self, fraction: float | Tensor = 0.1):
        super().__init__(fraction, low=TINY, high=1.0, meaning="fraction")

    def worst(self, rows: Rows) -> tuple[Tensor, Tensor]:
        return rows.law(rows.largest_part(self.size))

    def drift(self, losses: Tensor, nominal: Tensor, weights: Tensor) -> Tensor:
        return largest_part_drift(losses, nominal, self.size)


class TotalVariation(AmbiguitySet):
    """sum_i |q_i - p_i| / 2 <= radius: that mass goes from the smallest losses to the largest.

    sup = radius max l + (1 - radius) times the mean of the largest 1 - radius of the losses.
    Source: Jiang and Guan, Risk-averse two-stage stochastic program with distributional ambiguity, 2018.
    """

    def __init__(self, radius: float | Tensor = 0.1):
        super().__init__(radius, high=1.0)

    def worst(self, rows: Rows) -> tuple[Tensor, Tensor]:
        if self.size == 1:
            return rows.law(lambda scaled, mass: torch.where(scaled == 0, mass, 0))
        part, received = rows.largest_part(1 - self.size), self.size / rows.largest()
        return rows.law(lambda scaled, mass: part(scaled, mass) + received * torch.where(scaled == 0, mass, 0))

    def drift(self, losses: Tensor, nominal: Tensor, weights: Tensor) -> Tensor:
        at_top = torch.where(below_top(losses, nominal) == 0, nominal, 0)
        kept, at_top = 1 - self.size, at_top / at_top.sum(1, keepdim=True)
        if kept == 0:
            return torch.zeros_like(losses)
        part, _ = CVaR(kept).worst(Rows(losses, nominal))
        return at_top - part - kept * largest_part_drift(losses, nominal, kept)


def largest_part_drift(losses: Tensor, nominal: Tensor, fraction: float) -> Tensor:
    """The derivative of the law of `Rows.largest_part` in the fraction: what is above shrinks, ties at its end grow."""
    rows = Rows(losses, nominal)
    level, _ = rows.quantile(fraction)
    scaled = rows.scaled(losses)
    above, tied = torch.where(scaled > level, nominal, 0), torch.where(scaled == level, nominal, 0)
    return (tied * (above.sum(1, keepdim=True) / tied.sum(1, keepdim=True)) - above) / fraction**2


def excess_moments(rows: Rows, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mass (rows, 1) of the losses above eta, and the sums of their excess over it and of its square."""
    mass_above, first, second = (torch.zeros_like(eta) for _ in range(3))
    for _, scaled, mass in rows.pieces():
        excess = scaled.sub_(eta).clamp_(min=0)  # a piece is a copy
        if rows.masses is None:
            first += mass * excess.sum(1, keepdim=True)
            second += mass * torch.linalg.vecdot(excess, excess).unsqueeze(1)
            mass_above += mass * excess.sign_().sum(1, keepdim=True)
            continue
        weighted = mass * excess
        mass_above += (mass * excess.sign()).sum(1, keepdim=True)
        first += weighted.sum(1, keepdim=True)
        second += torch.linalg.vecdot(weighted, excess).unsqueeze(1)
    return mass_above, first, second


def below_top(losses: Tensor, nominal: Tensor) -> Tensor:
    """Losses minus the largest that exists, 0 where none does."""
    exists = nominal > 0
    return torch.where(exists, losses - torch.where(exists, losses, -torch.inf).amax(1, keepdim=True), 0)


def exponent(losses: Tensor, nominal: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For q proportional to p exp(t l): t, the losses centred under q, and their variance; t = 0 where q is extreme."""
    shifted = below_top(losses, nominal)
    centred = shifted - (weights * shifted).sum(1, keepdim=True)
    variance = (weights * centred**2).sum(1, keepdim=True)
    logarithm = torch.where(weights > 0, (weights / torch.where(nominal > 0, nominal, 1)).log(), 0)
    covariance = (weights * logarithm * centred).sum(1, keepdim=True)
    return torch.where(variance > 0, covariance / torch.where(variance > 0, variance, 1), 0), centred, variance
