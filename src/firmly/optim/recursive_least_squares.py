"""Recursive least squares as an estimator that learns one observation after the other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from firmly.errors import ConditionError, DataError, SettingsError, ShapeError
from firmly.optim.gain_profiles import MatrixGain, Profile


class RecursiveLeastSquares:
    """y = X coef' + intercept, fitted one row after the other, in double precision.

        eps = (y - theta' phi) / (1 + phi' F phi),   theta <- theta + F phi eps,   F <- F+  (`MatrixGain`, `profile`)

    With the decreasing gain (the default) theta minimises sum_t (y_t - theta' phi_t)^2 + |theta|^2 / `start` exactly;
    with `Forgetting` the sum with weights factor^age, the penalty too. `ceiling` bounds trace F, so that forgetting
    without excitation does no harm; by default it is the trace n `start` that F begins with.

    Methods take tensors, arrays or lists: X (rows, features), y (rows,) or (rows, outputs). After the first
    `partial_fit` there are `coef_` (features,) or (outputs, features), `intercept_` and `gain_`. Raises `ShapeError`,
    `DataError` for entries that are not finite, and `ConditionError` for a prediction before the first fit.
    """

    def __init__(
        self,
        profile: Profile | None = None,
        start: float = 1e6,
        ceiling: float | None = None,
        intercept: bool = True,
    ):
        if not (math.isfinite(start) and start > 0):
            raise SettingsError(f"start, the gain at the start, is positive and finite, given {start!r}")
        self.profile, self.start, self.ceiling, self.intercept = profile, start, ceiling, intercept
        self.gain_: MatrixGain | None = None
        self._theta = torch.empty(0)  # (regressors, outputs)
        self._flat = True

    def partial_fit(self, X: Any, y: Any) -> RecursiveLeastSquares:
        """Learns from the rows in their order; returns the estimator."""
        self.learn(X, y)
        return self

    @torch.no_grad()
    def learn(self, X: Any, y: Any) -> Tensor:
        """Predicts each row, then learns from it; returns the predictions, of the shape of y (prequential)."""
        phi = self._regressors(X)
        target = _finite(y, "y").to(phi.device)
        if target.ndim not in (1, 2) or len(target) != len(phi):
            raise ShapeError(f"y is (rows,) or (rows, outputs) for {len(phi)} rows, given {tuple(target.shape)}")
        rows = target.reshape(len(phi), 1 if target.ndim == 1 else target.shape[1])
        if self.gain_ is None:
            start = self.start * torch.eye(phi.shape[1], dtype=phi.dtype, device=phi.device)
            self.gain_ = MatrixGain(start, self.profile, self.ceiling)
            self._theta, self._flat = phi.new_zeros(phi.shape[1], rows.shape[1]), target.ndim == 1
        elif (self._flat, self._theta.shape[1]) != (target.ndim == 1, rows.shape[1]):
            raise ShapeError(f"y had {self._theta.shape[1]} outputs before, given shape {tuple(target.shape)}")
        predictions = torch.empty_like(rows)
        for t, regressor in enumerate(phi):
            predictions[t] = regressor @ self._theta
            direction = self.gain_.direction(regressor)
            errors = (rows[t] - predictions[t]) / (1 + regressor @ direction)
            self._theta = self._theta + torch.outer(direction, errors)
            self.gain_.update(regressor)
        return predictions.reshape(target.shape)

    def predict(self, X: Any) -> Tensor:
        """X coef' + intercept."""
        if self.gain_ is None:
            raise ConditionError("nothing was fitted yet: call partial_fit first")
        found = self._regressors(X) @ self._theta
        return found[:, 0] if self._flat else found

    @property
    def coef_(self) -> Tensor:
        """(features,), or (outputs, features) where y had two dimensions."""
        coefficients = self._theta[: len(self._theta) - self.intercept].mT
        return coefficients[0] if self._flat else coefficients

    @property
    def intercept_(self) -> Tensor:
        """A scalar, or (outputs,); zero without `intercept`."""
        constant = self._theta[-1] if self.intercept else torch.zeros_like(self._theta[0])
        return constant[0] if self._flat else constant

    def _regressors(self, X: Any) -> Tensor:
        rows = _finite(X, "X")
        if rows.ndim != 2 or not rows.shape[1]:
            raise ShapeError(f"X is (rows, features), given {tuple(rows.shape)}")
        if self.gain_ is not None:
            rows = rows.to(self._theta.device)
            if rows.shape[1] + self.intercept != len(self._theta):
                raise ShapeError(f"X had {len(self._theta) - self.intercept} features before, given {rows.shape[1]}")
        return torch.cat([rows, torch.ones_like(rows[:, :1])], 1) if self.intercept else rows

    def state_dict(self) -> dict[str, Any]:
        """Parameters and gain, for an estimator with the same settings; `ConditionError` before the first fit."""
        if self.gain_ is None:
            raise ConditionError("nothing was fitted yet: there is no state")
        return {"theta": self._theta.clone(), "flat": self._flat, "gain": self.gain_.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self._theta, self._flat = state["theta"].clone(), state["flat"]
        self.gain_ = MatrixGain(torch.eye(len(self._theta), dtype=self._theta.dtype), self.profile)
        self.gain_.load_state_dict(state["gain"])


def _finite(values: Any, name: str) -> Tensor:
    try:  # a list of floats would become float32
        tensor = torch.as_tensor(values, dtype=None if hasattr(values, "dtype") else torch.float64).detach()
    except TypeError as error:
        raise DataError(f"{name} consists of real numbers: {error}") from error
    if tensor.is_complex():
        raise DataError(f"{name} is real, given {tensor.dtype}")
    tensor = tensor.to(torch.float64)
    if not bool(tensor.isfinite().all()):
        raise DataError(f"{name} has entries that are not finite")
    return tensor
