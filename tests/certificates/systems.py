"""What the tests of certificates share: small networks, every bound of a system, and the exact value by enumeration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from firmly.certificates.blocks import Blocks, sweep
from firmly.certificates.norm_bounds import averaged_bound, product_bound
from firmly.certificates.pencil import pencil
from firmly.certificates.relax import relaxed
from firmly.certificates.signal import trace
from firmly.certificates.spectral import causal_multipliers, minimise_rho
from firmly.certificates.system import System
from firmly.certificates.verify import certified_gain
from firmly.linear import DenseBasis
from firmly.linear.basis import Basis

torch.set_num_threads(1)  # the tensors are so small that more threads only wait for each other
double = {"dtype": torch.float64}


class Net(nn.Module):
    """A function as a network; `parts` are its modules, so that their weights are copied and cast with it."""

    def __init__(self, function: Callable, *parts: nn.Module):
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def system_of(net: nn.Module | Callable, shape, wrt: Sequence[str] | None = None, is_complex: bool = False) -> System:
    """The traced system; `shape` is one shape or a dict of them."""
    net = net if isinstance(net, nn.Module) else Net(net)
    inputs = shape if isinstance(shape, dict) else {"data": shape}
    return trace(net, inputs, tuple(inputs) if wrt is None else wrt, is_complex)


def blocks_of(system: System, basis: Basis | None = None) -> Blocks:
    basis = DenseBasis() if basis is None else basis
    return sweep(relaxed(system, basis)[0], basis)


def spectral(blocks: Blocks, per_channel: bool, tolerance: float = 1e-8) -> float:
    """The verified bound of the matrix inequality."""
    family = pencil(blocks, per_channel)
    result = minimise_rho(family, tolerance)
    interior = causal_multipliers(family) if family.multipliers else result.mu
    return min(certified_gain(blocks, (1 - s) * result.mu + s * interior, per_channel) for s in (0, 1e-9, 1e-7, 1e-5))


@torch.no_grad()
def all_bounds(system: System, basis: Basis | None = None, tolerance: float = 1e-8) -> dict[str, float]:
    blocks = blocks_of(system, basis)
    found = {
        "product": product_bound(blocks),
        "averaged": averaged_bound(blocks),
        "layer": spectral(blocks, per_channel=False, tolerance=tolerance),
    }
    if basis is None or basis.name in ("dense", "fourier"):
        found["neuron"] = spectral(blocks, per_channel=True, tolerance=tolerance)
    return found


def bounds(net, shape, wrt=None, basis: Basis | None = None, tolerance: float = 1e-8) -> dict[str, float]:
    return all_bounds(system_of(net, shape, wrt), basis, tolerance)


@torch.no_grad()
def exact(blocks: Blocks) -> float:
    """The largest gain over all slope patterns, each slope at one of its ends: the norm is convex and multi-affine in
    the slopes, so that this is exact for separable nonlinearities with free shifts; for a dense basis."""
    n = blocks.inputs[-1].stop
    width = blocks.width - n
    Z = torch.cat([r.value[0] for r in blocks.rows]) if blocks.rows else torch.zeros(0, n, **double)
    O = blocks.output.value[0]
    ends = []
    for slope, columns in zip(blocks.slopes, blocks.columns):
        ends += [(float(slope.low), float(slope.high))] * (columns.stop - columns.start)
    low, high = torch.tensor(ends, **double).reshape(-1, 2).T
    assert width <= 14, "too many slopes to enumerate"
    patterns = (torch.arange(2**width)[:, None] >> torch.arange(width)) & 1
    best = 0.0
    for part in patterns.split(4096):
        slopes = torch.where(part.bool(), high, low)
        system = torch.eye(width, **double) - slopes[:, :, None] * Z[:, n:]
        v = torch.linalg.solve(system, slopes[:, :, None] * Z[:, :n])
        best = max(best, float(torch.linalg.matrix_norm(O[:, :n] + O[:, n:] @ v, 2).max()))
    return best


def attained(
    net: Callable, shapes: Sequence[Sequence[int]], points: int, seed: int = 0, scales=(0.05, 1.0, 20.0)
) -> float:
    """The largest norm of the Jacobian with respect to all inputs jointly, at random points of several sizes."""
    generator = torch.Generator().manual_seed(seed)
    best = 0.0
    for scale in scales:
        for _ in range(points):
            at = tuple(scale * torch.randn(1, *shape, generator=generator, **double) for shape in shapes)
            jacobians = torch.autograd.functional.jacobian(lambda *xs: net(*xs).flatten(), at)
            joint = torch.cat([j.flatten(1) for j in jacobians], dim=1)
            best = max(best, float(torch.linalg.matrix_norm(joint, 2)))
    return best
