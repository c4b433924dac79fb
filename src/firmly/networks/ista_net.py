"""ISTA-Net and ISTA-Net+: iterations of ISTA in which the transform is learned, for compressed sensing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from firmly.algorithms.certified import norm
from firmly.errors import ConditionError, SettingsError, ShapeError
from firmly.linear.map import LinearMap
from firmly.networks.positive import Positive
from firmly.prox import L1


class IstaNet(nn.Module):
    """x_0 = Q y; r_k = x_k - rho_k A*(A x_k - y); x_{k+1} = Ft_k(ST(F_k(r_k), theta_k)); images of one channel.

    F_k is conv 1 -> C, ReLU, conv C -> C, and Ft_k conv C -> C, ReLU, conv C -> 1, with 3 x 3 kernels, zero padding and
    no bias; ST is the soft threshold. `A` is any linear map of images (1, height, width) and `initial` any that takes
    its data to images, such as `BlockSampling.linear_inverse`: Q is not learned. 9 phases of 32 channels have 171,090
    parameters.

    Free steps and thresholds may leave the range in which a layer can be nonexpansive. `constrained=True` keeps rho_k
    in (0, 2 / |A|^2) and theta_k > 0 whatever the optimiser does: then the gradient step is nonexpansive; the whole
    layer is not for that, since Ft_k o ST o F_k is no proximal map.

    Training adds `symmetry()`, weighted by 0.01, to the mean squared error.
    Source: Zhang and Ghanem, ISTA-Net: interpretable optimization-inspired deep network for image compressive sensing,
    2018, equations (6)-(12), with the steps and start values of the released code.
    """

    def __init__(
        self, A: LinearMap, initial: LinearMap, phases: int = 9, channels: int = 32, constrained: bool = False
    ):
        super().__init__()
        if phases < 1 or channels < 1:
            raise SettingsError(f"phases and channels are at least 1, given {phases} and {channels}")
        if (initial.domain, initial.codomain) != (A.codomain, A.domain):
            raise ShapeError(
                f"the initialisation maps data {A.codomain} to images {A.domain}; given {initial.domain} -> "
                f"{initial.codomain}"
            )
        if len(A.domain) != 3 or A.domain[0] != 1 or A.is_complex:
            raise ShapeError(f"ISTA-Net takes real images (1, height, width), and A maps {A.domain}, maybe complex")
        self.A = A
        self.initial = initial
        self.phases = nn.ModuleList(self.phase(channels) for _ in range(phases))
        self.inputs = {"data": A.codomain}
        self.__dict__["_deviation"] = None  # of the last forward pass in training
        if constrained:
            limit = 2 / norm(A) ** 2
            for phase in self.phases:
                parametrize.register_parametrization(phase, "step", Between(limit))
                parametrize.register_parametrization(phase.prior, "weight", Positive())

    def phase(self, channels: int) -> Phase:
        return Phase(channels)

    def forward(self, y: Tensor) -> Tensor:
        """The image (batch, 1, height, width) for data y (batch, *A.codomain)."""
        x = self.initial(y)
        recorded = self.training and torch.is_grad_enabled() and isinstance(y, Tensor)
        deviation: Tensor | None = None
        for phase in self.phases:
            x, s, coefficients = phase(x, self.A, y)
            if recorded:
                gap = (phase.backward_transform(coefficients) - s).square().mean()
                deviation = gap if deviation is None else deviation + gap
        self.__dict__["_deviation"] = deviation
        return x

    def symmetry(self) -> Tensor:
        """sum_k mean (Ft_k F_k s_k - s_k)^2 at the values s_k that the thresholds of the last forward pass have seen.

        It can be read once, in training mode, since it holds the graph of that pass; `ConditionError` otherwise.
        """
        deviation, self.__dict__["_deviation"] = self.__dict__["_deviation"], None
        if deviation is None:
            raise ConditionError("the symmetry term is that of a forward pass in training mode, and is read once")
        return deviation


class IstaNetPlus(IstaNet):
    """ISTA-Net+: as ISTA-Net, with residual layers x_{k+1} = r_k + G_k Ft_k(ST(F_k(Dc_k r_k), theta_k)).

    Dc_k is a convolution 1 -> C, F_k and Ft_k are C -> C, ReLU, C -> C, and G_k is C -> 1. 9 phases of 32 channels have
    336,978 parameters.
    Source: Zhang and Ghanem 2018, section 4.
    """

    def phase(self, channels: int) -> Phase:
        return ResidualPhase(channels)


class Phase(nn.Module):
    """One layer of ISTA-Net: `step` is rho, `prior.weight` is theta."""

    def __init__(self, channels: int, lift: int = 1):
        super().__init__()
        self.step = nn.Parameter(torch.tensor(0.5))
        self.prior = L1(nn.Parameter(torch.tensor(0.01)))
        self.forward_transform = nn.Sequential(convolution(lift, channels), nn.ReLU(), convolution(channels, channels))
        self.backward_transform = nn.Sequential(convolution(channels, channels), nn.ReLU(), convolution(channels, lift))

    def forward(self, x: Tensor, A: LinearMap, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next image, the value s that F_k is applied to, and F_k(s)."""
        s = x - self.step * A.T(A(x) - y)
        coefficients = self.forward_transform(s)
        return self.backward_transform(self.prior.prox(coefficients)), s, coefficients


class ResidualPhase(Phase):
    """One layer of ISTA-Net+."""

    def __init__(self, channels: int):
        super().__init__(channels, lift=channels)
        self.lift = convolution(1, channels)
        self.drop = convolution(channels, 1)

    def forward(self, x: Tensor, A: LinearMap, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r = x - self.step * A.T(A(x) - y)
        s = self.lift(r)
        coefficients = self.forward_transform(s)
        return r + self.drop(self.backward_transform(self.prior.prox(coefficients))), s, coefficients


class Between(nn.Module):
    """limit * sigmoid(raw), for `torch.nn.utils.parametrize`: a scalar in (0, limit)."""

    def __init__(self, limit: float):
        super().__init__()
        self.limit = limit

    def forward(self, raw: Tensor) -> Tensor:
        return self.limit * raw.sigmoid()

    def right_inverse(self, value: Tensor) -> Tensor:
        if not 0 < float(value.detach()) < self.limit:
            raise ConditionError(f"a step inside (0, {self.limit:.6g}) is learned from a start inside, given {value}")
        return torch.logit(value.detach() / self.limit)


def convolution(channels: int, filters: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, filters, 3, padding=1, bias=False)
    nn.init.xavier_normal_(layer.weight)
    return layer
