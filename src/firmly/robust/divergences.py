"""The ambiguity sets with exact duals: Kullback-Leibler, chi-square, conditional value at risk, total variation."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.errors import NotConverged
from firmly.robust.ambiguity import AmbiguitySet
from firmly.robust.top_fraction import maximisers, top, top_drift

MAX_ITERATIONS = 200


class KL(AmbiguitySet):
    """KL(q, p) <= radius, with KL(q, p) = sum_i q_i log(q_i / p_i).

    sup = min over eta > 0 of eta radius + eta log sum_i p_i exp(l_i / eta), q_i proportional to p_i exp(l_i / eta).
    1 / eta is found by Newton's method on log KL(q_t, p) = log radius in log t, inside a bracket. From
    radius >= -log(mass of the largest losses) on, q is p restricted to the largest losses.

    Source: Hu and Hong, Kullback-Leibler divergence constrained distributionally robust optimization, 2013.
    """

    def worst(self, losses: Tensor, nominal: Tensor) -> Tensor:
        radius = self.size
        at_top, mass = maximisers(losses, nominal)
        saturated = radius >= -mass.log()
        if radius == 0:
            return nominal
        scaled, width = normalised(losses, nominal)
        safe = torch.full_like(mass, radius)

        spread = (nominal * (scaled - (nominal * scaled).sum(1, keepdim=True)) ** 2).sum(1, keepdim=True)
        t = (2 * safe / torch.where(spread > 0, spread, 1)).sqrt()  # the root for small radii
        low, high = torch.zeros_like(t), torch.full_like(t, torch.inf)
        done = saturated | (width == 0)
        for _ in range(MAX_ITERATIONS):
            q, divergence, growth, rounding = tilted(t, scaled, nominal)
            done = done | ((divergence - safe).abs() <= rounding) | (high <= low * (1 + 4e-16))
            if bool(done.all()):
                return torch.where(saturated, at_top / mass, q)
            below = divergence < safe
            low, high = torch.where(below, t, low), torch.where(below, high, t)
            step = (divergence.clamp(min=1e-300) / safe).log() * divergence / growth.clamp(min=1e-300)
            newton = t * (-step).clamp(-3, 3).exp()
            middle = torch.where(high.isinf(), 8 * t, torch.where(low == 0, t / 8, (low * high).sqrt()))
            t = torch.where(done, t, torch.where((newton > low) & (newton < high), newton, middle))
        raise NotConverged(f"the dual of a Kullback-Leibler ball of radius {radius:g} did not settle")

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
        super().__init__(temperature, low=torch.finfo(torch.float64).tiny, meaning="temperature")

    def worst(self, losses: Tensor, nominal: Tensor) -> Tensor:
        scaled, _ = centred_at_top(losses, nominal)
        q = nominal * (scaled / self.size).exp()
        return q / q.sum(1, keepdim=True)

    def value(self, losses: Tensor, nominal: Tensor, weights: Tensor) -> Tensor:
        temperature = self.size
        scaled, largest = centred_at_top(losses, nominal)
        scaled = scaled / temperature
        less = (nominal * scaled.expm1()).sum(1)  # log1p keeps the digits where the temperature is large
        logarithm = torch.where(less > -0.5, less.clamp(min=-0.75).log1p(), (nominal * scaled.exp()).sum(1).log())
        return largest.squeeze(1) + temperature * logarithm

    def curvature(self, losses: Tensor, nominal: Tensor, weights: Tensor, direction: Tensor) -> Tensor:
        change = direction - (weights * direction).sum(1, keepdim=True)
        return weights * change / self.size

    def drift(self, losses: Tensor, nominal: Tensor, weights: Tensor) -> Tensor:
        scaled, _ = centred_at_top(losses, nominal)
        mean = (weights * scaled).sum(1, keepdim=True)
        return -weights * (scaled - mean) / self.size**2

    def slope(self, losses: Tensor, nominal: Tensor, weights: Tensor) -> Tensor:
        return -(torch.special.xlogy(weights, weights) - torch.special.xlogy(weights, nominal)).sum(1)


class Chi2(AmbiguitySet):
    """sum_i p_i (q_i / p_i - 1)^2 / 2 <= radius.

    sup = min over eta of eta + sqrt(1 + 2 radius) sqrt(sum_i p_i (l_i - eta)_+^2), and q_i is proportional to
    p_i (l_i - eta)_+.
    In closed form on the set A = {l > eta}: with its mass P, mean m and variance v, and a = 1 + 2 radius,
    eta = m - sqrt(v / (a P - 1)) and sup = m + sqrt((a P - 1) v); A shrinks from all atoms until it is unchanged.

    Sources: Duchi and Namkoong, Learning models with uniform performance via distributionally robust optimization,
    2021; the active sets are derived in docs/theory/robust_risks.
    """

    def worst(self, losses: Tensor, nominal: Tensor) -> Tensor:
        radius = self.size
        if radius == 0:
            return nominal
        at_top, mass = maximisers(losses, nominal)
        saturated = (1 + 2 * radius) * mass >= 1
        scaled, _ = normalised(losses, nominal)
        active = nominal > 0
        for _ in range(losses.shape[1] + 1):
            held = torch.where(active, nominal, 0)
            part = held.sum(1, keepdim=True)
            mean = (held * scaled).sum(1, keepdim=True) / part
            variance = (held * (scaled - mean) ** 2).sum(1, keepdim=True) / part
            excess = ((1 + 2 * radius) * part - 1).clamp(min=torch.finfo(torch.float64).tiny)
            eta = mean - (variance / excess).sqrt()
            kept = active & ((scaled > eta) | saturated)
            if bool((kept == active).all()):
                break
            active = kept
        q = held * (scaled - eta).clamp(min=0)
        q = q / q.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        return torch.where(saturated, at_top / mass, q)

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
        scaled, _ = centred_at_top(losses, nominal)
        held = torch.where(weights > 0, nominal, 0)
        part = held.sum(1, keepdim=True)
        centred = torch.where(held > 0, scaled - (held * scaled).sum(1, keepdim=True) / part, 0)
        return held, part, centred, (held * centred**2).sum(1, keepdim=True)


class CVaR(AmbiguitySet):
    """q_i <= p_i / fraction: the mean of the largest `fraction` of the losses (of the smallest, where sense is "inf").

    sup = min over eta of eta + sum_i p_i (l_i - eta)_+ / fraction. By selection, without a sort where masses are equal.
    Source: Rockafellar and Uryasev, Optimization of conditional value-at-risk, 2000.
    """

    def __init__(self, fraction: float | Tensor = 0.1):
        super().__init__(fraction, low=torch.finfo(torch.float64).tiny, high=1.0, meaning="fraction")

    def worst(self, losses: Tensor, nominal: Tensor) -> Tensor:
        return top(losses, nominal, self.size)

    def drift(self, losses: Tensor, nominal: Tensor, weights: Tensor) -> Tensor:
        return top_drift(losses, nominal, self.size)


class TotalVariation(AmbiguitySet):
    """sum_i |q_i - p_i| / 2 <= radius: that mass goes from the smallest losses to the largest.

    sup = radius max l + (1 - radius) times the mean of the largest 1 - radius of the losses.
    Source: Jiang and Guan, Risk-averse two-stage stochastic program with distributional ambiguity, 2018.
    """

    def __init__(self, radius: float | Tensor = 0.1):
        super().__init__(radius, high=1.0)

    def worst(self, losses: Tensor, nominal: Tensor) -> Tensor:
        radius = self.size
        at_top, mass = maximisers(losses, nominal)
        if radius == 1:
            return at_top / mass
        return radius * at_top / mass + (1 - radius) * top(losses, nominal, 1 - radius)

    def drift(self, losses: Tensor, nominal: Tensor, weights: Tensor) -> Tensor:
        kept = 1 - self.size
        at_top, mass = maximisers(losses, nominal)
        if kept == 0:
            return torch.zeros_like(losses)
        return at_top / mass - top(losses, nominal, kept) - kept * top_drift(losses, nominal, kept)


def centred_at_top(losses: Tensor, nominal: Tensor) -> tuple[Tensor, Tensor]:
    """Losses minus the largest valid one (0 where nothing is valid), and that one (rows, 1)."""
    valid = nominal > 0
    largest = torch.where(valid, losses, -torch.inf).amax(1, keepdim=True)
    return torch.where(valid, losses - largest, 0), largest


def normalised(losses: Tensor, nominal: Tensor) -> tuple[Tensor, Tensor]:
    """Losses shifted and scaled into [-1, 0], and the range (rows, 1) that they were divided by (0: all are equal)."""
    shifted, _ = centred_at_top(losses, nominal)
    size = -shifted.amin(1, keepdim=True)
    return shifted / torch.where(size > 0, size, 1), size


def tilted(t: Tensor, scaled: Tensor, nominal: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q proportional to p exp(t l), KL(q, p), its derivative in log t, and what rounding may make of the divergence."""
    q = nominal * (t * scaled).exp()
    less = (nominal * (t * scaled).expm1()).sum(1, keepdim=True)  # log1p keeps the digits where t is small
    total = q.sum(1, keepdim=True)
    logarithm = torch.where(less > -0.5, less.clamp(min=-0.75).log1p(), total.log())
    q = q / total
    mean = (q * scaled).sum(1, keepdim=True)
    variance = (q * (scaled - mean) ** 2).sum(1, keepdim=True)
    rounding = 16 * torch.finfo(torch.float64).eps * ((t * mean).abs() + logarithm.abs())
    return q, t * mean - logarithm, t**2 * variance, rounding


def exponent(losses: Tensor, nominal: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For q proportional to p exp(t l): t, the losses centred under q, and their variance; t = 0 where q is extreme."""
    shifted, _ = centred_at_top(losses, nominal)
    centred = shifted - (weights * shifted).sum(1, keepdim=True)
    variance = (weights * centred**2).sum(1, keepdim=True)
    logarithm = torch.where(weights > 0, (weights / torch.where(nominal > 0, nominal, 1)).log(), 0)
    covariance = (weights * logarithm * centred).sum(1, keepdim=True)
    return torch.where(variance > 0, covariance / torch.where(variance > 0, variance, 1), 0), centred, variance
