"""The spectral bound as a differentiable function of the weights, for training inside a stability budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from firmly.certificates.blocks import sweep
from firmly.certificates.certify import Shapes, input_shapes, perturbed_inputs
from firmly.certificates.pencil import Pencil, pencil
from firmly.certificates.relax import relaxed
from firmly.certificates.representation import make_basis, represent
from firmly.certificates.signal import trace
from firmly.certificates.spectral import minimise_rho
from firmly.errors import NotCertifiable
from firmly.linear.map import LinearMap


def bound(
    net: nn.Module, wrt: str | Sequence[str] = "data", multipliers: Tensor | None = None, shape: Shapes | None = None
) -> Tensor:
    """max_f sqrt(rho_f(weights; mu)) with fixed multipliers mu: a scalar whose gradient reaches the weights of `net`.

    Any mu gives an upper bound of the Lipschitz constant, up to rounding (only `certify` pays for that); at the
    optimal mu the gradient is that of the optimal bound too (envelope theorem). `multipliers=None` solves for them
    first; in training, solve every so often with `multipliers` and pass them on. Infinite if mu is feasible no more.
    """
    if multipliers is None:
        multipliers = solved_multipliers(net, wrt, shape)
    rho = differentiable_pencil(net, wrt, shape).required(multipliers).max()
    return rho.clamp(min=0).sqrt()


@torch.no_grad()
def solved_multipliers(
    net: nn.Module,
    wrt: str | Sequence[str] = "data",
    shape: Shapes | None = None,
    start: Tensor | None = None,
    tolerance: float = 1e-3,
) -> Tensor:
    """Multipliers that minimise `bound` for the weights as they are now; `start` continues from earlier ones."""
    family = differentiable_pencil(net, wrt, shape)
    result = minimise_rho(family, tolerance, start=start)
    if not result.rho < float("inf"):
        raise NotCertifiable("no multipliers prove a finite bound for this network")
    return result.mu


def differentiable_pencil(net: nn.Module, wrt: str | Sequence[str], shape: Shapes | None) -> Pencil:
    inputs = input_shapes(net, shape)
    is_complex = any(m.is_complex for m in net.modules() if isinstance(m, LinearMap))
    system = trace(net, inputs, perturbed_inputs(inputs, wrt), is_complex, keep_gradients=torch.is_grad_enabled())
    with torch.no_grad():
        choice = represent(system)[0]
    basis = make_basis(choice, system, track=False)
    return pencil(sweep(relaxed(system, basis)[0], basis), choice.name in ("dense", "fourier"))
