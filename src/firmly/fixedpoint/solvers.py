"""Forward solvers of x = T(x): Picard, Anderson, Broyden and semismooth Newton, one loop and four updates.

Every solver treats the rows of (batch, entries) alone: a row that has converged is not touched again, and a batch gives
what its rows would give one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from firmly.errors import SettingsError
from firmly.fixedpoint.gmres import gmres
from firmly.fixedpoint.solve import Status
from firmly.fixedpoint.state import norms, relative_residual

Step = Callable[[Tensor], Tensor]  # (batch, entries) -> (batch, entries)
WORSE = 2.0  # a residual so many times the best one so far ends an acceleration


class Found(NamedTuple):
    """x with its relative residual (batch,) at exactly this x, the map evaluations of every row, and the status."""

    x: Tensor
    residual: Tensor
    iterations: Tensor
    status: Status


class Update(Protocol):
    def __call__(self, x: Tensor, image: Tensor) -> Tensor: ...


class Solver(Protocol):
    """A rule for the next x; `begin` makes one that has seen nothing yet."""

    def begin(self, step: Step) -> Update: ...


@dataclass(frozen=True)
class Picard:
    """x <- x + damping (T(x) - x)."""

    damping: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise SettingsError(f"the damping lies in (0, 1], given {self.damping}")

    def begin(self, step: Step) -> Update:
        return lambda x, image: x + self.damping * (image - x)


@dataclass(frozen=True)
class Anderson:
    """x <- sum_i a_i T(x_i) over the last `memory` iterates, with the a of sum 1 that minimises

        |sum_i a_i (T(x_i) - x_i)|^2 + regularisation trace(F F^T) |a|^2,    F the matrix of the residuals.

    Safeguarded: where the residual exceeds twice the best one so far, the row goes back to the best iterate, takes a
    plain step and forgets its memory. Source: Anderson 1965; Walker and Ni, Anderson acceleration for fixed-point
    iterations, 2011.
    """

    memory: int = 5
    regularisation: float = 1e-10

    def __post_init__(self) -> None:
        if self.memory < 1 or not self.regularisation >= 0:
            raise SettingsError(f"memory >= 1 and regularisation >= 0; given {self.memory}, {self.regularisation}")

    def begin(self, step: Step) -> Update:
        return _Anderson(self)


class _Anderson:
    def __init__(self, settings: Anderson):
        self.settings = settings
        self.images: list[Tensor] = []
        self.residuals: list[Tensor] = []
        self.alive: list[Tensor] = []  # which rows may use an iterate
        self.guard = _Guard()

    def __call__(self, x: Tensor, image: Tensor) -> Tensor:
        back = self.guard(x, image)
        self.images.append(image)
        self.residuals.append(image - x)
        self.alive = [alive & ~back for alive in self.alive] + [~back]
        for kept in (self.images, self.residuals, self.alive):
            del kept[: -self.settings.memory]
        F, alive = torch.stack(self.residuals, 1), torch.stack(self.alive, 1).to(x.real.dtype)
        F = F * alive[:, :, None]
        gram = F.conj() @ F.mT
        size = gram.diagonal(dim1=1, dim2=2).real.sum(1).clamp(min=torch.finfo(x.dtype).tiny)
        ridge = self.settings.regularisation * size[:, None] * alive + (1 - alive) * size[:, None]
        system = gram + torch.diag_embed(ridge + 4 * torch.finfo(x.dtype).eps * size[:, None]).to(gram.dtype)
        weights = torch.linalg.solve(system, alive[:, :, None].to(gram.dtype))[:, :, 0]
        total = weights.sum(1, keepdim=True)
        weights = weights / torch.where(total == 0, 1, total)
        ahead = torch.einsum("bm,bmn->bn", weights, torch.stack(self.images, 1))
        usable = ~back & torch.isfinite(ahead).all(1)
        return torch.where(usable[:, None], ahead, self.guard.image)


@dataclass(frozen=True)
class Broyden:
    """x <- x - B (T(x) - x) with B near the inverse Jacobian of T - I, by good Broyden updates, `memory` of them.

    Safeguarded as `Anderson`; with a full memory it starts again. Source: Broyden 1965.
    """

    memory: int = 20

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise SettingsError(f"memory is at least 1, given {self.memory}")

    def begin(self, step: Step) -> Update:
        return _Broyden(self.memory)


class _Broyden:
    def __init__(self, memory: int):
        self.memory = memory
        self.guard = _Guard()
        self.forget()

    def forget(self) -> None:
        self.left: list[Tensor] = []
        self.right: list[Tensor] = []
        self.before: tuple[Tensor, Tensor] | None = None

    def inverse(self, vector: Tensor, transposed: bool = False) -> Tensor:
        """B v, or B^T v, with B = -I + sum_i left_i right_i^T."""
        out = -vector
        for left, right in zip(self.left, self.right):
            a, b = (right, left) if not transposed else (left, right)
            out = out + b * (a * vector).sum(1, keepdim=True)
        return out

    def __call__(self, x: Tensor, image: Tensor) -> Tensor:
        back = self.guard(x, image)
        residual = image - x
        if len(self.left) >= self.memory:
            self.forget()
        if self.before is not None:
            dx, dr = x - self.before[0], residual - self.before[1]
            right = self.inverse(dx, transposed=True)
            scale = (right * dr).sum(1, keepdim=True)
            change = dx - self.inverse(dr)
            usable = scale.abs() > 1e-12 * norms(right)[:, None] * norms(dr)[:, None]
            left = torch.where(usable, change / torch.where(usable, scale, 1), 0)
            self.left, self.right = [*self.left, left], [*self.right, right]
        self.left = [torch.where(back[:, None], 0, part) for part in self.left]
        ahead = x - self.inverse(residual)
        usable = ~back & torch.isfinite(ahead).all(1)
        moved = torch.where(usable[:, None], ahead, self.guard.image)
        self.before = (
            torch.where(usable[:, None], x, self.guard.best),
            torch.where(usable[:, None], residual, self.guard.image - self.guard.best),
        )
        return moved


class _Guard:
    """The best iterate of every row, and which rows have to go back to it."""

    def __init__(self) -> None:
        self.least: Tensor | None = None

    def __call__(self, x: Tensor, image: Tensor) -> Tensor:
        size = norms(image - x)
        size = torch.where(torch.isfinite(size), size, math.inf)
        if self.least is None:
            self.least, self.best, self.image = size, x, image
            return torch.zeros_like(size, dtype=torch.bool)
        better = size < self.least
        back = size > WORSE * self.least
        self.least = torch.where(better, size, self.least)
        self.best = torch.where(better[:, None], x, self.best)
        self.image = torch.where(better[:, None], image, self.image)
        return back


@dataclass(frozen=True)
class Newton:
    """x <- x + t d with (I - J) d = T(x) - x, J an element of the generalised Jacobian of T at x, t by halving.

    The system is solved by GMRES to a tolerance that falls with the residual; where no t lowers |T(x) - x| the row
    takes a plain step. Superlinear near regular solutions, also where T is only semismooth (proximal maps).
    Source: Qi and Sun, A nonsmooth version of Newton's method, 1993.
    """

    halvings: int = 8

    def begin(self, step: Step) -> Update:
        return _Newton(step, self.halvings)


class _Newton:
    def __init__(self, step: Step, halvings: int):
        self.step = step
        self.halvings = halvings

    def __call__(self, x: Tensor, image: Tensor) -> Tensor:
        residual = image - x
        size = norms(residual)
        forcing = min(0.1, float(relative_residual(image, x).max()))
        d, _ = gmres(lambda v: v - push(self.step, x, v), residual, max(forcing, 1e-14), 200)
        moved, open_rows, t = image, torch.isfinite(d).all(1), 1.0
        for _ in range(self.halvings):
            trial = torch.where(open_rows[:, None], x + t * d, x)
            better = open_rows & (norms(self.step(trial) - trial) <= (1 - 1e-4 * t) * size)
            moved = torch.where(better[:, None], trial, moved)
            open_rows = open_rows & ~better
            if not bool(open_rows.any()):
                break
            t /= 2
        return moved


def push(step: Step, x: Tensor, w: Tensor) -> Tensor:
    """J w with J the derivative of the step at x, by transposing J^T: no forward-mode rules are needed."""
    pull = torch.func.vjp(step, x)[1]
    return torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(x))[1](w)[0]


@torch.no_grad()
def iterate(
    step: Step, start: Tensor, solver: Solver, tol: float, max_iterations: int,
    callback: Callable[[int, Tensor], object] | None = None,
) -> Found:  # fmt: skip
    """Apply the solver's update until every row has a relative residual of at most `tol`, or `max_iterations` times.

    `callback(iteration, residual)` follows every evaluation of the map. Ctrl-C ends the loop with what there is.
    """
    update, x = solver.begin(step), start
    iterations = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    residual = torch.full((len(x),), math.inf, dtype=x.real.dtype, device=x.device)
    status = Status.LIMIT
    try:
        for k in range(max_iterations + 1):
            image = step(x)
            residual = relative_residual(image, x)
            if callback is not None:
                callback(k, residual)
            done = residual <= tol
            if bool(done.all()):
                status = Status.CONVERGED
                break
            if not bool(torch.isfinite(residual).all()):
                status = Status.NON_FINITE
                break
            if k == max_iterations:
                break
            x = torch.where(done[:, None], x, update(x, image))
            iterations += ~done
    except KeyboardInterrupt:
        status = Status.INTERRUPTED
    return Found(x, residual, iterations, status)
