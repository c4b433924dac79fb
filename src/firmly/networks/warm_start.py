"""A nonexpansive network that starts from a linear reconstruction, with its bound in closed form."""

from __future__ import annotations

import math

from torch import Tensor, nn

from firmly.algorithms.algorithm import number
from firmly.algorithms.certified import norm
from firmly.algorithms.forward_backward import ForwardBackward
from firmly.errors import ConditionError, ShapeError
from firmly.linear.map import LinearMap
from firmly.networks.unroll import Unrolled


class WarmStart(nn.Module):
    """net(y) = network(y, start=Q y): an unrolled algorithm that starts from a linear map of the data.

    `initial` is Q, for example `BlockSampling.linear_inverse` or A.T; it is not learned. `ShapeError` if it does not
    take the data of the network to its images.
    """

    def __init__(self, network: Unrolled, initial: LinearMap):
        super().__init__()
        if (initial.domain, initial.codomain) != (network.data_shape, network.image_shape):
            raise ShapeError(
                f"the start maps data {network.data_shape} to images {network.image_shape}; given {initial.domain} -> "
                f"{initial.codomain}"
            )
        self.network = network
        self.initial = initial
        self.inputs = {"data": network.data_shape}

    def forward(self, y: Tensor) -> Tensor:
        """The image (batch, *image_shape) for data y (batch, *data_shape)."""
        return self.network(y, self.initial(y))

    def closed_form(self) -> float:
        """A proved Lipschitz constant of forward-backward layers x <- D_k(x - t_k A*(A x - y)) with |D_k| <= 1:

            L^2 = |Q|^2 + sum_k t_k / (2 - t_k |A|^2),

        at most the root of the depth, for |A| = 1 and steps t_k <= 1, where products of norms give the depth. It holds
        for images of every size for which |A| and |Q| do. `ConditionError` for other layers, and for steps and priors
        that are not nonexpansive. Derived in docs/compressed_sensing.md.
        """
        total = norm(self.initial) ** 2
        for layer in self.network.layers:
            if not isinstance(layer, ForwardBackward) or layer.ridge is not None:
                raise ConditionError("the closed form is that of forward-backward layers without a ridge; use certify")
            t, square = number(layer.step_size), norm(layer.A) ** 2
            low, high = (float(end) for end in layer.prior.slope_at(layer.step_size))
            if not (0 < t * square < 2 and -1 - 1e-12 <= low and high <= 1 + 1e-12):
                raise ConditionError(
                    f"a layer is not nonexpansive: step {t:.6g} with |A|^2 = {square:.6g}, slopes "
                    f"[{low:.6g}, {high:.6g}]"
                )
            total += t / (2 - t * square)
        return math.sqrt(total) * (1 + 1e-9)
