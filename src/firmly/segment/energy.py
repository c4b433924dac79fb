"""The entropic energy of a segmentation with total variation: its minimiser as a layer, with exact derivatives."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from firmly.certificates.signal import Signal, Tracer, handles
from firmly.errors import ShapeError
from firmly.fixedpoint.equilibrium import _errors as open_errors
from firmly.once_differentiable import once_differentiable
from firmly.prox.prior import Slope, largest, positive, smallest, sum_over_sample
from firmly.segment.dual_ascent import Minimum, ascend
from firmly.segment.grid import checked_coupling, checked_scores, differences, edge_bounds
from firmly.segment.reduced_system import flat_edges, projected


class EntropicTV(nn.Module):
    """x*(s) = argmin over x in the simplex of -<x, s> + temperature sum x log x + sum_k coupling_k TV_w(x_k).

    Scores s and probabilities x are (batch, classes, *spatial), TV_w(x_k) = sum over axes a and pixels i of
    w[a, i] |x_k[i + e_a] - x_k[i]|. `coupling` is a non-negative number, or (classes,); the edge weights w are
    (axes, *spatial), or (batch, axes, *spatial), one number for an edge from i to i + e_a (the last row, which has no
    neighbour, is ignored), 1 if left out. At zero coupling x* = softmax(s / temperature).

    The minimiser is unique, and 1 / (2 temperature)-Lipschitz in s with slopes in [0, 1 / (2 temperature)]: `certify`
    traces it so. It is found in float64 by accelerated ascent in the dual, until the duality gap certifies a root mean
    square error per pixel of at most `accuracy` for every sample; `NotConverged` after `max_iterations`. Gradients
    reach scores, coupling, weights and temperature: they are those of the exact minimiser on the flat regions that were
    found, from a linear system whose residual is measured (`NotConverged` above 1e-8). Derivation: docs/theory/segment.
    """

    def __init__(
        self,
        coupling: float | Tensor = 1.0,
        temperature: float | Tensor = 1.0,
        accuracy: float = 1e-4,
        max_iterations: int = 20_000,
    ):
        super().__init__()
        for name, value in (("coupling", coupling), ("temperature", temperature)):
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.accuracy = float(positive("the accuracy", accuracy))
        self.max_iterations = max_iterations
        self.slope()
        checked_coupling(coupling)

    def forward(self, scores: Tensor, weights: Tensor | None = None) -> Tensor:
        return minimiser(scores, self, weights)

    @torch.no_grad()
    def solve(self, scores: Tensor, weights: Tensor | None = None, start: Tensor | None = None) -> Minimum:
        """x*, the dual variable, the certified error; `start` is the dual of a problem nearby."""
        scores = checked_scores(scores)
        return ascend(scores, self.bounds(scores, weights), self.tau(scores), self.accuracy, self.max_iterations, start)

    def energy(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """temperature sum x log x + sum_k coupling_k TV_w(x_k), for x in the simplex: (batch,)."""
        entropy = sum_over_sample(torch.xlogy(x, x))
        return self.temperature * entropy + sum_over_sample(self.bounds(x, weights) * differences(x).abs())

    def output_error(self, scores: Tensor) -> float:
        """A bound of |x - x*| for each sample of these (batch, channels, *spatial), which every output is within."""
        return self.accuracy * math.sqrt(math.prod(scores.shape[2:]))

    def slope(self) -> Slope:
        """[0, 1 / (2 temperature)], rounded outward."""
        positive("the temperature", self.temperature)
        if torch.as_tensor(self.temperature).numel() != 1:
            raise ShapeError("the temperature is one number")
        return Slope.outward(0.0, 1 / (2 * smallest(self.temperature)))

    def tau(self, like: Tensor) -> Tensor:
        positive("the temperature", self.temperature)
        return torch.as_tensor(self.temperature, dtype=torch.float64, device=like.device).reshape(())

    def bounds(self, scores: Tensor, weights: Tensor | None) -> Tensor:
        """coupling_k w[a, i], broadcastable against differences(scores), in float64 with gradients."""
        return edge_bounds(self.coupling, weights, scores)

    def extra_repr(self) -> str:
        return f"accuracy={self.accuracy}, max_iterations={self.max_iterations}"


class Settings(NamedTuple):
    """Of the solver; `errors` collects its relative errors while a certificate measures the network."""

    accuracy: float
    max_iterations: int
    errors: list[float] | None


def minimiser(scores: Tensor, layer: EntropicTV, weights: Tensor | None) -> Tensor:
    """layer(scores, weights), open to `__torch_function__` so that a traced input records the layer instead."""
    if has_torch_function((scores, weights)):
        return handle_torch_function(minimiser, (scores, weights), scores, layer, weights)
    wide, errors = checked_scores(scores), open_errors.get()
    settings = Settings(layer.accuracy, layer.max_iterations, errors)
    return _Minimiser.apply(wide, layer.bounds(wide, weights), layer.tau(wide), settings).to(scores.dtype)


@handles(minimiser)
def traced_minimiser(tracer: Tracer, scores: Signal, layer: EntropicTV, weights: Tensor | None) -> Signal:
    """The energy is 2 temperature-strongly convex on the simplex: <dx, ds> >= 2 temperature |dx|^2."""
    checked_coupling(layer.coupling)
    if weights is not None and not bool((weights >= 0).all()):
        raise tracer.refuse("an energy with a negative edge weight, which has no unique minimiser")
    text = (
        f"the minimiser of the energy in {tracer.where()} is the exact one, which is unique; "
        "the tolerance of its solver is not covered"
    )
    if text not in tracer.system.assumptions:
        tracer.system.assumptions.append(text)
    return scores.nonlinear(layer.slope(), "group" if largest(layer.coupling) == 0 else "whole")


@once_differentiable
class _Minimiser(torch.autograd.Function):
    """(scores, bounds, tau) -> x*; its derivative is P = Z (Z' diag(tau / x) Z)^-1 Z'."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, bounds: Tensor, tau: Tensor, settings: Settings) -> Tensor:
        found = ascend(scores, bounds, tau, settings.accuracy, settings.max_iterations)
        if settings.errors is not None:
            settings.errors.append(float((found.error / found.x.flatten(1).norm(dim=1)).max()))
        ctx.save_for_backward(found.x, found.dual, bounds, tau)
        return found.x

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        x, dual, bounds, tau = ctx.saved_tensors
        u = projected(cotangent, x, flat_edges(x, dual, bounds, tau), tau)
        signs = torch.where(bounds > 0, dual / bounds, differences(x).sign())  # of the jumps; u has none on flat edges
        of_bounds = -(signs * differences(u)).sum_to_size(bounds.shape)
        of_tau = -(u * x.clamp(min=torch.finfo(x.dtype).tiny).log()).sum()
        return u, of_bounds, of_tau, None
