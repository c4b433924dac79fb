"""Hypothesis looks for bounds below the exact constant, and for traces that are not the network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from firmly.certificates.blocks import sweep
from firmly.certificates.norm_bounds import averaged_bound, product_bound
from firmly.certificates.pencil import pencil
from firmly.certificates.relax import Norms, relaxed
from firmly.certificates.signal import trace
from firmly.certificates.spectral import causal_multipliers
from firmly.certificates.verify import certified_gain
from firmly.linear import DenseBasis

torch.set_num_threads(1)
double = {"dtype": torch.float64}
quickly = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
entries = st.floats(-3, 3, allow_nan=False, width=32) | st.sampled_from([0.0, 1.0, -1.0, 1e-8, 1e8, 1e-150])


@st.composite
def matrices(draw, rows, columns):
    values = draw(st.lists(entries, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values, **double).reshape(rows, columns)


class Sandwich(nn.Module):
    """x -> V R(W x) + c x, R entrywise with two slopes: its constant is a maximum over slope patterns."""

    def __init__(self, W, V, skip, slopes):
        super().__init__()
        self.W, self.V, self.skip, self.slopes = W, V, skip, slopes

    def forward(self, x):
        z = F.linear(x, self.W)
        low, high = self.slopes
        return F.linear(low * z + (high - low) * torch.relu(z), self.V) + self.skip * x

    def exact(self) -> float:
        n = len(self.W)
        best = 0.0
        for pattern in range(2**n):
            slopes = torch.tensor([self.slopes[(pattern >> i) & 1] for i in range(n)], **double)
            J = self.V @ (slopes[:, None] * self.W) + self.skip * torch.eye(2, **double)
            best = max(best, float(torch.linalg.matrix_norm(J, 2)))
        return best


@quickly
@given(W=matrices(3, 2), V=matrices(2, 3), skip=entries, low=st.floats(-1, 0.5), width=st.floats(0, 2))
def test_no_bound_is_below_the_exact_constant(W, V, skip, low, width):
    net = Sandwich(W, V, skip, (low, low + width))
    true = net.exact()
    system = trace(net, {"data": (2,)}, ("data",))
    for basis in (DenseBasis(), Norms()):
        with torch.no_grad():
            blocks = sweep(relaxed(system, basis)[0], basis)
            bounds = [product_bound(blocks), averaged_bound(blocks)]
            family = pencil(blocks, basis.name == "dense")
            if family.multipliers:
                bounds.append(certified_gain(blocks, causal_multipliers(family), basis.name == "dense"))
        for bound in bounds:
            assert true <= bound * (1 + 1e-13) + 1e-290


operations = st.lists(
    st.sampled_from(
        ["relu", "flip", "roll", "negate", "double", "square matrix", "add input", "cat and cut", "in place"]
    ),
    max_size=6,
)


class Program(nn.Module):
    def __init__(self, steps, W):
        super().__init__()
        self.steps, self.W = steps, W

    def forward(self, x):
        y = x * 1.0
        for step in self.steps:
            if step == "relu":
                y = torch.relu(y)
            elif step == "flip":
                y = y.flip(1)
            elif step == "roll":
                y = torch.roll(y, 1, 1)
            elif step == "negate":
                y = 1.0 - y
            elif step == "double":
                y = torch.add(y, y)
            elif step == "square matrix":
                y = F.linear(y, self.W)
            elif step == "add input":
                y = y - 0.5 * x
            elif step == "cat and cut":
                y = torch.cat([y, x], dim=1)[:, 1:4]
            else:
                y = y.clone()
                y += x
        return y


@quickly
@given(steps=operations, W=matrices(3, 3))
def test_the_trace_of_a_program_bounds_its_jacobians(steps, W):
    net = Program(steps, W)
    system = trace(net, {"data": (3,)}, ("data",))
    with torch.no_grad():
        blocks = sweep(system, DenseBasis())
        bounds = [product_bound(blocks), averaged_bound(blocks)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        at = torch.randn(1, 3, generator=generator, **double)
        J = torch.autograd.functional.jacobian(lambda x: net(x).flatten(), at).reshape(3, 3)
        for bound in bounds:
            assert float(torch.linalg.matrix_norm(J, 2)) <= bound * (1 + 1e-12) + 1e-290
    if "relu" not in steps:
        assert bounds[0] <= float(torch.linalg.matrix_norm(J, 2)) * (1 + 1e-9) + 1e-9 * float(W.abs().max() + 1) ** 6
