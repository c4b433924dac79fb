"""The minimiser of the entropic energy, by accelerated ascent in its dual with steps that follow the curvature."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from firmly.errors import NotConverged
from firmly.prox.prior import over_entries, sum_over_sample
from firmly.segment.grid import differences, joined, jumps, less_divergence, split

CHECKED = 10  # iterations between two measurements of the gap
FIRST_STAGE = 20  # iterations with one metric; every stage is twice as long as the one before
FLATTEST, ROUNDEST = 0.03, 0.5  # bounds of the curvature of a softmax; 1/2 is its largest
CAUTION = 4.0  # by how much the lower one grows where a stage did not halve the gap


class Minimum(NamedTuple):
    """A solution: probabilities x, dual p (batch, classes, axes, *spatial), and a bound of |x - x*| for each sample."""

    x: Tensor
    dual: Tensor
    error: Tensor
    iterations: int


class Ascent(NamedTuple):
    """The state of some samples, for each axis: dual, dual ahead, step; and their momentum, gap, least curvature."""

    p: list[Tensor]
    ahead: list[Tensor]
    steps: list[Tensor]
    momentum: Tensor
    gap: Tensor
    flattest: Tensor


def ascend(
    scores: Tensor, bounds: Tensor, tau: Tensor, accuracy: float, max_iterations: int, start: Tensor | None = None
) -> Minimum:
    """max over |p| <= bounds of -tau sum_i logsumexp((s - D* p)_i / tau), for each sample, from a dual `start`.

    Primal minus dual value at x = softmax((s - D* p) / tau) is sum (bounds |D x| - p D x), terms that are not negative;
    and tau |x - x*|^2 is at most that gap, since the energy is 2 tau-strongly convex: samples end there, each on its
    own. FISTA with restarts, in stages of doubling length. In each the step of an edge is 1 / (2 d (c_i + c_j)) with
    c = 2 x (1 - x) / tau at its ends in d axes: D diag(c) D* is at most that, and diag(c) at least the derivative of
    the softmax at this x. Where x moves too far for it, the gap does not fall by half, and the next stage bounds x (1 -
    x) from below more cautiously: at last by 1/4, its maximum, which is the step of FISTA for all x.
    Sources: Beck and Teboulle, A fast iterative shrinkage-thresholding algorithm, 2009; O'Donoghue and Candes, Adaptive
    restart for accelerated gradient schemes, 2015; the metric is derived in docs/theory/segment.
    """
    t, allowed = float(tau), accuracy**2 * float(tau) * math.prod(scores.shape[2:])
    dual = torch.zeros_like(differences(scores)) if start is None else start.to(scores).clamp(-bounds, bounds)
    x, error = torch.empty_like(scores), scores.new_full((len(scores),), torch.inf)
    running = torch.arange(len(scores), device=scores.device)
    limits = split(bounds.expand_as(dual))
    here, state = scores - scores.amax(1, keepdim=True), begun(split(dual), len(scores), scores)
    stage_end, length = 0, FIRST_STAGE
    for iteration in range(max_iterations + 1):
        if iteration % CHECKED == 0:
            found = softmax(here, state.p, t)
            gap = duality_gap(found, state.p, limits)
            done = gap <= allowed
            if bool(done.any()) or iteration + CHECKED > max_iterations:
                x[running], error[running] = found, (gap / t).sqrt()
                dual[running] = joined(state.p)
            if bool(done.all()):
                return Minimum(x, dual, error, iteration)
            if bool(done.any()):
                kept = ~done
                running, here, found, gap = running[kept], here[kept], found[kept], gap[kept]
                limits, state = [c[kept] for c in limits], of_samples(state, kept)
            if iteration >= stage_end:
                state = next_stage(state, found, gap, t)
                stage_end, length = iteration + length, 2 * length
        state = step(here, state, limits, t)
    raise NotConverged(
        f"the minimiser of the energy is certified to {float(error.max()) / math.sqrt(math.prod(x.shape[2:])):.3g} per "
        f"pixel after {max_iterations} iterations, asked for {accuracy:.3g}; allow more max_iterations or a larger "
        "accuracy"
    )


def step(scores: Tensor, state: Ascent, limits: list[Tensor], tau: float) -> Ascent:
    """One accelerated step, with the momentum given up for samples where it points backwards."""
    new, backwards = [], torch.zeros_like(state.momentum)
    for p, ahead, size, limit, jump in zip(
        state.p, state.ahead, state.steps, limits, jumps(softmax(scores, state.ahead, tau)), strict=True
    ):
        found = torch.addcmul(ahead, size, jump)
        found = torch.minimum(torch.maximum(found, -limit, out=found), limit, out=found)
        backwards += sum_over_sample((ahead - found).div_(size).mul_(found - p))
        new.append(found)
    momentum = torch.where(backwards > 0, 1.0, state.momentum)
    grown = (1 + (1 + 4 * momentum**2).sqrt()) / 2
    share = over_entries((momentum - 1) / grown, scores)
    ahead = [torch.addcmul(found, share, found - p) for found, p in zip(new, state.p)]
    return state._replace(p=new, ahead=ahead, momentum=grown)


def next_stage(state: Ascent, x: Tensor, gap: Tensor, tau: float) -> Ascent:
    """Steps by the curvature at x, without momentum; more cautious ones where the gap did not halve."""
    flattest = torch.where(gap > state.gap / 2, CAUTION * state.flattest, state.flattest).clamp(max=ROUNDEST)
    curvature = torch.maximum(2 * x * (1 - x), over_entries(flattest, x)) / tau
    axes = x.dim() - 2
    steps = [
        1 / (2 * axes * (curvature.narrow(a, 1, x.shape[a] - 1) + curvature.narrow(a, 0, x.shape[a] - 1)))
        for a in range(2, x.dim())
    ]
    return Ascent(state.p, state.p, steps, torch.ones_like(state.momentum), gap, flattest)


def begun(p: list[Tensor], samples: int, like: Tensor) -> Ascent:
    ones = like.new_ones(samples)
    return Ascent(p, p, p, ones, torch.inf * ones, FLATTEST * ones)


def of_samples(state: Ascent, kept: Tensor) -> Ascent:
    return Ascent(*([t[kept] for t in part] if isinstance(part, list) else part[kept] for part in state))


def softmax(scores: Tensor, p: list[Tensor], tau: float) -> Tensor:
    """softmax((scores - D* p) / tau)."""
    return less_divergence(scores, p).div_(tau).softmax(1)


def duality_gap(x: Tensor, p: list[Tensor], limits: list[Tensor]) -> Tensor:
    """sum (bounds |D x| - p D x): (batch,)."""
    terms = [sum_over_sample(c * jump.abs() - part * jump) for c, jump, part in zip(limits, jumps(x), p)]
    return torch.stack(terms).sum(0).clamp(min=0)
