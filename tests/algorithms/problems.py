"""The small maps, ridge and data that the tests of algorithms, solve and unroll share."""

from __future__ import annotations

import torch

from firmly.linear import Convolution, Monotone
from firmly.prox import Clip, Ridge

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


def loop() -> Monotone:
    """W = (1 - m) I - A*A + B - B* with m = 0.6, a circular convolution."""
    turn = torch.zeros(1, 1, 3, 3, **double)
    turn[0, 0, 0, 1], turn[0, 0, 1, 2] = 0.3, -0.2
    return Monotone(blur(), 0.6, Convolution(turn, SHAPE))


def ridge() -> Ridge:
    generator = torch.Generator().manual_seed(3)
    kernel = torch.randn(4, 1, 3, 3, generator=generator, **double)
    return Ridge(kernel, Clip(4, 0.2).double(), cap=1.9)


def data(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(1), **double)
