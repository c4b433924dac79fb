"""Iterate an algorithm to a fixed point: the one loop, with its stop test and its honest report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from firmly.algorithms.algorithm import Algorithm, check
from firmly.errors import DataError, SettingsError, ShapeError
from firmly.fixedpoint.state import in_range, relative_residual

CHECK_EVERY = 10  # iterations between residuals of methods with momentum or relaxation, where each costs a step


class Status(Enum):
    """How a solve ended; the value is the sentence for the user."""

    CONVERGED = "converged: the residual is within the tolerance"
    LIMIT = "stopped at the iteration limit before the tolerance was reached: raise max_iterations or tol"
    NON_FINITE = "stopped at values that are not finite: the result is the last finite state; check the step sizes"
    INTERRUPTED = "interrupted: the result is the last state whose residual was measured"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Solution:
    """What `solve` returns: the image, how the iteration ended, and the residual at exactly this image.

    `state` is the whole state that x was read from; `stats` holds "residuals", a list of (iteration, residual), and
    "seconds".
    """

    x: Tensor
    status: Status
    iterations: int
    residual: float
    state: Any
    stats: dict[str, Any] = field(repr=False)

    @property
    def converged(self) -> bool:
        return self.status is Status.CONVERGED


@torch.no_grad()
def solve(
    algorithm: Algorithm,
    y: Tensor,
    tol: float = 1e-6,
    max_iterations: int = 10_000,
    start: Tensor | None = None,
    callback: Callable[[int, Tensor, float], object] | None = None,
    waive: Iterable[str] = (),
) -> Solution:
    """The fixed point of `algorithm` for data y (batch, *data_shape), from the image `start` if given.

    With T the undamped map (`Algorithm.undamped`: no momentum, no relaxation) and s the state that is returned,

        residual = max over the batch of |T(s) - s| / max(|T(s)|, |s|),     0 where both vanish,

    in the Euclidean norm over all tensors of the state. The loop stops when residual <= tol. Where T is the step itself
    the residual is measured in every iteration, else in every tenth; `callback(iteration, x, residual)` follows each
    measurement. Ctrl-C ends the loop and keeps the last state measured.

    Raises `ConditionError` for conditions of the algorithm that do not hold (`waive` names those to ignore),
    `ShapeError` for misfit data, `DataError` for data that are not finite floating-point numbers, and `SettingsError`
    for a senseless tolerance or limit.
    """
    if not (tol >= 0 and math.isfinite(tol)):
        raise SettingsError(f"tol is a finite number of at least 0, given {tol}")
    if max_iterations < 1:
        raise SettingsError(f"max_iterations is at least 1, given {max_iterations}")
    refuse_bad("data", y, algorithm.data_shape)
    if start is not None:
        refuse_bad("start", start, algorithm.image_shape)
    check(algorithm.conditions(), waive)

    free = type(algorithm).undamped is Algorithm.undamped  # the residual is a by-product of the step
    began, residuals = time.perf_counter(), []
    state = algorithm.start(y, start)
    kept, status = (state, 0, math.nan), Status.INTERRUPTED
    try:
        for k in range(max_iterations + 1):
            following = None
            if free or k % CHECK_EVERY == 0 or k == max_iterations:
                following = algorithm.undamped(state, y, k)
                residual = relative_change(following, state)
                residuals.append((k, residual))
                if not math.isfinite(residual):
                    status = Status.NON_FINITE
                    break
                kept = (state, k, residual)
                if callback is not None:
                    callback(k, algorithm.read(state), residual)
                if residual <= tol or k == max_iterations:
                    status = Status.CONVERGED if residual <= tol else Status.LIMIT
                    break
            state = following if free else algorithm.step(state, y, k)
    except KeyboardInterrupt:
        pass
    state, iterations, residual = kept
    stats = {"residuals": residuals, "seconds": time.perf_counter() - began}
    return Solution(algorithm.read(state), status, iterations, residual, state, stats)


def refuse_bad(what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless the tensor is a batch of the given shape of finite floating-point (or complex) numbers."""
    if tuple(tensor.shape[1:]) != tuple(shape) or tensor.dim() != len(shape) + 1 or tensor.shape[0] == 0:
        expected = ", ".join(map(str, ("batch", *shape)))
        raise ShapeError(f"{what} has shape {tuple(tensor.shape)}, expected ({expected}) with a batch of at least one")
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise DataError(f"{what} has dtype {tensor.dtype}, expected floating-point or complex numbers; use .float()")
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise DataError(f"{what} has {bad} of {tensor.numel()} entries that are NaN or infinite; clean it first")


def relative_change(new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> float:
    """max over the batch of |new - old| / max(|new|, |old|), 0 where both vanish; NaN if any value is not finite."""
    size = torch.maximum(batch_norm(new), batch_norm(old))
    if bool(in_range(size).all()):
        return float((batch_norm(tuple(n - o for n, o in zip(new, old, strict=True))) / size).max())
    flat = (torch.cat([part.flatten(1) for part in state], 1) for state in (new, old))
    return float(relative_residual(*flat).max())


def batch_norm(state: tuple[Tensor, ...]) -> Tensor:
    """The Euclidean norm over all tensors of a state, for each element of the batch: (batch,)."""
    parts = [torch.linalg.vector_norm(part.flatten(1), dim=1) for part in state]
    return torch.linalg.vector_norm(torch.stack(parts), dim=0)
