"""The entropic energy as an algorithm: solved, or unrolled into the last layers of a segmentation network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from firmly.algorithms.algorithm import Algorithm, Condition, Rule, Scalar, convexity, positive
from firmly.algorithms.certified import norm
from firmly.linear.gradient import Border, Gradient
from firmly.linear.map import LinearMap
from firmly.networks.unroll import Unrolled, unroll
from firmly.prox.l1 import L1
from firmly.prox.prior import Prior


class EntropicDualState(NamedTuple):
    u: Tensor
    x: Tensor


class EntropicDual(Algorithm):
    """u <- prox_{t g*}(u + t D x); x <- softmax((s - D* u) / temperature): probabilities for scores s, the data.

    For min over x in the simplex of -<x, s> + temperature sum x log x + g(D x), with 0 < t < 4 temperature / |D|^2,
    half of which is the default. s and x are (batch, classes, *spatial), D maps them to (batch, classes * axes,
    *spatial); `EntropicTV` is g = L1(coupling) with D = Gradient((classes, *spatial)).
    The dual is the minimum over u of temperature sum_i logsumexp((s - D* u)_i / temperature) + g*(u), whose smooth part
    has a gradient of Lipschitz constant |D|^2 / (2 temperature): forward-backward splitting (docs/theory/segment).
    """

    learnable = ("step_size", "prior")

    def __init__(self, D: LinearMap, prior: Prior, temperature: float = 1.0, step_size: Scalar | None = None):
        super().__init__()
        self.D = D
        self.prior = prior
        self.temperature = float(positive("temperature", temperature))
        self.data_shape = self.image_shape = D.domain
        size = positive("|D|", norm(D))
        self.step_size = 2 * self.temperature / size**2 if step_size is None else positive("step_size", step_size)

    def start(self, y: Tensor, x: Tensor | None = None) -> EntropicDualState:
        x = (y / self.temperature).softmax(1) if x is None else x
        return EntropicDualState(0.0 * self.D(x), x)

    def step(self, state: EntropicDualState, y: Tensor, k: int) -> EntropicDualState:
        t = self.step_size
        u = self.prior.conjugate_prox(state.u + t * self.D(state.x), t)
        return EntropicDualState(u, ((y - self.D.T(u)) / self.temperature).softmax(1))

    def read(self, state: EntropicDualState) -> Tensor:
        return state.x

    def rule(self, name: str, free: Sequence[str] = ()) -> Rule:
        limit = 4 * self.temperature / norm(self.D) ** 2
        text = "0 < step_size < 4 temperature / |D|^2"
        return Rule(0.0, limit, text, "Combettes and Wajs 2005, theorem 3.4, on the dual (docs/theory/segment)")

    def conditions(self) -> list[Condition]:
        return [*super().conditions(), convexity(self.prior, 1.0 / self.step_size)]


def unrolled_head(
    classes: int,
    size: Sequence[int],
    depth: int = 10,
    coupling: float = 0.5,
    temperature: float = 1.0,
    border: Border = "circular",
) -> Unrolled:
    """`depth` iterations of `EntropicDual` on images of this size: scores -> probabilities (batch, classes, *size).

    Every layer learns its step size, kept inside its rule, and its own weights of edges, one for each class and axis,
    which start at `coupling`. Untrained it tends to `EntropicTV(coupling, temperature)` as the depth grows (on images
    whose border is "neumann"; "circular" joins opposite borders, and is certified better).
    """
    weight = torch.full((classes * len(size), *[1] * len(size)), float(coupling))
    algorithm = EntropicDual(Gradient((classes, *size), border), L1(weight), temperature)
    return unroll(algorithm, depth, learn=("step_size", "prior"))
