"""A learned inverse: iterations of the mixed-norm estimate on balanced sensors, unrolled."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from firmly.algorithms import ForwardBackward
from firmly.errors import SettingsError
from firmly.linear.dense import Dense
from firmly.networks.unroll import unroll
from firmly.priors.sources.source_model import SourceModel
from firmly.prox.mixed_norm import MixedNorm


class GroupLista(nn.Module):
    """x_(k+1) = prox_(t_k w_k |.|_(2,1)) (x_k - t_k P^T (P x_k - B T y)), P = B G R^(1/2), x_0 = 0; currents R^(1/2) x.

    y are whitened data (batch, time, sensors); the output is (batch, components, sources * orientations).
    B = (G R G^T + lambda2 I)^(-1/2) balances the sensors: the singular values s of the gain become
    s / sqrt(s^2 + lambda2), so that few layers suffice although columns are nearly parallel. T keeps the first
    `components` cosines of the courses: smooth courses lose little. Each layer learns its step t_k in
    (0, 2 / |P|^2) and a threshold w_k for every source; these start in proportion to |P_i|, up to `threshold`.

    `unrolled` is the part from balanced data, in cosine coefficients, to currents before R^(1/2): it is made of P
    alone, so that its certificate needs no more than the singular values of P.
    """

    balance: Tensor
    cosines: Tensor
    scale: Tensor

    def __init__(
        self, model: SourceModel, times: int, depth: int = 10, components: int = 10, regularisation: float = 1 / 9,
        threshold: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        if not 1 <= components <= times:
            raise SettingsError(f"components lies in 1 .. times = {times}, given {components}")
        gain = model.weighted
        values, vectors = torch.linalg.eigh(gain @ gain.mT)
        balance = (vectors * (values.clamp(min=0) + regularisation).rsqrt()) @ vectors.mT
        balanced = balance @ gain
        size = torch.linalg.vector_norm(balanced.unflatten(1, (model.sources, model.orientations)), dim=(0, 2))
        prior = MixedNorm(threshold * size / size.max(), model.orientations)
        self.unrolled = unroll(ForwardBackward(Dense(balanced, copies=components), prior), depth)
        self.register_buffer("balance", balance)
        self.register_buffer("cosines", cosine_basis(times, components))
        self.register_buffer("scale", model.scale.repeat_interleave(model.orientations))
        self.inputs = {"data": (times, model.sensors)}

    def forward(self, y: Tensor) -> Tensor:
        balanced = self.cosines.to(y) @ (y @ self.balance.to(y))
        start = torch.zeros(len(y), *self.unrolled.image_shape, dtype=y.dtype, device=y.device)
        return self.unrolled(balanced, start) * self.scale.to(y)


def cosine_basis(times: int, components: int) -> Tensor:
    """The first rows of the orthonormal cosine transform: (components, times)."""
    angle = math.pi / times * torch.outer(torch.arange(components), torch.arange(times) + 0.5).double()
    basis = angle.cos() * math.sqrt(2 / times)
    basis[0] /= math.sqrt(2)
    return basis
