"""The small problems that the tests of algorithms, solve and unroll share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from firmly.algorithms import (
    Admm,
    Algorithm,
    ChambollePock,
    CondatVu,
    DouglasRachford,
    DualForwardBackward,
    Fista,
    ForwardBackward,
    HeavyBall,
    Hqs,
    Tikhonov,
)
from firmly.linear import Convolution, Identity
from firmly.prox import L1, Clip, Ridge, Zero

torch.set_num_threads(1)  # the tensors are so small that more threads only wait for each other

SHAPE = (1, 6, 6)
double = {"dtype": torch.float64}


def blur() -> Convolution:
    """A well-conditioned blur: its spectrum lies in [0.2, 1]."""
    kernel = torch.tensor([0.1, 0.8, 0.1], **double).outer(torch.tensor([0.15, 0.7, 0.15], **double))
    return Convolution(kernel[None, None], SHAPE)


def edges() -> Convolution:
    """Circular differences along both axes, as one map to two channels."""
    kernel = torch.zeros(2, 1, 3, 3, **double)
    kernel[:, 0, 1, 1] = -1
    kernel[0, 0, 2, 1] = kernel[1, 0, 1, 2] = 1
    return Convolution(kernel, SHAPE)


def ridge() -> Ridge:
    generator = torch.Generator().manual_seed(3)
    kernel = torch.randn(4, 1, 3, 3, generator=generator, **double)
    return Ridge(kernel, Clip(4, 0.2).double(), cap=1.9)


def data(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(1), **double)


class Case(NamedTuple):
    """An algorithm to be tested: `make(**changes)` builds it; `scalars` are its step sizes with admissible values."""

    name: str
    make: Callable[..., Algorithm]
    scalars: dict[str, float]


CASES = [
    Case("ForwardBackward", lambda **c: ForwardBackward(blur(), L1(0.1), **c), {"step_size": 0.7}),
    Case("ForwardBackward+ridge", lambda **c: ForwardBackward(blur(), L1(0.1), ridge=ridge(), **c), {"step_size": 0.3}),
    Case("Fista", lambda **c: Fista(blur(), L1(0.1), restart=30, **c), {"step_size": 0.7}),
    Case("HeavyBall", lambda **c: HeavyBall(blur(), ridge(), **c), {"step_size": 0.2, "momentum": 0.3}),
    Case(
        "HeavyBall+Tikhonov",
        lambda **c: HeavyBall(blur(), Tikhonov(edges()), **c),
        {"step_size": 0.1, "momentum": 0.3},
    ),
    Case("Hqs", lambda **c: Hqs(blur(), L1(0.1), **c), {"penalty": 0.7}),
    Case("Hqs+ridge", lambda **c: Hqs(blur(), ridge=ridge(), **c), {"penalty": 0.7}),
    Case("DouglasRachford", lambda **c: DouglasRachford(blur(), L1(0.1), **c), {"step_size": 2.0, "relaxation": 1.5}),
    Case("Admm", lambda **c: Admm(blur(), L1(0.1), **c), {"penalty": 0.7}),
    Case("Admm+K", lambda **c: Admm(blur(), L1(0.1), K=edges(), **c), {"penalty": 0.7}),
    Case(
        "ChambollePock",
        lambda **c: ChambollePock(blur(), L1(0.1), edges(), **c),
        {"step_size": 0.5, "dual_step": 0.2},
    ),
    Case("CondatVu", lambda **c: CondatVu(blur(), L1(0.1), edges(), **c), {"step_size": 0.5, "dual_step": 0.1}),
    Case("DualForwardBackward", lambda **c: DualForwardBackward(edges(), L1(0.1), **c), {"step_size": 0.2}),
]
"""Adding an algorithm: one line here, and the conformance tests of algorithms, solve and unroll run on it."""

# Algorithms that solve one and the same problem, group by group; each group's fixed points must agree.
SAME_PROBLEM: dict[str, list[Callable[[], Algorithm]]] = {
    "deconvolution with an l1 prior": [
        lambda: ForwardBackward(blur(), L1(0.1)),
        lambda: ForwardBackward(blur(), L1(0.1), step_size=1.9),
        lambda: Fista(blur(), L1(0.1), restart=30),
        lambda: Fista(blur(), L1(0.1)),
        lambda: DouglasRachford(blur(), L1(0.1), step_size=5.0, relaxation=1.7),
        lambda: Admm(blur(), L1(0.1), penalty=0.2),
        lambda: Admm(blur(), L1(0.1), penalty=0.2, K=Identity(SHAPE)),
        lambda: ChambollePock(blur(), L1(0.1), Identity(SHAPE), step_size=4.0),
        lambda: CondatVu(blur(), L1(0.1), Identity(SHAPE)),
        lambda: CondatVu(blur(), Zero(), Identity(SHAPE), constraint=L1(0.1)),
    ],
    "deconvolution with anisotropic total variation": [
        lambda: ChambollePock(blur(), L1(0.1), edges()),
        lambda: CondatVu(blur(), L1(0.1), edges()),
        lambda: Admm(blur(), L1(0.1), K=edges(), penalty=0.3),
    ],
    "denoising with anisotropic total variation": [
        lambda: DualForwardBackward(edges(), L1(0.1)),
        lambda: ChambollePock(Identity(SHAPE), L1(0.1), edges()),
        lambda: CondatVu(Identity(SHAPE), L1(0.1), edges()),
        lambda: Admm(Identity(SHAPE), L1(0.1), K=edges()),
    ],
    "deconvolution with a learned ridge": [
        lambda: ForwardBackward(blur(), Zero(), ridge=ridge()),
        lambda: Fista(blur(), Zero(), ridge=ridge(), restart=30),
        lambda: HeavyBall(blur(), ridge()),
        lambda: Hqs(blur(), ridge=ridge()),
        lambda: CondatVu(blur(), Zero(), Identity(SHAPE), ridge=ridge()),
    ],
}
