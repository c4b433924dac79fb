"""The two problems of compressed sensing, with the networks that compete on each at the same number of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from firmly.algorithms import CondatVu, ForwardBackward
from firmly.data import column_mask, photographs
from firmly.fixedpoint import solve
from firmly.lab.reconstruction import geometric
from firmly.linear import BlockSampling, Gradient, LinearMap
from firmly.linear.block_sampling import measurements
from firmly.linear.fourier_sampling import FourierSampling
from firmly.networks import AdmmNet, IstaNetPlus, WarmStart, unroll
from firmly.prox import Clip, GradientStep, GroupL1, Ridge, dct_filters


@dataclass(frozen=True)
class Problem:
    """What is measured, and from what linear reconstruction the networks start, for images of any size."""

    operator: Callable[[int], LinearMap]
    initial: Callable[[int], LinearMap]
    linear_name: str
    rival_name: str
    rival: Callable[[int], nn.Module]

    def ours(self, settings: Any, size: int) -> WarmStart:
        """The certified network, with as many filters as give it the number of parameters of the rival."""
        return certified_network(self.operator(size), self.initial(size), settings, parameters(self.rival(8)))


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def problem(settings: Any) -> Problem:
    """The problem that the settings describe; its matrices are drawn and fitted once."""
    if settings.task == "mri":
        size_of_rival = settings.phases * (36 * settings.channels**2 + 18 * settings.channels + 2)
        features = max(1, round(size_of_rival / (26 + 25 + 32)))  # two convolutions and a spline of 31 knots
        return Problem(
            lambda size: mri(settings, size),
            lambda size: mri(settings, size).T,
            "Zero filling",
            "ADMM-Net",
            lambda size: AdmmNet(mri(settings, size), settings.phases, features, knots=31),
        )
    A, Q = block_sampling(settings)

    def initial(size: int) -> LinearMap:
        return Q.on((1, size, size)).T

    return Problem(
        lambda size: A.on((1, size, size)),
        initial,
        "Linear (Q)",
        "ISTA-Net+",
        lambda size: IstaNetPlus(
            A.on((1, size, size)), initial(size), settings.phases, settings.channels, settings.constrained
        ),
    )


def block_sampling(settings: Any) -> tuple[BlockSampling, BlockSampling]:
    """The sampling of single blocks, and Q' with the best linear reconstruction Q from the training photographs."""
    block, generator = settings.block, torch.Generator().manual_seed(settings.seed)
    draw = getattr(BlockSampling, settings.patterns)
    A = draw(measurements(settings.ratio, block), (1, block, block), generator, block)
    turned = [part for image in photographs("train") for part in (image, image.flip(-1), image.mT, image.flip(-2))]
    Q = A.linear_inverse([image.double() for image in turned], settings.start_noise)
    A, back = (BlockSampling(p.float(), (1, block, block)) for p in (A.patterns, Q.T.patterns))
    return A, back


def mri(settings: Any, size: int) -> FourierSampling:
    generator = torch.Generator().manual_seed(settings.seed)
    return FourierSampling(column_mask((size, size), settings.ratio, 0.4 * settings.ratio, generator)[0])


def certified_network(A: LinearMap, Q: LinearMap, settings: Any, budget: int) -> WarmStart:
    """Forward-backward from Q y; its priors are gradient steps on learned ridges with kappa <= `settings.cap`."""
    size = settings.filter_size
    each = budget / settings.depth - 1  # besides the step
    count = max(1, min(size**2 - 1, round(each / (size**2 + 1))))
    ridge = Ridge(dct_filters(size, count), Clip(count, 1.0), cap=settings.cap, zero_mean=True)
    waived = ("prior",) if settings.cap > 1 else ()
    algorithm = ForwardBackward(A, GradientStep(ridge), step_size=1.0)
    learned = ("step_size", "prior") if settings.learn_steps else ("prior",)
    network = unroll(algorithm, settings.depth, learn=learned, waive=waived)
    for layer, threshold in zip(network.layers, geometric(settings.threshold, settings.depth)):
        nn.init.constant_(layer.prior.ridge.activation.log_threshold, math.log(threshold))
    return WarmStart(network, Q)


@torch.no_grad()
def total_variation(A: LinearMap, y: Tensor, start: Tensor, weight: float, iterations: int) -> Tensor:
    """argmin_x 1/2 |A x - y|^2 + weight TV(x) by the algorithm of Condat and Vu, from a given image."""
    gradient = Gradient(A.domain, padding="neumann")
    algorithm = CondatVu(A, GroupL1(weight), gradient)
    return solve(algorithm, y, tol=1e-4, max_iterations=iterations, start=start).x
