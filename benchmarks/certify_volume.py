"""Certificates of volumes.

Two networks of ten layers for volumes, whose linear maps are made of one operator: unrolled forward-backward that
deblurs non-negative volumes, with a Gaussian blur of width 1.6 voxels and zero borders applied axis by axis, and the
dual forward-backward method for total variation with the gradient of the volume. The norm of the blur is that of one
axis cubed, the norm of the gradient has a closed form. Both are certified in the singular values of the operator: 8192
intervals cover all that its norm allows, and no frequency, no singular vector and no voxel is looked at. So the time
depends on the number of layers alone. The steps are drawn uniformly from [0.3, 1.95] / |A|^2, seed 0.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import firmly as fm
from benchmarks.runner.curves import curves
from benchmarks.runner.results import Picture, Result, Table, Target
from benchmarks.runner.timing import program
from firmly.certificates.family import Family
from firmly.certificates.methods import Problem, upper_bounds
from firmly.certificates.representation import represent
from firmly.certificates.signal import trace
from firmly.lab.charts import Line
from firmly.linear.map import Bracket, LinearMap

NETWORKS = ("deblurring", "total variation")
ATTAINED = 64  # side up to which the network is run for the lower end
NOTE = (
    "'seconds norm' is the norm of the operator, 'seconds upper' the trace and all upper bounds; both and 'seconds "
    "certify', the whole of `certify`, are those of the processor, one thread. The lower end runs the network on whole "
    f"volumes, for a minute at most, and was looked for up to {ATTAINED} voxels a side. 'MiB' is the peak memory of "
    "norm and upper bounds beyond the imports."
)


def measure(quick: bool) -> Result:
    depth, sides = (2, (8, 16)) if quick else (10, (32, 64, 128, 256, 512))
    rows = [row(name, side, depth) for name in NETWORKS for side in sides]
    targets = []
    for name in NETWORKS:
        seconds = [row["seconds upper"] for row in rows if row["network"] == name]
        ratio = max(seconds) / min(seconds)
        text = f"{name}: the time of the upper bounds does not depend on the volume (slowest over fastest at most 2)"
        targets.append(Target(text, f"{ratio:.2f}", ratio <= 2))
    return Result([Table(f"Volumes, depth {depth}", rows, NOTE)], targets, [picture(rows)])


def picture(rows: list[dict]) -> Picture:
    lines = [
        Line(name, [(r["side"], r["seconds upper"]) for r in rows if r["network"] == name], role)
        for name, role in zip(NETWORKS, ("ours", "twin"))
    ]
    caption = "Time of certificates: volumes of N x N x N voxels, ten layers, in singular values"
    return curves("seconds", lines, "voxels a side", "seconds", caption)


def row(name: str, side: int, depth: int) -> dict:
    """A row of the table, measured in a process of its own."""
    found = program("benchmarks.programs.certify_volume", [name, str(side), str(depth)])
    return {"network": name, "side": side, "voxels": side**3, **found}


class SeparableBlur(LinearMap):
    """One Gaussian along each axis of a volume (1, n, n, n), with zeros beyond the border: |A| is that of one axis,
    cubed."""

    line: Tensor

    def __init__(self, width: float, side: int):
        super().__init__((1, side, side, side), (1, side, side, side))
        axis = fm.linear.Blur.gaussian(width, (1, side), padding="zero")
        self.one = axis.norm()
        self.register_buffer("line", axis.kernel)

    def _apply_map(self, x: Tensor) -> Tensor:
        for turn in ((-1, 1, 1), (1, -1, 1), (1, 1, -1)):
            x = F.conv3d(x, self.line.to(x.dtype).reshape(1, 1, *turn), padding="same")
        return x

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return self._apply_map(y)  # the Gaussian is even

    def _norm(self) -> Bracket:
        return Bracket(self.one.lower**3 * (1 - 1e-15), self.one.upper**3 * (1 + 1e-15))


def network(name: str, side: int, depth: int) -> nn.Module:
    if name == "deblurring":
        A = SeparableBlur(1.6, side)
        algorithm = fm.algorithms.ForwardBackward(A, fm.prox.NonNegative())
    else:
        A = fm.linear.Gradient((1, side, side, side))
        algorithm = fm.algorithms.DualForwardBackward(A, fm.prox.L1(0.02))
    net = fm.unroll(algorithm, depth, learn=("step_size",))
    generator = torch.Generator().manual_seed(0)
    for layer in net.layers:
        layer.step_size = torch.empty(()).uniform_(0.3, 1.95, generator=generator) / A.norm().upper ** 2
    return net


@torch.no_grad()
def upper(net: nn.Module, tolerance: float = 1e-4, budget_s: float = 60.0) -> tuple[str, str, float]:
    """The basis, the method and the value of the best upper bound: `certify` without the lower end."""
    system = trace(net.double(), net.inputs, ("data",), False)
    choice, basis, blocked, notes = represent(system)
    problem = Problem(system, choice, Family(blocked, basis), notes, tolerance, time.monotonic() + budget_s)
    best = min((proof.bound for proof in upper_bounds(problem, "auto", 0.0)), key=lambda bound: bound.value)
    return choice.name, best.method, best.value
