"""A layer whose output is the solution of an optimisation problem: `firmly.implicit(algorithm)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from firmly.algorithms.algorithm import Algorithm, check
from firmly.errors import SettingsError
from firmly.fixedpoint.adjoints import Adjoint, Checkpointed, Implicit, Unrolled
from firmly.fixedpoint.contraction import contraction_factor
from firmly.fixedpoint.fixed_point import FixedPoint, fixed_point
from firmly.fixedpoint.manifold import ManifoldSolver, prior_of
from firmly.fixedpoint.solve import refuse_bad
from firmly.fixedpoint.solvers import Picard, Solver
from firmly.fixedpoint.state import wants_derivative
from firmly.replaced_tensors import call_with


class ImplicitLayer(nn.Module):
    """`layer(y)` is the image at the fixed point of an algorithm for data y, with gradients; made by `implicit`.

    `layer.solve(y)` returns the whole account, a `FixedPoint` whose state is the algorithm's.
    """

    def __init__(
        self, algorithm: Algorithm, adjoint: Adjoint, solver: Solver, tol: float | None, max_iterations: int,
        waive: Iterable[str],
    ):  # fmt: skip
        super().__init__()
        self.algorithm = algorithm
        self.adjoint, self.solver = adjoint, solver
        self.tol, self.max_iterations = tol, max_iterations
        self.waive = tuple(waive)
        self.inputs = {"data": tuple(algorithm.data_shape)}

    def forward(self, y: Tensor, start: Tensor | None = None) -> Tensor:
        return self.algorithm.read(self.solve(y, start).state)

    def solve(self, y: Tensor, start: Tensor | None = None) -> FixedPoint:
        """The fixed point for data y (batch, *data_shape), from the image `start` if given."""
        algorithm = self.algorithm
        refuse_bad("data", y, algorithm.data_shape)
        check(algorithm.conditions(), self.waive)
        tensors = {n: t for n, t in named_tensors(algorithm).items() if wants_derivative(t)}
        names = list(tensors)

        def T(state: Any, data: Tensor, *values: Tensor) -> Any:
            return call_with(Undamped(algorithm), prefixed(dict(zip(names, values))), (state, data))

        with torch.no_grad():
            first = algorithm.start(y, start)
        adjoint, manifold = self.adjoint, None
        if isinstance(adjoint, Implicit) and adjoint.solver == "manifold":
            manifold = ManifoldSolver(algorithm, names)
            adjoint = replace(adjoint, solver=manifold)
        found = fixed_point(
            T, first, y, *tensors.values(), solver=self.solver, adjoint=adjoint, tol=self.tol,
            max_iterations=self.max_iterations,
        )  # fmt: skip
        found.modulus = modulus_of(algorithm)
        if manifold is not None:
            found.least_curvatures = manifold.least_curvatures
        return found


def modulus_of(algorithm: Algorithm) -> Callable[[], float | None]:
    """The modulus of strong monotonicity of I - T, when it is asked for: factorisations may stand behind it.

    None once a tensor of the algorithm was replaced: the map of the solution still has the old one.
    """
    tensors = named_tensors(algorithm)

    def modulus() -> float | None:
        now = named_tensors(algorithm)
        if now.keys() != tensors.keys() or any(now[name] is not tensor for name, tensor in tensors.items()):
            return None
        factor = contraction_factor(algorithm)
        return None if factor is None else 1 - factor

    return modulus


class Undamped(nn.Module):
    """The plain map of an algorithm as a module, so that its tensors can be replaced for one call."""

    def __init__(self, algorithm: Algorithm):
        super().__init__()
        self.algorithm = algorithm

    def forward(self, state: Any, y: Tensor) -> Any:
        return self.algorithm.undamped(state, y, 0)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name: a prior holds a tensor weight that is no parameter as a buffer."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def prefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"algorithm.{name}": tensor for name, tensor in tensors.items()}


def implicit(
    algorithm: Algorithm,
    adjoint: Adjoint = Implicit(),  # noqa: B008
    solver: Solver = Picard(),  # noqa: B008
    tol: float | None = None,
    max_iterations: int = 10_000,
    waive: Iterable[str] = (),
) -> ImplicitLayer:
    """A layer whose output is the fixed point of `algorithm`: gradients reach the data and every tensor inside it.

    What is iterated, and differentiated, is the plain map `algorithm.undamped`, without momentum or relaxation: it has
    the same fixed points, and derivatives of inertial iterations can diverge near kinks although the iterates converge
    (Bolte, Pauwels and Vaiter 2022, section 4). So `Unrolled` and `Checkpointed` are refused for algorithms with
    momentum; `solver` may accelerate. Raises `ConditionError` for conditions of the algorithm that do not hold, `waive`
    names those to ignore.
    """
    if isinstance(adjoint, (Unrolled, Checkpointed)) and type(algorithm).undamped is not Algorithm.undamped:
        raise SettingsError(
            f"{type(algorithm).__name__} has momentum or relaxation, and derivatives of its iterations can diverge "
            "near kinks although the iterates converge: take adjoint=Implicit(), or unroll the plain algorithm"
        )
    if isinstance(adjoint, Implicit) and adjoint.solver == "manifold":
        prior_of(algorithm)
    check(algorithm.conditions(), waive)
    return ImplicitLayer(algorithm, adjoint, solver, tol, max_iterations, waive)
