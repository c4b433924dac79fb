"""Monotone operator equilibrium layers (E. Winston, J. Z. Kolter, NeurIPS 2020), dense and convolutional."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from firmly.algorithms.equilibrium import EquilibriumForwardBackward, PeacemanRachford
from firmly.errors import SettingsError, ShapeError
from firmly.fixedpoint.equilibrium import Splitting, equilibrium
from firmly.fixedpoint.solve import Solution, solve
from firmly.linear.convolution import Convolution
from firmly.linear.dense import Dense
from firmly.linear.map import LinearMap
from firmly.linear.monotone import Monotone, balanced_step, monotonicity
from firmly.prox.box import NonNegative
from firmly.prox.prior import Prior

SplittingName = Literal["peaceman-rachford", "forward-backward"]


class MonotoneLayer(nn.Module):
    """z = prox_g(W z + U x + b) with W = (1 - margin) I - A*A + B - B*, the one solution of this equation.

    x is (batch, in_features, *spatial) and z is (batch, features, *spatial). Without `spatial`, A, B and U are
    matrices; with it they are circular convolutions on that grid with kernels of `kernel_size` along each axis. The
    activation is the prox of a convex prior with unit step: `NonNegative` is a ReLU, `L1` a soft threshold, `Box` a
    clipped linear unit. The solution moves by at most |U| / margin times x; `certify` proves more.

    `splitting` is the iteration that finds z, with its step size as `step_size` (None: `balanced_step` for
    Peaceman-Rachford, which converges for any; margin / |I - W|^2 for forward-backward). `forward` raises
    `NotConverged` where it does not reach the tolerance `tol`; `solve(x)` returns how far it came. Raises
    `SettingsError`, and `ConditionError` for priors that are not convex.
    Source: Winston and Kolter, Monotone operator equilibrium networks, NeurIPS 2020.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        margin: float = 1.0,
        prior: Prior | None = None,
        spatial: Sequence[int] = (),
        kernel_size: int = 3,
        splitting: SplittingName = "peaceman-rachford",
    ):
        super().__init__()
        if min(in_features, features, kernel_size, *spatial) < 1:
            raise SettingsError(
                f"features, kernel_size and spatial are at least 1, given {in_features} -> {features} features, "
                f"kernel_size {kernel_size}, spatial {tuple(spatial)}"
            )

        def initial(inputs: int) -> LinearMap:
            size = (features, inputs, *[kernel_size] * len(spatial))
            weight = nn.Parameter(torch.randn(size) / math.sqrt(math.prod(size[1:])))
            return Convolution(weight, (inputs, *spatial)) if spatial else Dense(weight)

        input_map, loop = initial(in_features), Monotone(initial(features), margin, initial(features))
        self._set(input_map, loop, nn.Parameter(torch.zeros(features, *[1] * len(spatial))), prior, splitting)

    @classmethod
    def of(
        cls,
        input_map: LinearMap,
        loop: LinearMap,
        bias: nn.Parameter | nn.Module,
        prior: Prior | None = None,
        splitting: SplittingName = "peaceman-rachford",
    ) -> MonotoneLayer:
        """The layer z = prox_g(W z + U x + b) of any maps U = `input_map`, W = `loop`; b is broadcast to the loop's
        domain, and may be a module that returns it."""
        if loop.domain != loop.codomain or input_map.codomain != loop.domain:
            raise ShapeError(
                f"the loop maps a space to itself and the input map leads there, given {loop.domain} -> "
                f"{loop.codomain} and {input_map.domain} -> {input_map.codomain}"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set(input_map, loop, bias, prior, splitting)
        return layer

    def _set(
        self,
        input_map: LinearMap,
        loop: LinearMap,
        bias: nn.Parameter | nn.Module,
        prior: Prior | None,
        splitting: SplittingName,
    ) -> None:
        if splitting not in get_args(SplittingName):
            raise SettingsError(f"the splitting is 'peaceman-rachford' or 'forward-backward', given {splitting!r}")
        self.input_map = input_map
        self.loop = loop
        self.bias = bias
        self.prior = NonNegative() if prior is None else prior
        self.splitting = splitting
        self.step_size: float | None = None
        self.tol: float | None = None
        self.max_iterations = 10_000
        self.inputs = {"data": input_map.domain}

    def forward(self, x: Tensor) -> Tensor:
        return equilibrium(self.algorithm(), self._entering(x), self.tol, self.max_iterations)

    def _entering(self, x: Tensor) -> Tensor:
        return self.input_map(x) + (self.bias() if isinstance(self.bias, nn.Module) else self.bias)

    def algorithm(self) -> Splitting:
        """The iteration, with the weights as they are now."""
        if self.splitting == "forward-backward":
            return EquilibriumForwardBackward(self.loop, self.prior, self.step_size)
        step = balanced_step(self.loop) if self.step_size is None else self.step_size
        return PeacemanRachford(self.loop, self.prior, step)

    @torch.no_grad()
    def solve(self, x: Tensor) -> Solution:
        """The iteration from U x + b, with its status and its residual, converged or not."""
        w = self._entering(x)
        tol = torch.finfo(w.dtype).eps ** 0.75 if self.tol is None else self.tol
        return solve(self.algorithm(), w, tol, self.max_iterations)

    @torch.no_grad()
    def lipschitz_bound(self) -> float:
        """|U| / m, which bounds how far z moves when x moves (docs/theory/loops)."""
        return self.input_map.norm().upper / monotonicity(self.loop) * (1 + 1e-15)
