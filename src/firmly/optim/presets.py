"""Known methods as dynamic adaptation gains, each with the factor that turns its learning rate into that of `Dag`.

`nesterov(0.9)(model.parameters(), lr=0.1)` is an optimiser with the trajectory of Nesterov's method at that rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from firmly.optim.adaptation_gain import AdaptationGain
from firmly.optim.dag import Dag


class Preset(NamedTuple):
    """`Dag` with these coefficients and `scale` times the method's own learning rate."""

    scale: float
    zeros: tuple[float, ...] = ()
    poles: tuple[float, ...] = ()

    def __call__(self, params: Iterable[Any], lr: float | Tensor, **options: Any) -> Dag:
        """The optimiser; `options` are those of `Dag`."""
        return Dag(params, lr * self.scale, self.zeros, self.poles, **options)

    @property
    def gain(self) -> AdaptationGain:
        """The filter, with a leading coefficient of one."""
        return AdaptationGain(self.zeros, self.poles)


def gradient() -> Preset:
    """p -= lr g."""
    return Preset(1.0)


def heavy_ball(momentum: float) -> Preset:
    """w = momentum w + g, p -= lr w: `torch.optim.SGD(momentum=...)`. Source: Polyak 1964."""
    return Preset(1.0, (), (momentum,))


def averaged(momentum: float) -> Preset:
    """w = momentum w + (1 - momentum) g, p -= lr w, from w = 0."""
    return Preset(1 - momentum, (), (momentum,))


def nesterov(momentum: float) -> Preset:
    """w = momentum w + g, p -= lr (g + momentum w): `torch.optim.SGD(nesterov=True)`. Source: Nesterov 1983."""
    return Preset(1 + momentum, (-momentum / (1 + momentum),), (momentum,))


def quasi_hyperbolic(nu: float, beta: float) -> Preset:
    """w = beta w + (1 - beta) g, p -= lr ((1 - nu) g + nu w). Source: Ma and Yarats, ICLR 2019."""
    scale = 1 - nu * beta
    return Preset(scale, (-(1 - nu) * beta / scale,), (beta,))


def triple_momentum(beta: float, gamma: float) -> Preset:
    """x+ = (1 + beta) x - beta x- - lr grad f(y), y = (1 + gamma) x - gamma x-; the parameters are y.

    Source: Van Scoy, Freeman, Lynch, The fastest known globally convergent first-order method, 2018.
    """
    return Preset(1 + gamma, (-gamma / (1 + gamma),), (beta,))


def integral_proportional(proportional: float) -> Preset:
    """p -= lr (g_t + proportional (g_t - g_{t-1}))."""
    scale = 1 + proportional
    return Preset(scale, (-proportional / scale,))


def integral_proportional_derivative(proportional: float, derivative: float) -> Preset:
    """p -= lr (g_t + proportional (g_t - g_{t-1}) + derivative (g_t - 2 g_{t-1} + g_{t-2}))."""
    scale = 1 + proportional + derivative
    return Preset(scale, (-(proportional + 2 * derivative) / scale, derivative / scale))


def optimistic() -> Preset:
    """p -= lr (2 g_t - g_{t-1}). Source: Daskalakis, Ilyas, Syrgkanis, Zeng, ICLR 2018."""
    return Preset(2.0, (-0.5,))


def pid(integral: float, derivative: float, momentum: float) -> Preset:
    """I = momentum I + g, D = momentum D + (1 - momentum)(g_t - g_{t-1}), p -= lr (g + integral I + derivative D).

    From a first difference of g_1 - 0. Its DC gain is 1 + integral / (1 - momentum): compare it with heavy ball at that
    gain. Source: An, Wang, Sun, Xu, Dai, Zhang, CVPR 2018.
    """
    scale = 1 + integral + derivative * (1 - momentum)
    return Preset(scale, (-(momentum + derivative * (1 - momentum)) / scale,), (momentum,))


def tustin(c1: float = 1.0) -> Preset:
    """p -= lr (g_t + c1 g_{t-1}): at c1 = 1 the bilinear rule of integration; positive real for |c1| <= 1."""
    return Preset(1.0, (c1,))
