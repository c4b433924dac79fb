"""Orthogonal wavelet transforms on periodic signals and images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from firmly.errors import ConditionError, ShapeError
from firmly.linear.map import Bracket, LinearMap


class Wavelet(LinearMap):
    """x -> W x, the orthogonal wavelet coefficients of every channel, in the shape of the image: W*W = W W* = I.

    One level filters along each spatial axis and keeps every second value: low (x) -> first half, high (x) -> second
    half; the next level does the same to the low part. Periodic ends keep the transform orthogonal at any depth.
    `wavelet` names an orthogonal family of PyWavelets ("haar", "db4", "sym8", "coif2"); sizes are multiples of
    2^levels.
    Source: Mallat, A Wavelet Tour of Signal Processing, 2009, section 7.3.
    """

    filters: Tensor  # (2, taps): low, high

    def __init__(self, wavelet: str, shape: Sequence[int], levels: int = 3):
        super().__init__(shape, shape)
        if levels < 1 or any(n % 2**levels for n in self.domain[1:]) or len(self.domain) < 2:
            raise ShapeError(
                f"{levels} levels halve (channel, *spatial) that often: the sizes must be multiples of "
                f"{2 ** max(levels, 1)}, "
                f"given {self.domain}"
            )
        self.levels = levels
        low = torch.tensor(_scaling_filter(wavelet), dtype=torch.float64)
        sign = (-1.0) ** torch.arange(len(low), dtype=torch.float64)
        self.hold("filters", torch.stack([low, sign * low.flip(0)]))
        if not self._defect() < 1e-9:
            raise ConditionError(f"the filters of {wavelet!r} are not orthogonal: off by {self._defect():.2g}")

    def _apply_map(self, x: Tensor) -> Tensor:
        for level in range(self.levels):
            part = self._corner(x, level)
            for axis in range(2, x.dim()):
                part = self._analyse(part, axis)
            x = part if level == 0 else _replaced(x, part)
        return x

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        for level in reversed(range(self.levels)):
            part = self._corner(y, level)
            for axis in reversed(range(2, y.dim())):
                part = self._synthesise(part, axis)
            y = part if level == 0 else _replaced(y, part)
        return y

    def _corner(self, x: Tensor, level: int) -> Tensor:
        return x[(..., *(slice(n >> level) for n in self.domain[1:]))]

    def _analyse(self, x: Tensor, axis: int) -> Tensor:
        lines = x.movedim(axis, -1)
        flat = lines.reshape(-1, 1, lines.shape[-1])
        padded = flat.index_select(2, self._sources(flat.shape[2], x.device))
        halves = F.conv1d(padded, self.filters[:, None].to(x.dtype), stride=2)  # (lines, 2, n / 2)
        return halves.reshape(lines.shape).movedim(-1, axis)

    def _synthesise(self, y: Tensor, axis: int) -> Tensor:
        lines = y.movedim(axis, -1)
        n = lines.shape[-1]
        padded = F.conv_transpose1d(lines.reshape(-1, 2, n // 2), self.filters[:, None].to(y.dtype), stride=2)
        flat = padded.new_zeros(len(padded), 1, n).index_add(2, self._sources(n, y.device), padded)
        return flat.reshape(lines.shape).movedim(-1, axis)

    def _sources(self, n: int, device: torch.device) -> Tensor:
        taps = self.filters.shape[1]
        return (torch.arange(n + taps - 2, device=device) - (taps // 2 - 1)) % n

    def _defect(self) -> float:
        """Bound of |L*L - I| for one level L along one axis, from the filter's correlations at even shifts."""
        low = self.filters[0].to("cpu", torch.float64)
        taps = len(low)
        even = [float(low[2 * k :] @ low[: taps - 2 * k]) for k in range(taps // 2)]
        rounding = 4 * (taps + 4) * torch.finfo(torch.float64).eps * float(low.abs().sum()) ** 2
        return abs(even[0] - 1) + 2 * sum(map(abs, even[1:])) + rounding

    def _norm(self) -> Bracket:
        defect, power = self._defect(), self.levels * (len(self.domain) - 1) / 2
        return Bracket(max(1 - defect, 0.0) ** power * (1 - 1e-14), (1 + defect) ** power * (1 + 1e-14))


def _replaced(whole: Tensor, corner: Tensor) -> Tensor:
    whole = whole.clone()
    whole[(..., *(slice(n) for n in corner.shape[2:]))] = corner
    return whole


def _scaling_filter(name: str) -> list[float]:
    try:
        import pywt
    except ImportError as error:
        raise ImportError(
            "Wavelet takes its filters from PyWavelets, which is not installed: pip install 'firmly[wavelet]'"
        ) from error
    if name not in pywt.wavelist(kind="discrete"):
        raise ConditionError(f"unknown wavelet {name!r}: choose one of {pywt.wavelist(kind='discrete')}")
    wavelet = pywt.Wavelet(name)
    if not wavelet.orthogonal:
        raise ConditionError(f"{name!r} is not orthogonal: choose haar, dbN, symN or coifN")
    taps = list(wavelet.dec_lo)
    scale = math.sqrt(sum(t * t for t in taps))
    return [t / scale for t in reversed(taps)]
