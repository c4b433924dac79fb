"""Analysis operators: Gamma such that Gamma x is sparse for the signals x behind noisy data."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.priors.learning import Method, directions, normalised
from firmly.priors.sparse_model import descend


class Constraint(Protocol):
    """A set of operators, kept as the transpose (m, p) with the rows of Gamma as columns."""

    def nearest(self, operator: Tensor) -> Tensor:
        """A point of the set, for a start."""
        ...

    def move(self, operator: Tensor, gradient: Tensor, step: float) -> Tensor:
        """A descent step inside the set."""
        ...


@dataclasses.dataclass(frozen=True)
class UnitRows:
    """Rows of unit norm: a gradient step, then every row is scaled back.

    Nothing keeps two rows from becoming equal; look at their coherence, or ask for a tight frame.
    """

    def nearest(self, operator: Tensor) -> Tensor:
        return normalised(operator)

    def move(self, operator: Tensor, gradient: Tensor, step: float) -> Tensor:
        return normalised(operator - step * gradient)


@dataclasses.dataclass(frozen=True)
class TightFrame:
    """Unit-norm tight frames: rows of unit norm and Gamma'Gamma = (p / m) I, so that no direction is given up.

    A Cayley step on the Stiefel manifold, Gamma+ = (I + t/2 E)^-1 (I - t/2 E) Gamma with the skew
    E = G Gamma' - Gamma G', keeps Gamma'Gamma. Then the frame and the rows are made exact in turn (alternating
    projections) to 1e-10, in float32 to 1e-5, or for 500 turns.
    Sources: Yaghoobi, Nam, Gribonval and Davies, Constrained overcomplete analysis operator learning for cosparse
    signal modelling, 2013; Wen and Yin, A feasible method for optimization with orthogonality constraints, 2013;
    Tropp, Dhillon, Heath and Strohmer, Designing structured tight frames via an alternating projection method, 2005.
    """

    def nearest(self, operator: Tensor) -> Tensor:
        m, p = operator.shape
        if p < m:
            raise ShapeError(f"a tight frame has at least as many rows as the signal has entries, given {p} and {m}")
        goal = 1e-10 if operator.dtype == torch.float64 else 1e-5
        for _ in range(500):
            left, _, right = torch.linalg.svd(operator, full_matrices=False)
            operator = left @ right * math.sqrt(p / m)
            norms = torch.linalg.vector_norm(operator, dim=0)
            operator = operator / norms
            if float((norms - 1).abs().max()) <= goal:
                break
        return operator

    def move(self, operator: Tensor, gradient: Tensor, step: float) -> Tensor:
        skew = gradient.mT @ operator - operator.mT @ gradient
        eye = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
        return self.nearest(torch.linalg.solve(eye + 0.5 * step * skew, (eye - 0.5 * step * skew) @ operator.mT).mT)


class Denoised(NamedTuple):
    """The dual codes u (batch, p) with |u_i| <= weight, and the step size that is tried next; x = y - Gamma'u."""

    dual: Tensor
    step: float


@dataclasses.dataclass(frozen=True)
class AnalysisOperator(Method):
    """min over Gamma of the mean over the signals y of P(Gamma, y) = min_x 1/2 |x - y|^2 + weight |Gamma x|_1.

    Code step: `steps` of accelerated projected gradients on the dual, x = y - Gamma'u with |u|_inf <= weight,
    warm-started. Operator step: the gradient of P, u x' (Danskin), inside the `constraint`, with backtracking on the
    primal value after as many dual steps. The dictionary that is learned is Gamma', (m, p): its columns are the rows of
    Gamma.
    """

    weight: float
    constraint: Constraint = dataclasses.field(default_factory=TightFrame)
    steps: int = 30

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)) or self.steps < 1:
            raise SettingsError(f"weight is positive and steps at least 1, given {self.weight} and {self.steps}")

    def initial(self, data: Tensor, atoms: int, generator: torch.Generator) -> Tensor:
        return self.constraint.nearest(directions(data[:0], atoms, generator).mT.contiguous())

    def refuse(self, dictionary: Tensor, data: Tensor) -> None:
        super().refuse(dictionary, data)
        away = float((self.constraint.nearest(dictionary) - dictionary).abs().max())
        if away > 1e-3:
            raise DataError(
                f"the operator to start from is {away:.2g} away from its constraint {self.constraint}; take "
                "constraint.nearest of it"
            )

    @torch.no_grad()
    def code(self, dictionary: Tensor, data: Tensor, memory: Denoised | None) -> Denoised:
        start = data.new_zeros(len(data), dictionary.shape[1]) if memory is None else memory.dual
        return Denoised(self.dual(dictionary, data, start), 1.0 if memory is None else memory.step)

    def dual(self, dictionary: Tensor, data: Tensor, start: Tensor) -> Tensor:
        """min over |u|_inf <= weight of 1/2 |y - Gamma'u|^2, by `steps` iterations from `start`."""
        rate = 1 / (float(torch.linalg.matrix_norm(dictionary.double(), 2)) ** 2 * (1 + 1e-12))
        u = before = start
        for k in range(self.steps):
            ahead = u + max(k - 1, 0) / (k + 3) * (u - before)
            moved = ahead + rate * ((data - ahead @ dictionary.mT) @ dictionary)
            u, before = moved.clamp(-self.weight, self.weight), u
        return u

    def primal(self, dictionary: Tensor, data: Tensor, dual: Tensor) -> float:
        """The mean of 1/2 |x - y|^2 + weight |Gamma x|_1 at x = y - Gamma'u."""
        moved = dual @ dictionary.mT
        sparse = ((data - moved) @ dictionary).abs().sum()
        return float((0.5 * moved.square().sum() + self.weight * sparse) / len(data))

    @torch.no_grad()
    def update(self, dictionary: Tensor, data: Tensor, memory: Denoised) -> tuple[Tensor, Denoised]:
        signal = data - memory.dual @ dictionary.mT
        gradient = signal.mT @ memory.dual / len(data)
        better, step = descend(
            lambda candidate: self.primal(candidate, data, self.dual(candidate, data, memory.dual)),
            lambda step: self.constraint.move(dictionary, gradient, step),
            self.primal(dictionary, data, memory.dual),
            memory.step,
            halvings=20,
        )
        return (dictionary if better is None else better), memory._replace(step=step)

    @torch.no_grad()
    def objective(self, dictionary: Tensor, data: Tensor, memory: Denoised) -> float:
        return self.primal(dictionary, data, self.dual(dictionary, data, memory.dual))
