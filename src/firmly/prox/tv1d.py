"""Total variation of signals, whose prox is exact, parallel and differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.errors import DataError, ShapeError
from firmly.prox.manifold import Manifold
from firmly.prox.prior import Prior, Slope, positive, sum_over_sample


class TV1D(Prior):
    """g(x) = weight sum_i |x[i + 1] - x[i]| along the last axis: signals (batch, n) or (batch, *channels, n).

    `weight` is a non-negative number, or a tensor that broadcasts against one number per signal, (*channels, 1).
    The prox is exact up to rounding: it is constant on the blocks B of `jumps`, where it is the mean of z plus
    t weight (s_right - s_left) / |B|, with s the signs of the jumps that enter and leave the block (0 at the ends).
    So its derivative in z is block averaging, in t weight the shift above, and its second derivative zero; all three
    are what autograd gives, in reverse and forward mode. At ties, where a jump appears or vanishes, it is one of the
    one-sided derivatives.
    Source: Condat, A direct algorithm for 1-D total variation denoising, 2013, section II (the optimality conditions);
    the derivatives are derived in docs/learned_tv.md.
    """

    structure = "whole"
    real_only = True

    def __init__(self, weight: float | Tensor = 1.0):
        super().__init__()
        self._hold("weight", positive("the weight of total variation", weight, allow_zero=True))

    def value(self, x: Tensor) -> Tensor:
        return sum_over_sample(self.weight * x.diff(dim=-1).abs())

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        if z.dim() < 2:
            raise ShapeError(f"TV1D takes signals (batch, n) or (batch, *channels, n), given {tuple(z.shape)}")
        wide = z.double()
        threshold = per_signal(torch.as_tensor(step * self.weight, dtype=torch.float64, device=z.device), z)
        signs = jumps(wide.detach().reshape(-1, z.shape[-1]), threshold.detach().reshape(-1))
        return block_means(wide, threshold, signs.reshape(*z.shape[:-1], -1)).to(z.dtype)

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        positive("the weight of total variation", self.weight, allow_zero=True)
        return super().slope_at(step)

    def manifold(self, x: Tensor) -> Manifold:
        signs = x.diff(dim=-1).sign()
        return Manifold(lambda v: block_means(v, torch.zeros_like(v[..., :1]), signs), torch.zeros_like)


def per_signal(threshold: Tensor, z: Tensor) -> Tensor:
    """The thresholds of signals z (..., n) as (..., 1)."""
    try:
        if threshold.dim() == 0 or threshold.shape[-1] == 1:
            return threshold.expand(*z.shape[:-1], 1)
    except RuntimeError:  # it does not broadcast
        pass
    expected = (*z.shape[1:-1], 1)
    raise ShapeError(f"the weight of TV1D is one number, or one per signal {expected}; given {tuple(threshold.shape)}")


def block_means(z: Tensor, threshold: Tensor, signs: Tensor) -> Tensor:
    """The prox whose jumps have these `signs`: mean of z plus threshold (s_right - s_left) / |B| on every block B.

    z (..., n), threshold (..., 1), signs (..., n - 1) in {-1, 0, 1}. Written in operations that autograd knows.
    """
    entering = torch.nn.functional.pad(signs, (1, 0))
    leaving = torch.nn.functional.pad(signs, (0, 1))
    tilted = z + threshold * (leaving - entering)
    first = torch.ones_like(entering, dtype=torch.bool)
    first[..., 1:] = signs != 0
    block = first.flatten().cumsum(0) - 1
    count = int(block[-1]) + 1 if len(block) else 0
    total = tilted.new_zeros(count).index_add(0, block, tilted.flatten())
    size = torch.bincount(block, minlength=count)
    return (total / size)[block].reshape(z.shape)


def jumps(z: Tensor, threshold: Tensor) -> Tensor:
    """The signs (signals, n - 1) of the jumps of argmin_x |x - z|^2 / 2 + threshold sum |x[i + 1] - x[i]|.

    Signals (signals, n) and thresholds (signals,) in float64. A block of known surroundings is the mean t of its data
    or has entries on both sides of t, and which ones is a chain of two states: the solution is at least t where
    y = 1 in argmin_y sum_i (t - z_i) y_i + threshold sum |y[i + 1] - y[i]|, y in {0, 1}. So all blocks of all signals
    are cut at the same time, and cut again, until none changes: O(n) work for each of the rounds, about log n of them
    on data (n - 1 at most), in O(log n) parallel operations each.
    Source: the threshold decomposition is that of Hochbaum, An efficient algorithm for image segmentation, Markov
    random fields and related problems, 2001; the cuts in rounds and the scan are ours.
    """
    if not bool(torch.isfinite(z).all() and torch.isfinite(threshold).all()):
        raise DataError("total variation was given data or a threshold that are not finite")
    signs = torch.zeros_like(z)
    ends = torch.zeros_like(z, dtype=torch.bool)
    ends[:, -1:] = True
    # what is left to cut, as one chain of blocks: places in the batch, tilted data, thresholds, ends of blocks
    place = torch.arange(z.numel(), device=z.device)
    data, bound, last = z.flatten(), threshold.repeat_interleave(z.shape[-1]), ends.flatten()
    while len(place):
        block = last.cumsum(0) - last.to(torch.long)
        count = int(block[-1]) + 1
        mean = data.new_zeros(count).index_add(0, block, data) / torch.bincount(block, minlength=count)
        above = _above(mean[block] - data, bound, last, longest=z.shape[-1])
        cut = (above[1:].to(data.dtype) - above[:-1].to(data.dtype)) * ~last[:-1]
        cut = torch.nn.functional.pad(cut, (0, 1))
        signs.view(-1)[place] += cut
        data = data + bound * (cut - cut.roll(1))
        last = last | (cut != 0)
        open_blocks = torch.zeros(count, dtype=torch.bool, device=z.device).index_fill(0, block[cut != 0], True)
        kept = open_blocks[block].nonzero()[:, 0]
        place, data, bound, last = place[kept], data[kept], bound[kept], last[kept]
    return signs[:, :-1]


def _above(cost: Tensor, bound: Tensor, last: Tensor, longest: int) -> Tensor:
    """argmin over y in {0, 1} of sum_i cost_i y_i + bound sum |y[i + 1] - y[i]| on every block of a chain.

    Dynamic programming: m_i = cost_i + clip(m_{i - 1}, -bound, bound) is what y_i = 1 costs more than y_i = 0, given
    the best choice before i. Outside [-bound, bound] it decides y_i, inside y_i = y[i + 1].
    """
    first = last.roll(1)
    first[:1] = True
    start = cost.clamp(-bound, bound)
    low, high = torch.where(first, start, -bound), torch.where(first, start, bound)
    clipped = _clip_scan(cost, low, high, longest)
    m = cost + torch.where(first, 0.0, clipped.roll(1))
    decided = (last | (m.abs() > bound)).nonzero()[:, 0]
    until = torch.diff(decided, prepend=decided.new_tensor([-1]))
    return (m[decided] < 0).repeat_interleave(until, output_size=len(cost))


def _clip_scan(shift: Tensor, low: Tensor, high: Tensor, longest: int) -> Tensor:
    """p_i = clip(p_{i - 1} + shift_i, low_i, high_i) along a chain with one-point intervals, `longest` apart at most.

    Such clips are closed under composition, so that neighbours are composed in pairs, and the pairs scanned. What is
    composed of `longest` clips holds a one-point interval, and is constant.
    """
    if longest <= 1 or len(shift) == 1:
        return low
    pairs = len(shift) // 2
    even, odd = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    at_odd = _clip_scan(
        shift[even] + shift[odd],
        (low[even] + shift[odd]).clamp(low[odd], high[odd]),
        (high[even] + shift[odd]).clamp(low[odd], high[odd]),
        (longest + 1) // 2,
    )
    result = torch.empty_like(shift)
    result[1::2] = at_odd
    result[:1] = low[:1]
    before = at_odd[: (len(shift) - 1) // 2]
    result[2::2] = (before + shift[2::2]).clamp(low[2::2], high[2::2])
    return result
