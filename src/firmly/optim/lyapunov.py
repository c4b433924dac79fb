"""A Lyapunov function of the optimiser, read while a model is trained: it grows before the loss does."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from firmly.errors import NotCertifiable, SettingsError
from firmly.optim.adaptation_gain import AdaptationGain
from firmly.optim.dag import Dag
from firmly.optim.rate import is_positive_definite, state_space

_FLATTEST = 1e-3  # m / L: the storage function is strict
_SLOWEST = 1e-3  # of the greatest share of a group: below, a storage function is too badly conditioned to be found
_SHARE = 0.9  # of the sector limit, at which the storage function becomes singular


class StabilityWarning(UserWarning):
    """The Lyapunov function of a training run grows steadily."""


@functools.lru_cache(maxsize=256)
def sector_storage(gain: AdaptationGain, lr: float, m: float = _FLATTEST) -> np.ndarray:
    """P > 0 for which V = xi' P xi does not grow while gradients have slopes in [m, 1], for steps with this lr.

    xi is a difference of two states (parameters, filtered gradient, the one before), of consecutive ones or of two
    runs, and u the difference of their gradients: xi+ = A xi + B u, y = C xi. P is such that

        V+ - V <= -2 (u - m y)(y - u) <= 0   for all xi and u,

    the circle criterion in the time domain. It comes from a Riccati equation and is checked in rational arithmetic.
    Raises `NotCertifiable` where none is found, as above `gain.sector_limit()`.
    """
    from scipy.linalg import LinAlgError, solve_discrete_are

    A, B, C = state_space(gain, Fraction(lr))
    n = len(A)
    a, b, c = (matrix.astype(float) for matrix in (A, B, C))
    for slack in 10.0 ** np.arange(-9, -3):
        rho = 1 - slack
        try:
            inner, weight = (a + m * b @ c) / rho, np.array([[2 / rho**2]])
            P: Any = -solve_discrete_are(inner, b / rho, np.zeros((n, n)), weight, s=(m - 1) * c.T / rho**2)
        except (LinAlgError, ValueError):
            continue
        P = (P + P.T) / 2
        if np.isfinite(P).all() and _falls(P, (A, B, C), m):
            return P
    raise NotCertifiable(
        f"no storage function was found for {gain} at lr {lr}: steps are proved to be stable for slopes in [0, 1] "
        f"where lr is below {gain.sector_limit():.4g}"
    )


def _falls(storage: np.ndarray, system: tuple[np.ndarray, np.ndarray, np.ndarray], m: float) -> bool:
    """Is P > 0, and the inequality of `sector_storage` strict, for exactly these numbers?"""
    A, B, C = system
    P, zero = np.vectorize(Fraction, otypes=[object])(storage), np.array([[0]], dtype=object)
    step, now = np.hstack([A, B]), np.eye(len(A), len(A) + 1, dtype=int).astype(object)
    u = np.hstack([0 * C, zero + 1])
    y = np.hstack([C, zero])
    flat, steep = u - Fraction(m) * y, y - u
    decrease = now.T @ P @ now - step.T @ P @ step - flat.T @ steep - steep.T @ flat
    return is_positive_definite(P) and is_positive_definite(decrease)


class LyapunovMonitor:
    """Follows V = sum over parameters of xi' P xi, xi the last change of the state of a `Dag`, and warns when it grows.

    What is proved: while the rate is constant and weight decay not decoupled, V falls in every step if the gradients
    are those of one function with slopes in [m, L], L = `slope_limit()`, m = L / 1000 (`sector_storage`; no minimiser
    has to be known; groups more than 1000 times slower than others are followed without proof). So a V that grows
    shows that slopes left that interval, or that gradients changed for another reason, such as another batch.
    What is not: V may grow for a while although a quadratic is stable, and noise keeps it level; a falling V says
    nothing about the next step. Therefore the warning is for growth that lasts: the mean of V over `window` steps
    exceeds `growth` times the mean before, three windows in a row, or is not finite. Changes along a direction that
    became unstable outgrow those of the slow directions, which make up the loss, so that V shows them earlier. A run
    that blows up within the first four windows is over before that.

    `history` holds the means of all windows. V is in units of the gradient, so that schedules do not change it. The
    monitor costs one buffer (none for plain gradient steps), two or three inner products per step, and one transfer
    per window. `alarm(message)` replaces `warnings.warn`. `detach()` ends it. Raises `SettingsError` for filters whose
    sector limit is zero: they have no such V.
    """

    def __init__(
        self, optimiser: Dag, window: int = 10, growth: float = 2.0, alarm: Callable[[str], object] | None = None
    ):
        if not (isinstance(window, int) and window >= 1 and growth > 1):
            raise SettingsError(f"a window has at least one step and growth is above 1, given {window!r}, {growth!r}")
        self.optimiser, self.window, self.growth = optimiser, window, growth
        self.alarm = alarm or (lambda message: warnings.warn(message, StabilityWarning, stacklevel=4))
        self.history: list[float] = []
        self._readings: list[Tensor] = []
        self._oldest: dict[Tensor, Tensor] = {}
        self._warned = False
        self._forms()  # refuses now what it could not follow later
        self._remember()
        self._hooks = [
            optimiser.register_step_post_hook(lambda *_: self._read()),
            optimiser.register_load_state_dict_post_hook(lambda *_: self._remember()),
        ]

    def slope_limit(self) -> float:
        """L: with the present rate V provably falls for slopes up to here."""
        shares = [group["lr"] / gain.sector_limit() for group, gain in self._moving()]
        return _SHARE / float(max(shares)) if shares else math.inf

    def detach(self) -> None:
        """Stops listening to the optimiser and frees the buffer."""
        for hook in self._hooks:
            hook.remove()
        self._oldest.clear()

    def _remember(self) -> None:
        """Copies the buffers that the next step overwrites."""
        for p, state in self.optimiser.state.items():
            if "filtered" in state:
                self._oldest[p] = state.get("filtered_before", state["filtered"]).clone()

    def _moving(self) -> list[tuple[dict[str, Any], AdaptationGain]]:
        groups = [(group, AdaptationGain(group["zeros"], group["poles"])) for group in self.optimiser.param_groups]
        for _, gain in groups:
            if not gain.sector_limit() > 0:
                raise SettingsError(f"{gain} has no positive sector limit: no Lyapunov function to follow")
        return [(group, gain) for group, gain in groups if group["lr"] > 0]

    def _forms(self) -> list[tuple[dict[str, Any], np.ndarray]]:
        """For each group the matrix of V as a quadratic form in its filtered gradients, newest first."""
        moving = self._moving()
        limits = [float(group["lr"]) / gain.sector_limit() for group, gain in moving]
        forms = []
        for (group, gain), share in zip(moving, limits, strict=True):
            lr = _SHARE * max(share / max(limits), _SLOWEST) * gain.sector_limit()  # times L, one L for all groups
            n = gain.order + 1
            change = np.array([[-lr, -lr * gain.zeros[0], -lr * gain.zeros[1]], [1, -1, 0], [0, 1, -1]])[:n, :n]
            forms.append((group, change.T @ sector_storage(gain, lr) @ change))
        return forms

    @torch.no_grad()
    def _read(self) -> None:
        total = None
        for group, form in self._forms():
            for p in group["params"]:
                if p.grad is not None:
                    value = self._value(p, p.grad, group, form)
                    total = value if total is None else total + value.to(total.device)
        if total is not None:
            self._readings.append(total)
        if len(self._readings) == self.window:
            self.history.append(float(torch.stack(self._readings).mean()))
            self._readings.clear()
            self._judge()

    def _value(self, p: Tensor, gradient: Tensor, group: dict[str, Any], form: np.ndarray) -> Tensor:
        state, order = self.optimiser.state[p], len(form) - 1
        if order == 0:
            g, decay = -gradient if group["maximize"] else gradient, group["weight_decay"]
            if decay and not group["decoupled"]:  # p has moved since: p = p_before - lr (g + decay p_before)
                g = (g + decay * p) / (1 - group["lr"] * decay)
            newest = [g]
        else:
            buffers = [state[name] for name in ("filtered", "filtered_before")[:order]]
            if p not in self._oldest:
                self._oldest[p] = torch.zeros_like(p)
            newest = [*buffers, self._oldest[p]]
        flat = [(torch.view_as_real(w) if w.is_complex() else w).reshape(-1) for w in newest]
        if p.dtype in (torch.float16, torch.bfloat16):
            flat = [w.float() for w in flat]
        pairs = itertools.combinations_with_replacement(range(order + 1), 2)
        terms = [form[i, j] * (1 if i == j else 2) * torch.dot(flat[i], flat[j]) for i, j in pairs]
        if order:
            self._oldest[p].copy_(newest[order - 1])
        return torch.stack(terms).sum().double()

    def _judge(self) -> None:
        last = self.history[-4:]
        growing = len(last) == 4 and all(b > self.growth * a for a, b in itertools.pairwise(last))
        if (growing or not math.isfinite(last[-1])) and not self._warned:
            self._warned = True
            self.alarm(
                f"the Lyapunov function of the optimiser grows: {', '.join(f'{v:.3g}' for v in last)} over the last "
                f"windows of {self.window} steps. For slopes of the gradient up to {self.slope_limit():.3g} it would "
                "fall; lower the learning rate or the momentum, or look at the last batches"
            )
        elif len(last) > 1 and last[-1] < last[-2]:
            self._warned = False
