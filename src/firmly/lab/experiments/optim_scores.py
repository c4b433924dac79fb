"""Numbers that say how good an optimiser was: on a stream, and over its learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

RECOVERED = 0.95  # of the accuracy before a drift


def kappa_temporal(accuracy: float, no_change: float) -> float:
    """(accuracy - no_change) / (1 - no_change): 0 for the predictor that repeats the last label, 1 for no error.

    Source: Zliobaite, Bifet, Read, Pfahringer, Holmes, Machine Learning 98, 2015.
    """
    return (accuracy - no_change) / (1 - no_change) if no_change < 1 else -math.inf


def windowed(correct: Tensor, window: int) -> list[tuple[float, float]]:
    """(number of samples seen, accuracy of the last `window` of them), for windows side by side."""
    ends = range(window, len(correct) + 1, window)
    return [(float(end), float(correct[end - window : end].double().mean())) for end in ends]


def recovery(correct: Tensor, drifts: Sequence[int], window: int) -> list[int]:
    """Samples from each drift until the accuracy of the last `window` is 95% of that before the drift, or more.

    Only samples after the drift count, so that none recovers in less than `window`. One that does not recover before
    the next drift takes all the time there was.
    """
    times = []
    for start, end in zip(drifts, [*drifts[1:], len(correct)]):
        level = RECOVERED * float(correct[max(0, start - window) : start].double().mean())
        sums = correct[start:end].double().cumsum(0)
        means = (sums[window - 1 :] - _delayed(sums, window)) / window
        reached = (means >= level - 1e-12).nonzero()
        times.append(window + int(reached[0]) if len(reached) else end - start)
    return times


def _delayed(sums: Tensor, window: int) -> Tensor:
    """The sums `window` places before, zero at first."""
    delayed = sums.new_zeros(max(0, len(sums) - window + 1))
    delayed[1:] = sums[: max(0, len(sums) - window)]
    return delayed


def reached(
    curve: Sequence[tuple[float, float]], drifts: Sequence[int], levels: Sequence[float], length: int
) -> list[float]:
    """Samples from each drift to the end of the first whole window after it with 95% of the given accuracy, or more.

    All samples up to the next drift where there is none; `curve` as `windowed` makes it, of a stream of that length.
    """
    window = curve[1][0] - curve[0][0] if len(curve) > 1 else float(length)
    times = []
    for start, end, level in zip(drifts, [*drifts[1:], length], levels):
        after = [at - start for at, value in curve if start + window <= at <= end and value >= RECOVERED * level]
        times.append(after[0] if after else float(end - start))
    return times


def area(rates: Sequence[float], scores: Sequence[float]) -> float:
    """The mean score over log10(rate): the trapezoidal area below the curve over the range of the rates."""
    at = [math.log10(rate) for rate in rates]
    if len(at) < 2:
        return scores[0]
    parts = [(b - a) * (u + v) / 2 for a, b, u, v in zip(at, at[1:], scores, scores[1:])]
    return sum(parts) / (at[-1] - at[0])


def width(rates: Sequence[float], scores: Sequence[float], within: float = 0.01) -> float:
    """Decades of learning rates around the best one with scores at most `within` less than its own; linear between."""
    at = [math.log10(rate) for rate in rates]
    best = max(range(len(scores)), key=lambda i: scores[i])
    level = scores[best] - within

    def reach(step: int) -> float:
        i = best
        while 0 <= i + step < len(at) and scores[i + step] >= level:
            i += step
        if not 0 <= i + step < len(at):
            return at[i]
        share = (scores[i] - level) / (scores[i] - scores[i + step])
        return at[i] + share * (at[i + step] - at[i])

    return reach(1) - reach(-1)
