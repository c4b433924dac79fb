"""Support selection: the largest entries pass a threshold unshrunk, as published and in a continuous form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from firmly.errors import ConditionError, NotCertifiable, SettingsError
from firmly.prox.l1 import soft_threshold
from firmly.prox.prior import Prior, Slope, largest, over_entries, positive, smallest, sum_over_sample


@dataclass(frozen=True)
class Selection:
    """How many entries layer k = 1, 2, ... selects: the part min(growth k, limit) of all, rounded up.

    ramp = 0 is the published rule, which is discontinuous; a positive ramp is the continuous one, of Lipschitz constant
    1 + 1 / ramp. The defaults are those published for codes with 10 % of non-zero entries.
    """

    growth: float = 0.012
    limit: float = 0.13
    ramp: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.growth <= 1 and 0 <= self.limit <= 1 and 0 <= self.ramp < math.inf):
            raise SettingsError(f"growth and limit lie in [0, 1] and the ramp is finite and at least 0, given {self}")

    def prior(self, layer: int, size: int, weight: Tensor, metric: Tensor | None = None) -> Prior:
        """The threshold of a layer, counted from 1, on codes of `size` entries."""
        count = math.ceil(size * min(self.growth * layer, self.limit) - 1e-9)
        if self.ramp == 0:
            return HardSelection(weight, count)
        return ContinuousSelection(weight, count, self.ramp, metric)


class HardSelection(Prior):
    """Soft threshold by t weight, but the `count` largest entries of a sample above the threshold pass unchanged.

    This is a prox of the trimmed l1 norm, weight times the sum of all but the `count` largest magnitudes, and not a
    function at ties: two entries that change places move the output by sqrt(2) t weight. No Lipschitz constant exists,
    and certificates refuse it. Source: Chen, Liu, Wang and Yin, Theoretical linear convergence of unfolded ISTA, 2018.
    """

    structure = "whole"

    def __init__(self, weight: float | Tensor, count: int):
        super().__init__()
        self._hold("weight", positive("the threshold weight", weight, allow_zero=True))
        self.count = count

    def value(self, x: Tensor) -> Tensor:
        size = (self.weight * x.abs()).flatten(1)
        return size.sum(1) - size.topk(min(self.count, size.shape[1]), dim=1).values.sum(1)

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        return hard_selection(z, step * self.weight, self.count)

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        raise NotCertifiable(
            "support selection as published is discontinuous: where two entries tie for the last place, the output "
            "jumps by sqrt(2) times the threshold, so that no Lipschitz constant exists; "
            "use selection=Selection(ramp=1.0), which is continuous, or selection=None"
        )

    def extra_repr(self) -> str:
        return f"count={self.count}"


def hard_selection(z: Tensor, threshold: float | Tensor, count: int | Tensor) -> Tensor:
    """z (batch, *shape) with all but the `count` largest entries above the threshold soft-thresholded.

    The threshold broadcasts against z; the count is one number, or one for every sample (batch,).
    """
    size = z.abs().flatten(1)
    if isinstance(count, int):
        count = torch.full((len(size),), count, device=size.device)
    order = size.sort(dim=1, descending=True).values
    place = (count.long() - 1).clamp(0, size.shape[1] - 1)
    last = torch.where(count > 0, order.gather(1, place[:, None])[:, 0], torch.inf)
    chosen = (z.abs() >= over_entries(last, z)) & (z.abs() > threshold)
    return torch.where(chosen, z, soft_threshold(z, threshold))


class ContinuousSelection(Prior):
    """v = sign(z) (max(|z| - theta, 0) + theta w), with w a continuous choice of at most `count` entries.

        theta = t weight,    w_i = clip((|z_i| / theta_i - 1) / ramp - mu / (metric_i theta_i^2), 0, 1),

    with the smallest mu >= 0 for which sum_i w_i <= count. An entry with w_i = 1 passes unchanged, one with w_i = 0 is
    soft-thresholded; towards ramp = 0 this is `HardSelection`, with count = 0 the soft threshold, and with all entries
    the firm threshold. It is the prox, in the metric sum_i metric_i x_i^2, of a weakly convex penalty, hence the
    gradient of a convex function with slopes in [0, 1 + 1 / ramp] in that metric (docs/lista).

    `weight` broadcasts against one sample, and so does `metric`; None is the Euclidean metric.
    """

    structure = "whole"
    real_only = True

    def __init__(self, weight: float | Tensor, count: float, ramp: float = 1.0, metric: Tensor | None = None):
        super().__init__()
        if not (ramp > 0 and math.isfinite(ramp) and count >= 0):
            raise ConditionError(f"the ramp is positive and the count at least 0, given {ramp} and {count}")
        self._hold("weight", positive("the threshold weight", weight))
        self.register_buffer("metric", None if metric is None else positive("the metric", metric))
        self.count = count
        self.ramp = ramp

    def value(self, x: Tensor) -> Tensor:
        """The penalty of a unit step, sum_i m_i (s_i (1 - w_i) |x_i| + (1 + ramp) s_i^2 w_i^2 / 2), s the weight, m the
        metric, with the w in [0, 1] of sum at most `count` for which it is least."""
        weight, metric, cost = self._scales(1.0, x)
        size = x.abs()
        w = capped_simplex((size / weight / (1 + self.ramp)).flatten(1), cost.flatten(1), self.count).reshape(x.shape)
        return sum_over_sample(metric * (weight * (1 - w) * size + (1 + self.ramp) * (weight * w) ** 2 / 2))

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        threshold, _, cost = self._scales(step, z)
        relative = (z.abs() / threshold - 1) / self.ramp
        w = capped_simplex(relative.flatten(1), cost.flatten(1), self.count).reshape(z.shape)
        return soft_threshold(z, threshold) + z.sgn() * threshold * w

    def _scales(self, step: float | Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The threshold, the metric, and what a unit of w costs at every entry, up to a common factor."""
        threshold = torch.as_tensor(step * self.weight, dtype=z.dtype, device=z.device)
        metric = torch.ones_like(threshold) if self.metric is None else torch.as_tensor(self.metric).to(z.dtype)
        cost = 1 / (metric * threshold**2)
        return threshold, metric, (cost / cost.mean()).expand(z.shape)

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        positive("the threshold weight", self.weight)  # it may have been learned since
        high = 1 + 1 / self.ramp
        if self.metric is None or self.metric.numel() == 1:
            return Slope.outward(0.0, high)
        high *= math.sqrt(largest(self.metric) / smallest(self.metric))
        return Slope.outward(-high, high)

    def extra_repr(self) -> str:
        return f"count={self.count}, ramp={self.ramp}"


def capped_simplex(x: Tensor, cost: Tensor, count: float) -> Tensor:
    """w = clip(x - mu cost, 0, 1) with the smallest mu >= 0 for which sum w <= count, row by row; all (batch, n).

    sum w is piecewise linear and falls in mu: it is summed up from the right over its sorted kinks, and mu is then
    written as a function of the entries strictly between 0 and 1, through which gradients pass.
    """
    with torch.no_grad():
        kinks, order = torch.cat([x / cost, (x - 1) / cost], 1).sort(dim=1, descending=True)
        rate = torch.cat([cost, -cost], 1).gather(1, order).cumsum(1)[:, :-1]  # of sum w, left of each kink
        reached = (rate * (kinks[:, :-1] - kinks[:, 1:])).cumsum(1)  # sum w at the next kink
        enough = reached >= count
        after = torch.where(enough.any(1), enough.long().argmax(1), reached.shape[1] - 1)[:, None]
        slope = rate.gather(1, after).clamp(min=torch.finfo(x.dtype).tiny)
        mu = (kinks.gather(1, after + 1) + (reached.gather(1, after) - count) / slope).clamp(min=0)
        w = x - mu * cost
        between, full = (w > 0) & (w < 1), w >= 1
        determined = enough.any(1, keepdim=True) & (mu > 0) & between.any(1, keepdim=True)
    total = torch.where(determined, (cost * between).sum(1, keepdim=True), 1.0)
    balance = ((x * between).sum(1, keepdim=True) + full.sum(1, keepdim=True) - count) / total
    mu = torch.where(determined, balance, mu)
    return torch.where(between, (x - mu * cost).clamp(0, 1), full.to(x.dtype))
