"""The objective of dictionary learning, its codes by (F)ISTA, and its gradient in the dictionary."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from firmly.errors import ConditionError, SettingsError, ShapeError
from firmly.priors.omp import refuse_dictionary, refuse_signals
from firmly.priors.several_operators import Observation
from firmly.priors.synthesis import MatrixSynthesis, Synthesis


@dataclasses.dataclass(frozen=True)
class SparseModel:
    """F(z, D) = 1/2 |A S(D, z) - y|^2 + weight |z|_1 for every signal; A is the identity without `observation`."""

    weight: float
    synthesis: Synthesis = dataclasses.field(default_factory=MatrixSynthesis)
    observation: Observation | None = None

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise SettingsError(f"the weight of the l1 norm is positive and finite, given {self.weight}")

    def refuse(self, dictionary: Tensor, data: Tensor, blind: bool = False) -> None:
        """Raise unless all fits; `ConditionError` if the operators leave a common null space, unless `blind`."""
        refuse_dictionary(dictionary)
        shape = self.synthesis.signal_shape(dictionary)
        if self.observation is None:
            return refuse_signals(data, shape)
        refuse_signals(data, self.observation.data_shape)
        if self.observation.signal_shape != shape or self.observation.count != len(data):
            raise ShapeError(
                f"the operators take {self.observation.count} signals of shape {self.observation.signal_shape}, the "
                f"dictionary gives {shape}, and there are {len(data)} data"
            )
        if not blind:
            seen = self.observation.identifiability()
            if seen.blind:
                raise ConditionError(
                    f"{seen}: atoms cannot be learned there, whatever the method. Add operators that see it, or accept "
                    "it with blind=True"
                )

    def data(self, dictionary: Tensor, code: Tensor) -> Tensor:
        """A S(D, z)."""
        signal = self.synthesis.apply(dictionary, code)
        return signal if self.observation is None else self.observation.apply(signal)

    def signal(self, data: Tensor) -> Tensor:
        """A' y."""
        return data if self.observation is None else self.observation.adjoint(data)

    def squared_norm(self, dictionary: Tensor) -> float:
        """An upper bound of the Lipschitz constant of the gradient of F in z."""
        seen = 1.0 if self.observation is None else self.observation.squared_norm()
        return seen * self.synthesis.squared_norm(dictionary) or 1.0  # operators may all be zero

    def value(self, dictionary: Tensor, data: Tensor, code: Tensor) -> Tensor:
        """The mean of F over the signals, differentiable: a scalar."""
        misfit = (self.data(dictionary, code) - data).square().sum()
        return (0.5 * misfit + self.weight * code.abs().sum()) / len(data)

    def codes(
        self,
        dictionary: Tensor,
        data: Tensor,
        steps: int,
        start: Tensor | None = None,
        momentum: bool = True,
        through: int | None = 0,
    ) -> Tensor:
        """z_N after N steps of FISTA (`momentum`) or ISTA with step 1 / |A S(D, .)|^2, from `start` or zero.

        The graph for gradients goes `through` the last steps only (None: all). The step size is held fixed: it is not
        differentiated.
        """
        first = steps if through == 0 else 0 if through is None else max(steps - through, 0)
        step = 1 / self.squared_norm(dictionary)
        with torch.no_grad():
            z = self.synthesis.adjoint(dictionary, self.signal(data)) * 0 if start is None else start
        before = z
        for k in range(steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and k >= first):
                ahead = z + (max(k - 1, 0) / (k + 3) if momentum else 0.0) * (z - before)
                rest = self.data(dictionary, ahead) - data
                moved = ahead - step * self.synthesis.adjoint(dictionary, self.signal(rest))
                z, before = torch.nn.functional.softshrink(moved, step * self.weight), z
        return z

    def gradient(
        self,
        dictionary: Tensor,
        data: Tensor,
        steps: int,
        momentum: bool = True,
        through: int | None = None,
        start: Tensor | None = None,
    ) -> tuple[float, Tensor]:
        """The mean of F(z_N(D), D) and its gradient in D, through all steps, the last `through`, or none (0).

        With 0 the codes count as constants: the gradient of alternating minimisation, which is exact at z* by the
        envelope theorem. With few steps, while the support is wrong, backpropagation is farther from the gradient of
        min_z F than that, then nearer; through very many steps rounding and the wrong supports of early steps are
        multiplied. `through` keeps the last steps, whose support is right.
        Source: Malezieux, Moreau and Kowalski, Understanding approximate and unrolled dictionary learning for pattern
        recovery, 2022.
        """
        with torch.enable_grad():
            variable = dictionary.detach().clone().requires_grad_()
            code = self.codes(variable, data, steps, start, momentum, through)
            value = self.value(variable, data, code)
            (gradient,) = torch.autograd.grad(value, variable)
        return float(value.detach()), gradient


def descend(
    loss: Callable[[Tensor], float],
    move: Callable[[float], Tensor],
    value: float,
    step: float,
    halvings: int = 40,
) -> tuple[Tensor | None, float]:
    """The first of move(step), move(step / 2), ... with a smaller loss than `value`, and the step to try next.

    The next trial is ten times the accepted step, at most 1e4. None if no point is better: the point is stationary up
    to rounding.
    """
    for _ in range(halvings):
        candidate = move(step)
        if loss(candidate) < value:
            return candidate, min(10 * step, 1e4)
        step /= 2
    return None, step * 2**halvings
