"""ADMM-CSNet: stages of the alternating direction method of multipliers with one learned denoiser, for MRI."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from firmly.algorithms.quadratic import data_prox
from firmly.errors import SettingsError, ShapeError
from firmly.linear.map import LinearMap
from firmly.networks.positive import Positive
from firmly.prox import LinearSpline


class AdmmNet(nn.Module):
    """x_0 = (A*A + rho I)^-1 A* y, beta_0 = 0; in every stage, with the same parameters,

        v = x + beta;   z = v - conv2(phi(conv1(v)));   beta+ = beta + gamma (x - z);
        x+ = (A*A + rho I)^-1 (A* y + rho (z - beta+));     output x + A*(y - A x)

    conv1 is 1 -> `features`, conv2 `features` -> 1, both 5 x 5 with zero padding and bias, applied to real and
    imaginary parts alike; phi is piecewise linear on every channel, with slopes in `slopes` by construction and the
    identity as its start; rho > 0. `A` is any map that `Resolvent` can invert, such as `FourierSampling`, for which the
    last line puts the measured frequencies back. The images are complex if A is.
    Source: Yang, Sun, Li and Xu, ADMM-CSNet: a deep learning approach for image compressive sensing, 2020, with the
    start values of the released code.
    """

    def __init__(
        self,
        A: LinearMap,
        stages: int = 10,
        features: int = 128,
        knots: int = 101,
        slopes: tuple[float, float] = (-4.0, 4.0),
    ):
        super().__init__()
        if stages < 1 or features < 1:
            raise SettingsError(f"stages and features are at least 1, given {stages} and {features}")
        if len(A.domain) != 3 or A.domain[0] != 1:
            raise ShapeError(f"ADMM-Net takes images (1, height, width), and A maps {A.domain}")
        self.A = A
        self.stages = stages
        self.inputs = {"data": A.codomain}
        self.penalty = nn.Parameter(torch.tensor(0.1))
        parametrize.register_parametrization(self, "penalty", Positive())
        self.gamma = nn.Parameter(torch.tensor(1.0))
        self.analysis = nn.Conv2d(1, features, 5, padding=2)
        self.synthesis = nn.Conv2d(features, 1, 5, padding=2)
        for layer in (self.analysis, self.synthesis):
            nn.init.normal_(layer.weight, std=0.025)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.activation = LinearSpline(features, knots, low=slopes[0], high=slopes[1])

    def forward(self, y: Tensor) -> Tensor:
        """The image (batch, 1, height, width) for data y (batch, *A.codomain)."""
        x = data_prox(self.A, y, None, self.penalty)
        beta = 0.0 * x
        for _ in range(self.stages):
            z = self.denoised(x + beta)
            beta = beta + self.gamma * (x - z)
            x = data_prox(self.A, y, z - beta, self.penalty)
        return x + self.A.T(y - self.A(x))

    def denoised(self, v: Tensor) -> Tensor:
        """v - conv2(phi(conv1(v))), on real and imaginary parts as a batch."""
        if not v.is_complex():
            return v - self.synthesis(self.activation(self.analysis(v)))
        real, imaginary = self.denoised(torch.cat([v.real, v.imag])).chunk(2)
        return torch.complex(real, imaginary)
