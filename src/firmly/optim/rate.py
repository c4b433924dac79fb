"""Certified linear rates on smooth strongly convex functions, by integral quadratic constraints."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.polynomial import chebyshev

from firmly.errors import NotCertifiable, SettingsError
from firmly.optim.adaptation_gain import AdaptationGain


class Rate(NamedTuple):
    """|x_t - x*| <= constant rho^t |x_0 - x*| for the state x of the iteration; `storage` P proves it (`verified`)."""

    rho: float
    weight: float
    storage: np.ndarray
    constant: float


def certified_rate(gain: AdaptationGain, lr: float, m: float, L: float) -> Rate:
    """The least rho that the weighted off-by-one constraint proves for all m-strongly convex, L-smooth functions.

    Gradients of such functions satisfy sum_t rho^-2t (u_t - m y_t) ((L y_t - u_t) - h (L y_{t-1} - u_{t-1})) >= 0 for
    0 <= h <= rho^2, about the minimiser. With one multiplier the linear matrix inequality is a positive real lemma:
    with N_k = (1 - z^-1) D + k lr z^-1 C, it has a solution iff the roots of N_m lie inside the circle of radius rho
    and Re((1 - h z^-1) N_L / N_m) > 0 on it, a polynomial in cos w that is affine in h. So rho is bisected without a
    semidefinite solver, and the storage function, from a Riccati equation, is checked exactly (`verified`).
    Raises `NotCertifiable` where no rho < 1 is proved. Source: Lessard, Recht, Packard, SIAM J. Optim. 2016.
    """
    if not (0 < m <= L < math.inf and 0 < lr < math.inf):
        raise SettingsError(f"a rate needs 0 < m <= L and lr > 0, given m {m}, L {L}, lr {lr}")
    gain_of_unit, ratio = lr * L, m / L  # scaled to L = 1: conditioning
    low, high = 0.0, 1.0
    if _weight(gain, gain_of_unit, ratio, high) is None:
        raise NotCertifiable(
            f"no rate below 1 is proved for {gain} at lr {lr} on functions with m = {m}, L = {L}: the off-by-one "
            "constraint fails on the unit circle. A smaller lr or less momentum may have one"
        )
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if _weight(gain, gain_of_unit, ratio, middle) is not None else (middle, high)
    for slack in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1):
        rho = high + slack * (1 - high)
        for weight in (_weight(gain, gain_of_unit, ratio, rho), rho**2):
            P = None if weight is None else _storage(gain, gain_of_unit, ratio, rho, weight)
            if weight is None or P is None:
                continue
            greatest = _above_spectrum(P)
            least = float(np.linalg.eigvalsh(P)[0]) - 1e-14 * greatest  # rounding
            if least > 0:
                rate = Rate(rho + slack * (1 - rho), weight, P, math.sqrt(greatest / least) * (1 + 1e-15))
                if verified(rate, gain, lr, m, L):
                    return rate
    raise NotCertifiable(
        f"the rate {high:.6f} of {gain} could not be verified: its storage function is too badly conditioned"
    )


def verified(rate: Rate, gain: AdaptationGain, lr: float, m: float, L: float) -> bool:
    """Does the storage function prove this rate and this constant for exactly these numbers? No solver is asked.

    P > 0, the matrix inequality and the condition number of P, at most constant^2, are decided by pivots in rational
    arithmetic: nothing is rounded.
    """
    if not 0 <= rate.weight <= Fraction(rate.rho) ** 2 < 1 <= rate.constant < math.inf:
        return False
    lr_of_unit, ratio = Fraction(lr) * Fraction(L), Fraction(m) / Fraction(L)
    A, B, C = state_space(gain, lr_of_unit)
    n, one = len(A), np.array([[1]], dtype=object)
    E = np.eye(n + 1, n + 2, dtype=int).astype(object)
    step = np.block([[A, np.zeros((n, 1), dtype=int).astype(object), B], [-C, 0 * one, one]])
    weight, P = Fraction(rate.weight), np.vectorize(Fraction, otypes=[object])(rate.storage)
    smooth, convex = np.append(C, [weight, -1])[None], np.append(-ratio * C, [0, 1])[None]
    decrease = Fraction(rate.rho) ** 2 * E.T @ P @ E - step.T @ P @ step - smooth.T @ convex - convex.T @ smooth
    unit, greatest = np.eye(len(P), dtype=int).astype(object), Fraction(_above_spectrum(rate.storage))
    bounds = (greatest * unit - P, P - greatest / Fraction(rate.constant) ** 2 * unit)
    return bool((P == P.T).all()) and all(map(is_positive_definite, (decrease, *bounds)))


def _above_spectrum(P: np.ndarray) -> float:
    """A little more than the greatest eigenvalue."""
    return float(np.linalg.eigvalsh(P)[-1]) * (1 + 1e-14)


def is_positive_definite(M: np.ndarray) -> bool:
    """Are all pivots of this symmetric matrix of fractions positive?"""
    M = M.copy()
    for k in range(len(M)):
        if not M[k, k] > 0:
            return False
        M[k + 1 :, k + 1 :] -= np.outer(M[k + 1 :, k], M[k, k + 1 :]) / M[k, k]
    return True


def _polynomials(gain: AdaptationGain, lr: float, slope: float) -> np.ndarray:
    """N of the slope, in powers of z^-1."""
    C, D = np.array([1, *gain.zeros]), np.array([1, -gain.poles[0], -gain.poles[1]])
    return np.convolve([1, -1], D) + slope * lr * np.append(0, C)


def _weight(gain: AdaptationGain, lr: float, m: float, rho: float) -> float | None:
    """An h in [0, rho^2] for which the real part is positive on the circle of radius rho; None if there is none."""
    smooth, convex = _polynomials(gain, lr, 1.0), _polynomials(gain, lr, m)
    if abs(np.roots(convex)).max() >= rho:
        return None
    scale = rho ** -np.arange(4.0)
    constant = _real_part(smooth * scale, convex * scale)
    slope = _real_part(np.append(0, smooth * scale)[:5] / rho, convex * scale)
    low, high = 0.0, rho**2
    while high - low > 1e-14:
        h = (low + high) / 2
        x = _where_least(constant - h * slope)
        a, b = float(chebyshev.chebval(x, constant)), float(chebyshev.chebval(x, slope))
        if a - h * b > 0:
            return h
        if b > 0:
            high = min(high, a / b)
        elif b < 0:
            low = max(low, a / b)
        else:
            return None
    return None


def _real_part(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Re(U conj(V)) on the unit circle as a Chebyshev series in cos w, for U and V in powers of z^-1, at most five."""
    u, v = (np.append(w, np.zeros(5 - len(w))) for w in (u, v))
    lags = [u[k:] @ v[: 5 - k] + (v[k:] @ u[: 5 - k] if k else 0) for k in range(5)]
    return np.array(lags)


def _where_least(series: np.ndarray) -> float:
    roots = chebyshev.chebroots(np.trim_zeros(chebyshev.chebder(series), "b")) if np.any(series[1:]) else np.array([])
    inside = [float(r.real) for r in roots if abs(r.imag) < 1e-6 and abs(r.real) < 1]
    return min([-1.0, 1.0, *inside], key=lambda x: float(chebyshev.chebval(x, series)))


def state_space(gain: AdaptationGain, lr: Fraction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From gradients to parameters, in fractions; states: the parameters, the last one or two filtered gradients."""
    (c1, c2), (d1, d2) = (map(Fraction, pair) for pair in (gain.zeros, gain.poles))
    A = np.array([[1, -lr * (d1 + c1), -lr * (d2 + c2)], [0, d1, d2], [0, 1, 0]], dtype=object)
    n = gain.order + 1
    return A[:n, :n], np.array([[-lr], [1], [0]], dtype=object)[:n], np.array([[1, 0, 0]], dtype=object)[:, :n]


def _storage(gain: AdaptationGain, lr: float, m: float, rho: float, h: float) -> np.ndarray | None:
    """P of the positive real lemma from u - m y to (u - y) - h (u - y) of the step before; None where none is found."""
    from scipy.linalg import LinAlgError, solve_discrete_are

    A, B, C = (matrix.astype(float) for matrix in state_space(gain, Fraction(lr)))
    n = len(A)
    inner = np.block([[A + m * B @ C, np.zeros((n, 1))], [(m - 1) * C, np.zeros((1, 1))]]) / rho
    entry = np.vstack([B, [[1.0]]]) / rho
    exit_ = np.append((m - 1) * C, -h)[:, None] / rho**2
    try:
        P: Any = -solve_discrete_are(inner, entry, np.zeros_like(inner), np.array([[2 / rho**2]]), s=exit_)
    except (LinAlgError, ValueError):
        return None
    return (P + P.T) / 2 if np.isfinite(P).all() else None
