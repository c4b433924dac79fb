"""Bilevel problems on many samples: the solution, its linear system and the hyperparameters move together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from firmly.errors import NotConverged, SettingsError, ShapeError
from firmly.fixedpoint.bilevel import entries, leaves, shaped

STATIONARY = 1e-3  # of the outer objective: what a gradient in the logarithms may still gain for a factor of e
RESIDUAL = 1e-2  # of both inner problems, relative, where the gradient is believed
WARMING = 3  # epochs before the parameters move
FOLLOWING, LAGGING = 0.03, 2e-3  # residual of the linear system, and part of the objective, within which they move
LONGEST = 0.5  # change of a logarithm in an epoch
FIRST = 0.05  # the first distance of the outer steps
POWER = 8  # power iterations for the largest curvature, every epoch on a block of its own
CAREFUL = 0.4  # of the inverse curvature: the inner step


class Epoch(NamedTuple):
    """After one pass: the parameters, the outer objective at the moving solution, and its gradient in their logs."""

    parameters: Any
    objective: float
    gradient: Any


@dataclass(frozen=True)
class StochasticSolution:
    """Where it ended; the objective, its gradient in the logarithms and both residuals are of all samples.

    `inner_residual` is |grad G| over its size at the start, `linear_residual` that of H v = grad_x F: where they are
    not small, `gradient` is not that of the solution, and `converged` is False. `lag` estimates to first order how far
    the objective lies above that of the exact solution for these parameters: <v, grad G> with H v = grad_x F.
    """

    parameters: Any
    solution: Tensor
    objective: float
    gradient: Any
    inner_residual: float
    linear_residual: float
    lag: float
    history: list[Epoch]

    @property
    def converged(self) -> bool:
        steepest = max(float(g.abs().max()) for g in leaves(self.gradient))
        accurate = max(self.inner_residual, self.linear_residual) <= RESIDUAL
        accurate = accurate and abs(self.lag) <= STATIONARY * abs(self.objective)
        return accurate and steepest <= STATIONARY * abs(self.objective)


def stochastic_bilevel(
    inner: Callable[[Tensor, Any, Tensor], Tensor],
    outer: Callable[[Tensor, Any, Tensor], Tensor],
    parameters: Any,
    start: Tensor,
    samples: tuple[int, int],
    batch: int = 64,
    epochs: int = 100,
    generator: torch.Generator | None = None,
    callback: Callable[[Epoch], object] | None = None,
) -> StochasticSolution:
    """min over p > 0 of F(x(p), p), x(p) = argmin_x G(x, p), both means over many samples; no step size to choose.

    `inner(x, p, rows)` is the mean over the samples `rows` (long) of the terms of G, a smooth strongly convex function
    of x, with its penalty; `outer(x, p, rows)` that of F. `samples` counts the terms of both. `parameters` are positive
    tensors, in tuples, lists or dictionaries; `start` is the first x, of any shape.

        x <- x - a grad_x G,   v <- v - a (H v - grad_x F),   log p <- log p - c (grad_p F - d/dp <grad_x G, v>)

    with minibatches whose past gradients are kept (SAGA), so that steps need not fall. The step a is a part of the
    inverse of the largest curvature, measured anew in every epoch; p waits in epochs at
    whose start x or v lag behind; c is the distance gone over the root of the sum of squared gradients. Stops after
    `epochs` passes over the inner samples, or where all three are stationary. Memory: 3 vectors for each block of
    `batch` inner samples, 2 for each outer one.

    Raises `ShapeError` and `SettingsError` for what does not fit, `NotConverged` where values are no longer finite.
    Sources: Dagreou, Ablin, Vaiter and Moreau, A framework for bilevel optimization that enables stochastic and global
    variance reduction algorithms, 2022 (SABA); Defazio, Bach and Lacoste-Julien, SAGA, 2014; Ivgi, Hinder and Carmon,
    DoG is SGD's best friend, 2023 (the outer step).
    """
    if min(samples) < 1 or batch < 1 or epochs < 1:
        raise SettingsError(f"samples, batch and epochs are at least 1, given {samples}, {batch} and {epochs}")
    if not (isinstance(start, Tensor) and start.is_floating_point() and start.numel() > 0):
        raise ShapeError("start is a floating-point tensor with at least one entry")
    search = Search(inner, outer, parameters, start, samples, batch, generator)
    history: list[Epoch] = []
    for epoch in range(epochs):
        search.measure_curvature()
        search.run_epoch(moving=epoch >= WARMING and search.settled())
        objective, _, gradient = search.means()
        if not (math.isfinite(objective) and bool(torch.isfinite(gradient).all())):
            raise NotConverged(
                "the outer objective or its gradient is no longer finite: the inner problem is to be smooth and "
                "strongly convex"
            )
        history.append(Epoch(search.shaped(search.q.exp()), objective, search.shaped(gradient)))
        if callback is not None:
            callback(history[-1])
        if search.stationary(objective, gradient):
            break
    objective, inner_residual, linear_residual, lag, gradient = search.in_full()
    return StochasticSolution(
        search.shaped(search.q.exp()), search.x, objective, search.shaped(gradient), inner_residual, linear_residual,
        lag, history,
    )  # fmt: skip


class Parts(NamedTuple):
    """What one pair of blocks says: grad_x G, H v, d/dq <grad_x G, v>, grad_x F, grad_q F, and F."""

    slope: Tensor
    bent: Tensor
    cross: Tensor
    pull: Tensor
    direct: Tensor
    objective: Tensor


class Memory:
    """The last vectors of every block, and their mean (SAGA)."""

    def __init__(self, blocks: int, like: Tensor):
        self.last = like.new_zeros(blocks, *like.shape)
        self.seen = 0
        self.known = torch.zeros(blocks, dtype=torch.bool)
        self.total = torch.zeros_like(like)

    def estimate(self, k: int, new: Tensor) -> Tensor:
        """An unbiased estimate of the mean over all blocks, once all are known: before, the mean of those known."""
        change = new - self.last[k]
        if not bool(self.known[k]):
            self.known[k], self.seen = True, self.seen + 1
            self.total += new
            self.last[k] = new
            return self.mean()
        found = change + self.mean()
        self.total += change
        self.last[k] = new
        return found

    def mean(self) -> Tensor:
        return self.total / max(self.seen, 1)


class Search:
    """The three moving variables x, v and q = log p, and the memories."""

    def __init__(
        self, inner: Any, outer: Any, parameters: Any, start: Tensor, samples: tuple[int, int], batch: int,
        generator: torch.Generator | None,
    ):  # fmt: skip
        self.inner, self.outer, self.like, self.generator = inner, outer, parameters, generator
        self.q, self.x = entries(parameters, positive=True).log(), start.detach().clone()
        self.v = torch.zeros_like(self.x)
        order = [torch.randperm(n, generator=generator).to(start.device) for n in samples]
        self.blocks = [rows.split(batch) for rows in order]
        # blocks differ in size: so weighted, the mean over blocks is that over samples
        self.share = [[len(b) * len(blocks) / n for b in blocks] for blocks, n in zip(self.blocks, samples)]
        self.memory = [Memory(len(self.blocks[0]), like) for like in (self.x, self.x, self.q)]
        self.memory += [Memory(len(self.blocks[1]), like) for like in (self.x, self.q)]
        self.values = self.x.new_zeros(len(self.blocks[1]))
        self.first, self.distance, self.power = self.q.clone(), FIRST, 0.0
        self.curvature, self.probe = 0.0, torch.randn(start.shape, generator=generator).to(start)
        self.begin = float(self.parts(0, 0).slope.norm())

    def shaped(self, flat: Tensor) -> Any:
        return shaped(flat.detach(), self.like)

    def parts(self, i: int, j: int) -> Parts:
        x, q = self.x.detach().requires_grad_(), self.q.detach().requires_grad_()
        with torch.enable_grad():
            p = shaped(q.exp(), self.like)
            value = self.inner(x, p, self.blocks[0][i])
            if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
                raise SettingsError("`inner` returns one number that depends on x, the mean over the rows")
            (slope,) = torch.autograd.grad(self.share[0][i] * value.sum(), x, create_graph=True)
            bent, cross = torch.autograd.grad((slope * self.v).sum(), (x, q), retain_graph=True, materialize_grads=True)
            objective = self.outer(x, p, self.blocks[1][j])
            if not (isinstance(objective, Tensor) and objective.numel() == 1 and objective.requires_grad):
                raise SettingsError("`outer` returns one number that depends on x, the mean over the rows")
            objective = self.share[1][j] * objective.sum()
            pull, direct = torch.autograd.grad(objective, (x, q), materialize_grads=True)
        return Parts(slope.detach(), bent, cross, pull, direct, objective.detach())

    def measure_curvature(self) -> None:
        """Raised by power iteration on a block, and lowered slowly, as parameters may fall."""
        k = int(torch.randint(len(self.blocks[0]), (), generator=self.generator))
        kept, size = self.v, 0.0
        for _ in range(POWER):
            self.v = self.probe / self.probe.norm().clamp(min=1e-300)
            self.probe = self.parts(k, 0).bent
            size = float((self.v * self.probe).sum())
        self.v = kept
        if not (size > 0 and math.isfinite(size)):
            raise NotConverged(
                f"the curvature of the inner problem is {size:.3g} along a direction: it is to be smooth and strongly "
                "convex; is the penalty missing?"
            )
        self.curvature = max(size, 0.9 * self.curvature)

    def run_epoch(self, moving: bool) -> None:
        n, m = (len(blocks) for blocks in self.blocks)
        order = torch.randperm(n, generator=self.generator).tolist()
        others = torch.cat([torch.randperm(m, generator=self.generator) for _ in range(-(-n // m))])[:n].tolist()
        step = CAREFUL / self.curvature
        for i, j in zip(order, others):
            new = self.parts(i, j)
            self.values[j] = new.objective
            along = [memory.estimate(k, value) for memory, k, value in zip(self.memory, (i, i, i, j, j), new[:5])]
            slope, bent, cross, pull, direct = along
            self.x = self.x - step * slope
            self.v = self.v - step * (bent - pull)
            if moving:
                self.move(direct - cross, n)

    def move(self, gradient: Tensor, steps: int) -> None:
        self.power += float(gradient.square().sum())
        change = gradient * (self.distance / math.sqrt(self.power)) if self.power > 0 else gradient
        self.q = self.q - change.clamp(-LONGEST / steps, LONGEST / steps)
        self.distance = max(self.distance, float((self.q - self.first).norm()))

    def means(self) -> tuple[float, float, Tensor]:
        """From the memories: the objective, the residual of the linear system, the gradient in the logarithms."""
        bent, cross, pull, direct = (memory.mean() for memory in self.memory[1:])
        known = self.memory[3].known.to(self.values.device)
        residual = float((bent - pull).norm() / pull.norm().clamp(min=1e-300))
        return float(self.values[known].mean()), residual, direct - cross

    def settled(self) -> bool:
        """Whether solution and linear system follow the parameters closely enough to move these on."""
        objective, residual, _ = self.means()
        lag = float((self.v * self.memory[0].mean()).sum())
        return residual <= FOLLOWING and abs(lag) <= LAGGING * abs(objective)

    def stationary(self, objective: float, gradient: Tensor) -> bool:
        slope, residual = self.memory[0].mean(), self.means()[1]
        near = float(slope.norm()) <= 0.3 * RESIDUAL * self.begin and residual <= 0.3 * RESIDUAL
        return near and float(gradient.abs().max()) <= 0.5 * STATIONARY * abs(objective)

    def in_full(self) -> tuple[float, float, float, float, Tensor]:
        """The objective, both residuals and the gradient, of all samples."""
        inner = [self.parts(i, 0)[:3] for i in range(len(self.blocks[0]))]
        outer = [self.parts(0, j)[3:] for j in range(len(self.blocks[1]))]
        slope, bent, cross = (torch.stack(values).mean(0) for values in zip(*inner))
        pull, direct, objective = (torch.stack(values).mean(0) for values in zip(*outer))
        linear = float((bent - pull).norm() / pull.norm().clamp(min=1e-300))
        lag = float((self.v * slope).sum())
        return float(objective), float(slope.norm()) / max(self.begin, 1e-300), linear, lag, direct - cross
