"""What the imaging experiments have in common: their settings, their network, and a network at any image size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from firmly.algorithms import Hqs
from firmly.data import Measurement
from firmly.lab.engine import Device, Precision
from firmly.lab.settings import require
from firmly.lab.training import Plan
from firmly.lab.weights import learned, restore
from firmly.linear import LinearMap
from firmly.networks import unroll
from firmly.prox import Clip, LinearSpline, Ridge, dct_filters, huber_slopes


@dataclasses.dataclass(frozen=True)
class ReconstructionSettings:
    """Settings of every imaging experiment; an experiment adds those of its physics.

    The network has `depth` layers with `filters` filters of `filter_size` pixels each. `cap` is the largest slope
    kappa that the filters of a layer may have (below 2: every layer is nonexpansive where it denoises; none: free).
    Pairs (a, b) are the start values of the first and of the last layer, geometric between them.
    `budget` lists bounds of the amplification to train for. `attack` is the norm of the perturbation searched for,
    relative to the norm of the noise. `certify_seconds` is the time for each certificate.
    `threads` is the number of CPU threads (0: as torch chooses).
    """

    noise: float = 0.02
    depth: int = 8
    filters: int = 16
    filter_size: int = 7
    activation: Literal["clip", "spline"] = "clip"
    cap: float | None = 1.99
    penalty: tuple[float, ...] = (0.01, 0.2)
    threshold: tuple[float, ...] = (0.1, 0.01)
    twin: bool = True
    crop: int = 64
    batch: int = 4
    epochs: int = 10
    steps: int = 100
    learning_rate: float = 6e-3
    scalar_rate: float = 3.0
    averaging: float = 0.0
    patience: int = 0
    budget: tuple[float, ...] = ()
    budget_epochs: int = 4
    size: int = 256
    images: int = 8
    scene: str = "boats"
    tv_weights: tuple[float, ...] = (0.001, 0.0015, 0.002, 0.003)
    wiener_weights: tuple[float, ...] = (0.01, 0.02, 0.03, 0.05, 0.1)
    attack: float = 0.1
    certify_seconds: float = 60.0
    seed: int = 0
    device: Device = "auto"
    precision: Precision = "float32"
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("depth", "filters", "batch", "epochs", "steps", "images", "budget_epochs"):
            require(getattr(self, name) >= 1, f"{name} is at least 1; given {getattr(self, name)}")
        require(self.noise >= 0, f"noise is a standard deviation, not negative; given {self.noise}")
        require(2 <= self.filter_size, f"filter_size is at least 2; given {self.filter_size}")
        require(self.cap is None or self.cap > 0, f"cap is positive or none; given {self.cap}")
        require(self.crop >= 16, f"crop is at least 16; given {self.crop}")
        require(64 <= self.size <= 256, f"size lies in 64 .. 256; given {self.size}")
        require(1 <= self.images <= 8, f"there are 8 held-out photographs; given images = {self.images}")
        require(self.attack > 0 and self.certify_seconds > 0, "attack and certify_seconds are positive")
        for name in ("penalty", "threshold"):
            pair = getattr(self, name)
            require(len(pair) == 2 and min(pair) > 0, f"{name} is two positive numbers, first and last; given {pair}")
        for name in ("tv_weights", "wiener_weights", "budget"):
            values = getattr(self, name)
            require(all(v > 0 for v in values), f"{name} are positive numbers; given {values}")

    def plan(self, **changes: Any) -> Plan:
        """The plan of training that these settings describe."""
        names = {f.name for f in dataclasses.fields(Plan)} & {f.name for f in dataclasses.fields(self)}
        return dataclasses.replace(Plan(**{name: getattr(self, name) for name in names}), **changes)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One inverse problem: what is measured, how it is told, and its presets.

    `operator(settings, size)` is the forward map for size x size images. `shown(A, y)` turns a measurement into an
    image, `support(A)` says where noise can be (None: everywhere), `told(settings)` is the measurement in words.
    """

    name: str
    title: str
    measured_name: str
    presets: Mapping[str, ReconstructionSettings]
    operator: Callable[[Any, int], LinearMap]
    told: Callable[[Any], str]
    shown: Callable[[LinearMap, Tensor], Tensor] = lambda A, y: y
    support: Callable[[LinearMap], Tensor | None] = lambda A: None

    def measurement(self, settings: ReconstructionSettings, size: int) -> Measurement:
        A = self.operator(settings, size)
        return Measurement(A, settings.noise, self.support(A))

    def network(self, settings: ReconstructionSettings, size: int, cap: float | None) -> nn.Module:
        """The untrained network for size x size images, whose learned tensors do not depend on the size."""
        return hqs_network(self.operator(settings, size), settings, cap)

    def resized(self, settings: ReconstructionSettings, network: nn.Module, size: int, cap: float | None) -> nn.Module:
        """The same learned tensors in a network for images of another size."""
        other = self.network(settings, size, cap)
        restore(other, {k: v.cpu() for k, v in learned(network).items()}, "the trained network")
        return other


def hqs_network(A: LinearMap, settings: ReconstructionSettings, cap: float | None) -> nn.Module:
    """Unrolled half-quadratic splitting with a learned ridge regulariser in every layer.

    x <- (A*A + r_n I)^-1 (A* y + r_n (x - sum_i K_ni^T phi_ni(K_ni x))), started by the same with x = 0; the filters
    start as cosines, the activations as clips, so that every layer starts as shrinkage of cosine coefficients.
    """
    size, count = settings.filter_size, settings.filters
    if settings.activation == "clip":
        activation = Clip(count, 1.0)
    else:
        activation = LinearSpline(count, knots=31, reach=0.15, slope=huber_slopes(0.05))
    ridge = Ridge(dct_filters(size, count) / size, activation, cap=cap, zero_mean=True)
    network = unroll(Hqs(A, ridge=ridge), settings.depth, learn=("penalty", "ridge"), waive=("kappa",))
    penalties, thresholds = geometric(settings.penalty, settings.depth), geometric(settings.threshold, settings.depth)
    for layer, penalty, threshold in zip(network.layers, penalties, thresholds):
        layer.penalty = torch.tensor(penalty)
        if settings.activation == "clip":
            nn.init.constant_(layer.ridge.activation.log_threshold, math.log(threshold))
    return network


def geometric(ends: tuple[float, ...], count: int) -> list[float]:
    """`count` values from the first to the second end, in equal ratios."""
    return torch.logspace(math.log10(ends[0]), math.log10(ends[1]), count).tolist()
