"""ALMA-prox: the perturbation of least maximum norm that makes nearly all pixels wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from firmly.errors import SettingsError
from firmly.robust.attacked_model import Adversarial, AttackedModel, Record, SegmentationAttack
from firmly.robust.linf_prox import linf_prox
from firmly.robust.penalty import attack_penalty, penalty_slope

MEMORY = 0.8  # of multipliers and squared gradients
DEMAND = 1e-4  # by how much the wrong class is to be ahead
RATES = (1.02, 0.98)  # of the weight of the constraints
WEIGHTS = (0.1, 1.0)
LARGEST_MULTIPLIER = 1.0
PENALTIES = (0.01, 1.0)  # beyond, few pixels outweigh all others, and single precision overflows
IMPROVED = 0.95  # a constraint above this part of its last value has not improved
LAST_STEP = 0.1  # the step decays to this part of the first


Constraint = Callable[[Tensor, AttackedModel], Tensor]


def logit_ratio(scores: Tensor, under: AttackedModel) -> Tensor:
    """(z_y - max over k != y of z_k + 1e-4) / (z_(1) - z_(3)): negative where pixels are wrong by a margin.

    For targets of the other sign and over z_(1) - (z_(3) + z_(4)) / 2. With too few classes for that, `logit_lead`.
    Source: the difference of logits ratio of Croce and Hein, Reliable evaluation of adversarial robustness, ICML 2020.
    """
    ranks = 4 if under.attack.targeted else 3
    if scores.shape[1] < ranks:
        return logit_lead(scores, under)
    top = scores.topk(ranks, dim=1).values
    return logit_lead(scores, under) / (top[:, 0] - top[:, 2:].mean(1)).clamp(min=DEMAND)


def logit_lead(scores: Tensor, under: AttackedModel) -> Tensor:
    """z_y - max over k != y of z_k + 1e-4 of every pixel, of the other sign for targets."""
    lead = under.lead(scores)
    return (-lead if under.attack.targeted else lead) + DEMAND


@dataclass(frozen=True, kw_only=True)
class AlmaProx(SegmentationAttack):
    """Minimise |delta|_inf such that c_i(delta) < 0 at the fraction `success` of the pixels, with x + delta in the box.

    c_i is `constraint`, times a weight of the image that adapts: `logit_ratio`, as published, or `logit_lead`, which
    gets further where images must change a lot. Each of `steps` steps is one of forward-backward splitting on
    |delta|_inf + sum_i P(c_i), in the metric of a running mean of squared gradients, with the exact `linf_prox`;
    multipliers per pixel follow `penalty_slope`, penalties of pixels without progress double every `check` steps. The
    constraints that fail most are dropped, as many as may fail at the end. An image moves by at most about steps step:
    take a larger `step` where the norms found are near that. `Adversarial.norm` is the maximum norm.
    Source: Rony, Pesquet and Ben Ayed, Proximal splitting adversarial attack for semantic segmentation, CVPR 2023,
    arXiv 2206.07179, with the derivative of the penalty (not that of the released code), the exact step, penalties of
    at most 1, and multipliers of at least `least_multiplier` (1e-12 there: a pixel that turns back then hardly pulls).
    """

    steps: int = 500
    step: float = 1e-3
    check: int = 10
    constraint: Constraint = logit_ratio
    least_multiplier: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        if self.steps < 2 or self.check < 1 or not (self.step > 0 and 0 < self.least_multiplier <= 1):
            raise SettingsError(
                "steps >= 2, check >= 1, step > 0 and least_multiplier in (0, 1], given "
                f"steps={self.steps}, check={self.check}, step={self.step}, least_multiplier={self.least_multiplier}"
            )

    def search(self, under: AttackedModel) -> Adversarial:
        x = under.images
        record = Record(under, torch.inf)
        delta, square = torch.zeros_like(x), torch.zeros_like(x)
        weight = x.new_ones(len(x), 1, 1)
        first = torch.full_like(under.count, self.steps)  # the step at which an image first was a success
        constraints = Constraints(under, self.check, self.least_multiplier)
        for t in range(self.steps):
            images = under.inside(delta)

            def objective(scores: Tensor, t: int = t, weight: Tensor = weight) -> Tensor:
                values = weight * self.constraint(scores, under)
                return constraints.penalty(values, under.reached(scores), t, t / (self.steps - 1))

            scores, gradient = under.with_gradient(images, objective)
            reached = under.reached(scores)
            record.meet(images, reached)
            if bool((record.success & (record.norm == 0)).all()):
                break
            succeeds = under.rate(reached) >= self.success
            first = torch.where(succeeds, first.clamp(max=t), first)
            rates = torch.where(succeeds, 1 / RATES[0], 1 / RATES[1]).to(x)
            weight = (weight * rates[:, None, None]).clamp(*WEIGHTS)

            square = MEMORY * square + (1 - MEMORY) * gradient**2
            metric = (square / (1 - MEMORY ** (t + 1))).sqrt()
            since = (t - first).clamp(min=0) / (self.steps - first).clamp(min=1)
            lam = self.step * LAST_STEP ** since.double()
            direction = gradient / metric.where(metric > 0, 1)
            forward = delta - lam.to(x)[:, None, None, None] * direction
            delta = linf_prox(forward, metric, lam, under.low - x, under.high - x)
        return record.result()


class Constraints:
    """Multipliers mu and penalties rho of all pixels (batch, height, width)."""

    def __init__(self, under: AttackedModel, check: int, least: float):
        self.under, self.check, self.least = under, check, least
        ones = under.images.new_ones(under.labels.shape)
        self.mu, self.rho, self.last = ones, PENALTIES[0] * ones, torch.full_like(ones, torch.inf)
        self.met = torch.zeros_like(under.valid)

    def penalty(self, values: Tensor, reached: Tensor, t: int, progress: float) -> Tensor:
        """The sum of P(c_i) over the constraints that are kept, with multipliers and penalties brought up to date."""
        now = values.detach()
        self.met = self.met | reached
        if t and t % self.check == 0:
            stalled = ~self.met & (now > IMPROVED * self.last)
            self.rho = torch.where(stalled, 2 * self.rho, self.rho).clamp(max=PENALTIES[1])
            self.met = torch.zeros_like(self.met)
        if t % self.check == 0:
            self.last = now
        if t:
            slope = penalty_slope(now, self.mu, self.rho)
            self.mu = (MEMORY * self.mu + (1 - MEMORY) * slope).clamp(self.least, LARGEST_MULTIPLIER)
        kept = self.kept(now, progress)
        return attack_penalty(values, self.mu, self.rho).where(kept, 0).sum()

    def kept(self, now: Tensor, progress: float) -> Tensor:
        """All valid constraints but the floor((1 - success) progress n) largest of each image."""
        flat = now.masked_fill(~self.under.valid, -torch.inf).flatten(1)
        dropped = ((1 - self.under.attack.success) * progress * self.under.count).long()
        largest = flat.topk(int(dropped.max()) + 1, dim=1).values
        limit = largest.gather(1, dropped.unsqueeze(1))
        return self.under.valid & (now <= limit.unsqueeze(2))
