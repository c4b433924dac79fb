"""Alternating minimisation and unrolled learning: gradient steps with backtracking for a dictionary."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from firmly.errors import SettingsError
from firmly.priors.learning import Method, directions, normalised
from firmly.priors.sparse_model import SparseModel, descend
from firmly.priors.synthesis import CircularSynthesis


class Codes(NamedTuple):
    """The codes (batch, *code_shape), and the step size that the next dictionary step tries first."""

    values: Tensor
    step: float


@dataclasses.dataclass(frozen=True)
class Alternating(Method):
    """Codes by `steps` of FISTA, warm-started; then a gradient step in D with the codes held fixed.

    min over D and z of the mean of F, see `SparseModel`: dense or convolutional dictionaries, from complete data or
    through operators. The atoms are scaled back to unit norm in every step, which backtracking takes into account.
    `blind=True` accepts operators with a common null space, on which nothing can be learned.
    """

    model: SparseModel
    steps: int = 20
    blind: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise SettingsError(f"a code step has at least one iteration, given {self.steps}")

    def refuse(self, dictionary: Tensor, data: Tensor) -> None:
        self.model.refuse(dictionary, data, self.blind)

    def initial(self, data: Tensor, atoms: int, generator: torch.Generator) -> Tensor:
        signal = self.model.signal(data)
        circular = self.model.synthesis
        if isinstance(circular, CircularSynthesis):
            signal = signal[torch.randint(len(signal), (2 * atoms,), generator=generator).to(signal.device)]
            places = torch.randint(signal[0].numel(), (len(signal),), generator=generator)
            signal = circular.pieces(signal, places.to(signal.device))
        return normalised(directions(signal, atoms, generator).mT)

    def code(self, dictionary: Tensor, data: Tensor, memory: Codes | None) -> Codes:
        start, step = (None, 1.0) if memory is None else memory
        return Codes(self.model.codes(dictionary, data, self.steps, start), step)

    @torch.no_grad()
    def update(self, dictionary: Tensor, data: Tensor, memory: Codes) -> tuple[Tensor, Codes]:
        value, gradient = self._gradient(dictionary, data, memory)
        better, step = descend(
            lambda candidate: self.objective(candidate, data, memory),
            lambda step: normalised(dictionary - step * gradient),
            value,
            memory.step,
        )
        return dictionary if better is None else better, memory._replace(step=step)

    def _gradient(self, dictionary: Tensor, data: Tensor, memory: Codes) -> tuple[float, Tensor]:
        return self.model.gradient(dictionary, data, 0, start=memory.values)

    @torch.no_grad()
    def objective(self, dictionary: Tensor, data: Tensor, memory: Codes) -> float:
        return float(self.model.value(dictionary, data, memory.values))

    def unused(self, memory: Codes, atoms: int) -> Tensor:
        codes = memory.values
        return (codes == 0).all(0) if codes.dim() == 2 else (codes == 0).flatten(2).all(2).all(0)

    @torch.no_grad()
    def candidates(self, dictionary: Tensor, data: Tensor, memory: Codes) -> Tensor:
        rest = data - self.model.data(dictionary, memory.values)
        return self.model.synthesis.windows(self.model.signal(rest))


@dataclasses.dataclass(frozen=True)
class Unrolled(Alternating):
    """A gradient step in D on the mean of F(z_N(D), D): the gradient goes through the steps that make the codes.

    Codes start from zero in every round, so that the objective is a function of D alone; backtracking evaluates this
    function. `through` keeps the last of the steps only (None: all): backpropagation through hundreds of steps is
    unstable before the support settles.
    Source: Malezieux, Moreau and Kowalski, Understanding approximate and unrolled dictionary learning for pattern
    recovery, 2022.
    """

    through: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.through is not None and not 0 <= self.through <= self.steps:
            raise SettingsError(f"the gradient goes through 0 to steps = {self.steps} iterations, given {self.through}")

    def code(self, dictionary: Tensor, data: Tensor, memory: Codes | None) -> Codes:
        return super().code(dictionary, data, None)._replace(step=1.0 if memory is None else memory.step)

    def _gradient(self, dictionary: Tensor, data: Tensor, memory: Codes) -> tuple[float, Tensor]:
        return self.model.gradient(dictionary, data, self.steps, through=self.through)

    @torch.no_grad()
    def objective(self, dictionary: Tensor, data: Tensor, memory: Codes) -> float:
        return float(self.model.value(dictionary, data, self.model.codes(dictionary, data, self.steps)))
