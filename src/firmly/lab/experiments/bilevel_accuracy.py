"""How accurate hypergradients are, computed anew: right and wrong solvers on one Lasso, central differences on data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from firmly.algorithms import ForwardBackward
from firmly.errors import NotConverged
from firmly.fixedpoint import AdjointWarning, Anderson, Implicit, Neumann, OneStep, implicit
from firmly.lab.charts import number
from firmly.lab.experiments.bilevel_problems import Split
from firmly.lab.page import Table
from firmly.linear import Dense
from firmly.priors.losses import Squared
from firmly.priors.sparse_linear import SparseLinear
from firmly.prox import L1


class Lasso:
    """100 training and 50 validation samples of 200 features: d loss / d weight at a tenth of the largest weight."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.X, truth = normal(100, 200), torch.zeros(200, dtype=torch.float64)
        truth[:10] = 1
        self.y = self.X @ truth + 0.3 * normal(100)
        self.validation = normal(50, 200)
        self.target = self.validation @ truth
        self.weight = 0.1 * float((self.X.mT @ self.y).abs().max()) / 100
        self.newton = SparseLinear(self.X, self.y[:, None], Squared(), intercept=False)
        self.A = Dense(self.X / 10)

    def loss(self, b: Tensor) -> Tensor:
        return (self.validation @ b - self.target).square().mean()

    def by_newton(self, weight: Tensor) -> Tensor:
        return self.loss(self.newton.solve(weight, tol=1e-13)[:-1, 0])

    def by_fixed_point(self, adjoint: Any) -> Callable[[Tensor], Tensor]:
        def value(weight: Tensor) -> Tensor:
            layer = implicit(ForwardBackward(self.A, L1(weight)), adjoint, Anderson(10), 1e-12, 100_000)
            return self.loss(layer(self.y[None] / 10)[0])

        return value

    def solution(self) -> Tensor:
        return self.newton.solve(torch.tensor(self.weight, dtype=torch.float64), tol=1e-13)[:-1, 0]

    def closed_form(self) -> float:
        """-n v_S' (X_S' X_S)^-1 sgn(b_S), v the gradient of the loss."""
        b = self.solution()
        S, v = b != 0, 2 * self.validation.mT @ (self.validation @ b - self.target) / 50
        return -100 * float(v[S] @ torch.linalg.solve(self.X[:, S].mT @ self.X[:, S], b[S].sign()))

    def flipped(self, terms: int) -> tuple[float, float]:
        """A Neumann series on the condition T(b) - b = 0: the derivative, and the relative residual of its system."""
        b, step = self.solution(), 100 / float(torch.linalg.matrix_norm(self.X, 2)) ** 2
        S, v = b != 0, 2 * self.validation.mT @ (self.validation @ b - self.target) / 50
        J = S[:, None] * (torch.eye(200, dtype=torch.float64) - step * self.X.mT @ self.X / 100)
        system = J.mT - torch.eye(200, dtype=torch.float64)
        u, power = v.clone(), v.clone()
        for _ in range(terms):
            power = power - system @ power
            u = u + power
        return float(u @ (step * b.sign())), float((system @ u - v).norm() / v.norm())


def difference(value: Callable[[Tensor], Tensor], weight: Tensor, direction: Tensor, h: float = 1e-5) -> float:
    """The derivative along a direction by central differences."""
    with torch.no_grad():
        return float(value(weight + h * direction) - value(weight - h * direction)) / (2 * h)


def right_and_wrong(seed: int) -> tuple[Table, float]:
    """Every way to the same derivative beside the closed form; and the error of the derivative that we take."""
    problem = Lasso(seed)
    truth, rows, ours = problem.closed_form(), [], 0.0
    weight = torch.tensor(problem.weight, dtype=torch.float64)

    def add(name: str, value: float, said: str) -> float:
        error = abs(value / truth - 1)
        rows.append((name, f"{value:.6f}", f"{error:.1e}", said))
        return error

    add("closed form", truth, "")
    add("central differences", difference(problem.by_newton, weight, torch.ones_like(weight)), "two more solves")
    ways: list[tuple[str, Callable[[Tensor], Tensor], bool]] = [
        ("SparseLinear: reduced system on the support", problem.by_newton, True),
        ("implicit(..., Implicit('manifold'))", problem.by_fixed_point(Implicit("manifold")), True),
        ("implicit(..., Implicit('gmres'))", problem.by_fixed_point(Implicit("gmres")), True),
        ("implicit(..., Neumann(1000))", problem.by_fixed_point(Neumann(1000)), False),
        ("implicit(..., Neumann(10))", problem.by_fixed_point(Neumann(10)), False),
        ("implicit(..., OneStep())", problem.by_fixed_point(OneStep()), False),
    ]
    marked = []
    for name, value, good in ways:
        parameter = weight.clone().requires_grad_()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", AdjointWarning)
            try:
                (found,) = torch.autograd.grad(value(parameter), parameter)
            except NotConverged:
                rows.append((name, "", "", "refused"))
                continue
        if good:
            marked.append(len(rows))
        error = add(name, float(found), "warned" if caught else "residual within the tolerance")
        ours = max(ours, error) if good else ours
    value, residual = problem.flipped(10)
    add("Neumann series, 10 powers, of T(b) − b", value, f"residual {number(residual)}: what a library without the "
        "check returns")  # fmt: skip
    caption = (
        "The derivative of the validation loss of a Lasso in its weight. Many libraries end a Neumann series after a "
        "fixed number of terms; here its residual is measured, and it warns or is refused."
    )
    return Table(("how", "derivative", "relative error", "what is said"), rows, caption, marked), ours


def on_data(split: Split, weights: Tensor, seed: int) -> float:
    """The relative error of a derivative in all weights, along a random change of their logarithms."""

    def value(logs: Tensor) -> Tensor:
        return split.error(split.train.solve(logs.exp(), tol=1e-13), split.validation)

    generator = torch.Generator().manual_seed(seed)
    logs = weights.log().clone().requires_grad_()
    direction = torch.randn(logs.shape, generator=generator, dtype=logs.dtype)
    (found,) = torch.autograd.grad(value(logs), logs)
    expected = difference(value, logs.detach(), direction, 1e-6)
    return abs(float(found @ direction) - expected) / max(abs(expected), 1e-300)
