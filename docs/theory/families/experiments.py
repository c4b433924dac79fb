"""The experiments of the article on unrolled algorithms: `python make_figures.py` runs them all."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

import firmly as fm
from firmly.algorithms import (
    Admm,
    Algorithm,
    ChambollePock,
    CondatVu,
    DouglasRachford,
    DualForwardBackward,
    Fista,
    ForwardBackward,
    HeavyBall,
    Hqs,
    Tikhonov,
)
from firmly.certificates.blocks import Blocks, sweep
from firmly.certificates.family import Family
from firmly.certificates.norm_bounds import averaged_bound, product_bound
from firmly.certificates.relax import relaxed
from firmly.certificates.representation import represent
from firmly.certificates.signal import trace
from firmly.linear import Convolution, Dense, DenseBasis, FourierSampling, Mask, Radon
from firmly.prox import L1, MCP, SCAD, TV, Clip, NonNegative, Ridge

double = {"dtype": torch.float64}
SIZE = 64
DEPTHS = (1, 2, 3, 5, 8, 12, 16, 20)
ENUMERATED = 15  # units whose slope patterns are all tried

Problem = dict[str, Callable[[], Algorithm]]


def small() -> Problem:
    """Three unknowns, maps without a common eigenbasis: the data of section 7 in the theory notes."""
    generator = np.random.default_rng(0)
    A, K, D = (torch.as_tensor(generator.standard_normal(shape)) for shape in ((4, 3), (2, 3), (4, 3)))
    A, K, D = Dense(A / torch.linalg.matrix_norm(A, 2)), Dense(K / torch.linalg.matrix_norm(K, 2)), Dense(D)
    return families(A, K, D, L1(0.02), Tikhonov(0.3 * K), penalty=1.0)


def deconvolution() -> Problem:
    """A Gaussian blur of 64 samples, all maps circular; K and D are differences, the heavy ball has a learned ridge."""
    at = torch.arange(-6, 7, **double)
    kernel = torch.exp(-(at**2) / (2 * 1.6**2))
    A = Convolution((kernel / kernel.sum())[None, None], (1, SIZE))
    K = Convolution(torch.tensor([0.0, -1.0, 1.0], **double)[None, None], (1, SIZE))
    found = families(A, K, K, L1(0.02), Tikhonov(0.1 * K), penalty=0.1)
    filters = torch.randn(4, 1, 5, generator=torch.Generator().manual_seed(0), **double)
    learned = Ridge(0.3 * filters, Clip(4, 0.2).double(), cap=1.0)
    return {**found, "heavy_ball": lambda: HeavyBall(A, ridge=learned)}


def families(A, K, D, prior, tikhonov, penalty: float) -> Problem:
    return {
        "forward_backward": lambda: ForwardBackward(A, prior, ridge=tikhonov, step_size=1.8 / smoothness(A, tikhonov)),
        "fista": lambda: Fista(A, prior, ridge=tikhonov),
        "hqs": lambda: Hqs(A, prior, penalty=penalty),
        "douglas_rachford": lambda: DouglasRachford(A, prior, step_size=1 / penalty),
        "admm": lambda: Admm(A, prior, penalty=penalty),
        "chambolle_pock": lambda: ChambollePock(A, prior, K),
        "condat_vu": lambda: CondatVu(A, prior, K, constraint=NonNegative()),
        "dual_forward_backward": lambda: DualForwardBackward(D, prior, step_size=1.9 / D.norm().upper ** 2),
        "heavy_ball": lambda: HeavyBall(A, ridge=tikhonov),
    }


def smoothness(A, tikhonov) -> float:
    return A.norm().upper ** 2 + tikhonov.kappa()


# -- what is true --------------------------------------------------------------------------------------------------


def dense_blocks(net: nn.Module, wrt: Sequence[str]) -> Blocks:
    basis = DenseBasis()
    return sweep(relaxed(trace(net.double(), net.inputs, wrt, False), basis)[0], basis)


class Slopes:
    """The gain of a network as a function of the slopes of its units: norm(O_d + O_v (1/s - Z_v)^-1 Z_d)."""

    def __init__(self, blocks: Blocks):
        n = blocks.inputs[-1].stop
        Z = torch.cat([r.value[0] for r in blocks.rows]) if blocks.rows else torch.zeros(0, n, **double)
        self.Zd, self.Zv = Z[:, :n], Z[:, n:]
        self.Od, self.Ov = blocks.output.value[0, :, :n], blocks.output.value[0, :, n:]
        self.layers = [slice(c.start - n, c.stop - n) for c in blocks.columns]
        ends = [
            [float(s.low), float(s.high)] for s, c in zip(blocks.slopes, self.layers) for _ in range(c.start, c.stop)
        ]
        self.low, self.high = torch.tensor(ends, **double).reshape(-1, 2).T
        self.units = len(self.low)

    def matrix(self, slopes: Tensor) -> Tensor:  # (..., units) -> (..., outputs, inputs)
        system = torch.eye(self.units, **double) - slopes[..., :, None] * self.Zv
        return self.Od + self.Ov @ torch.linalg.solve(system, slopes[..., :, None] * self.Zd)

    def enumerated(self) -> float:
        """The largest gain of the class: the norm is convex and multi-affine in the slopes, so that ends suffice."""
        best = 0.0
        patterns = (torch.arange(2**self.units)[:, None] >> torch.arange(self.units)) & 1
        for part in patterns.split(2048):
            gains = self.matrix(torch.where(part.bool(), self.high, self.low))
            best = max(best, float(torch.linalg.matrix_norm(gains, 2).max()))
        return best

    def ascended(self, starts: int = 6) -> float:
        """A gain that some pattern attains: slopes layer by layer, with the singular vectors fixed."""
        generator = torch.Generator().manual_seed(0)
        best = 0.0
        for start in range(starts):
            chosen = torch.rand(self.units, generator=generator) < (1.0, 0.0, 0.5, 0.5, 0.7, 0.3)[start % 6]
            slopes, value = torch.where(chosen, self.high, self.low), 0.0
            for _ in range(20):
                for layer in reversed(self.layers):
                    U, _, V = torch.linalg.svd(self.matrix(slopes))
                    system = torch.eye(self.units, **double) - slopes[:, None] * self.Zv
                    v = torch.linalg.solve(system, slopes * (self.Zd @ V[0]))
                    z = self.Zd @ V[0] + self.Zv @ v
                    back = torch.linalg.solve(system.T, self.Ov.T @ U[:, 0])
                    slopes[layer] = torch.where((back * z)[layer] > 0, self.high[layer], self.low[layer])
                gain = float(torch.linalg.matrix_norm(self.matrix(slopes), 2))
                if gain <= value * (1 + 1e-9):
                    break
                value = gain
            best = max(best, value, gain)
        return best


def jacobians(net: nn.Module, signals: Sequence[Tensor]) -> float:
    """The largest norm of the Jacobian with respect to the data, at some data."""
    best = 0.0
    for y in signals:
        J = torch.autograd.functional.jacobian(lambda t: net(t).flatten(), y, vectorize=True)
        best = max(best, float(torch.linalg.matrix_norm(J.flatten(1), 2)))
    return best


def synthetic(shape: Sequence[int], count: int = 4) -> list[Tensor]:
    """Spikes and steps with a little noise, in four sizes."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for k in range(count):
        spikes = torch.randn(1, *shape, generator=generator, **double)
        spikes = spikes * (torch.rand(1, *shape, generator=generator, **double) < 0.1)
        steps = 0.3 * spikes.cumsum(-1)
        noise = 0.01 * torch.randn(1, *shape, generator=generator, **double)
        found.append((0.1, 0.3, 1.0, 5.0)[k % 4] * (spikes + steps) + noise)
    return found


# -- curves --------------------------------------------------------------------------------------------------------


def bounds(net: nn.Module, wrt: str = "data") -> dict:
    """Both bounds by norms, the matrix inequality (verified again), and what a pair of inputs attains."""
    cert = fm.certify(net, wrt=wrt, method="spectral")
    fm.verify(cert, net)
    _, basis, system, relaxations = represent(trace(net.double(), cert.inputs, cert.wrt, cert.is_complex))
    family = Family(system, basis)
    return {
        "product": product_bound(family),
        "averaged": averaged_bound(family),
        "certified": cert.upper,
        "attained": cert.lower,
        "basis": cert.basis.name,
        "relaxed": relaxations,
    }


def curve(make: Callable[[], Algorithm], depths: Sequence[int], dense: bool) -> list[dict]:
    """Every bound against depth, for perturbed data; with the truth of the class if the problem is small."""
    rows = []
    for depth in depths:
        net = fm.unroll(make(), depth, learn=()).double()
        row = {"depth": depth, **bounds(net)}
        row["jacobian"] = jacobians(net, synthetic(net.inputs["data"]))
        if dense:
            slopes = Slopes(dense_blocks(net, ("data",)))
            row["class"] = max(slopes.ascended(), row["attained"])
            if slopes.units <= ENUMERATED:
                row["exact"] = slopes.enumerated()
        rows.append(row)
    return rows


def inputs_table(problem: Problem, depth: int = 10) -> list[dict]:
    """Perturbed data, perturbed start, and both."""
    rows = []
    for name, make in problem.items():
        net = fm.unroll(make(), depth, learn=())
        for wrt in ("data", "start", "both"):
            rows.append({"family": name, "wrt": wrt, **bounds(net, wrt)})
    return rows


def varied_table(problem: Problem, depth: int = 6) -> list[dict]:
    """Steps, relaxations and weights drawn anew in every layer, inside their rules."""
    rows = []
    for index, (name, make) in enumerate(problem.items()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = fm.unroll(make(), depth).double()
        scatter(net, index)
        truth = Slopes(dense_blocks(net, ("data",))).ascended()
        rows.append({"family": name, **bounds(net)})
        rows[-1]["class"] = max(truth, rows[-1]["attained"])
    return rows


def scatter(net: nn.Module, seed: int) -> None:
    """Move every learnable number of every layer by a random amount; its parametrisation keeps it inside its rule."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.8 * torch.randn(parameter.shape, generator=generator, **double).to(parameter.dtype)


# -- single questions ----------------------------------------------------------------------------------------------


def step_sizes(depth: int = 10) -> list[dict]:
    """Forward-backward with steps between 0 and 2 / L, on the deconvolution."""
    at = deconvolution()["forward_backward"]()
    assert isinstance(at, ForwardBackward)
    L = smoothness(at.A, at.ridge)
    rows = []
    for t in (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 1.9, 1.98):
        net = fm.unroll(ForwardBackward(at.A, at.prior, ridge=at.ridge, step_size=t / L), depth, learn=())
        rows.append({"step": t, **bounds(net)})
    return rows


def denoisers(depths: Sequence[int] = (1, 2, 3)) -> dict[str, list[dict]]:
    """Dual forward-backward denoisers: the truth by enumeration, above 1."""
    generator = np.random.default_rng(0)
    generator.standard_normal(12 + 6)
    random = Dense(torch.as_tensor(generator.standard_normal((4, 3))))
    circle = Dense(torch.eye(4, **double).roll(1, 1) - torch.eye(4, **double))
    found: dict[str, list[dict]] = {}
    for name, D in (("random analysis operator", random), ("circular differences", circle)):
        rows = []
        for depth in depths:
            net = fm.unroll(DualForwardBackward(D, L1(0.1), step_size=1.99 / D.norm().upper ** 2), depth, learn=())
            rows.append({"depth": depth, **bounds(net), "exact": Slopes(dense_blocks(net, ("data",))).enumerated()})
        found[name] = rows
    return found


def heavy_ball_transient(steps: int = 30) -> list[dict]:
    """max_h norm(M(h)^k) for the fastest tuning on spectra in [mu, L] = [0.1, 1], by powers of the 2 x 2 matrices."""
    mu, L = 0.1, 1.0
    t = 4 / (math.sqrt(L) + math.sqrt(mu)) ** 2
    b = ((math.sqrt(L) - math.sqrt(mu)) / (math.sqrt(L) + math.sqrt(mu))) ** 2
    h = torch.linspace(mu, L, 1000, **double)
    M = torch.zeros(len(h), 2, 2, **double)
    M[:, 0, 0], M[:, 0, 1], M[:, 1, 0] = 1 + b - t * h, -b, 1.0
    rows, power = [], torch.eye(2, **double).expand_as(M)
    for k in range(1, steps + 1):
        power = M @ power
        rows.append({"depth": k, "norm": float(torch.linalg.matrix_norm(power, 2).max()), "rate": math.sqrt(b) ** k})
    return rows


class PrimalDual(nn.Module):
    """Steps of Chambolle-Pock on (x, u), with relu as both proximal maps: the case of the metric bound."""

    def __init__(self, K: Dense, depth: int, step: float):
        super().__init__()
        self.K, self.depth, self.step = K, depth, step
        self.inputs = {"x": K.domain, "u": K.codomain}

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        for _ in range(self.depth):
            new = torch.relu(x - self.step * self.K.T(u))
            u, x = torch.relu(u + self.step * self.K(2.0 * new - x)), new
        return x


def metric(depths: Sequence[int] = (1, 2, 3, 5, 8, 12)) -> list[dict]:
    """Chambolle-Pock is nonexpansive in a metric P; seen in Euclidean norms, that costs sqrt(cond P)."""
    algorithm = small()["chambolle_pock"]()
    assert isinstance(algorithm, ChambollePock)
    K, step = algorithm.K, 0.99
    assert isinstance(K, Dense)
    identity = torch.eye(3, **double)
    P = torch.cat([
        torch.cat([identity / step, -K.weight.T], 1),
        torch.cat([-K.weight, torch.eye(2, **double) / step], 1),
    ])  # fmt: skip
    eigenvalues = torch.linalg.eigvalsh(P)
    inverse = torch.linalg.inv(identity / step - step * K.weight.T @ K.weight)
    whole = float((eigenvalues[-1] * torch.linalg.eigvalsh(inverse)[-1]).sqrt())
    rows = []
    for depth in depths:
        net = PrimalDual(K, depth, step)
        slopes = Slopes(dense_blocks(net, ("x", "u")))
        rows.append({"depth": depth, **bounds(net, "both"), "metric": whole})
        rows[-1]["class"] = max(slopes.ascended(), rows[-1]["attained"])
        if slopes.units <= ENUMERATED:
            rows[-1]["exact"] = slopes.enumerated()
    return rows


def weakly_convex(depth: int = 4) -> list[dict]:
    """Forward-backward with MCP and SCAD on the small problem: slopes above 1."""
    at = small()["forward_backward"]()
    assert isinstance(at, ForwardBackward)
    step = 0.9 / smoothness(at.A, at.ridge)
    rows = []
    for name, values in (("MCP", (1.5, 2.0, 3.0, 5.0, 10.0, 50.0)), ("SCAD", (2.5, 3.0, 3.7, 6.0, 11.0, 51.0))):
        for value in values:
            prior = MCP(0.02, concavity=value) if name == "MCP" else SCAD(0.02, a=value)
            net = fm.unroll(ForwardBackward(at.A, prior, step, at.ridge), depth, learn=(), waive=("prior",))
            truth = Slopes(dense_blocks(net, ("data",))).enumerated()
            rows.append({"prior": name, "parameter": value, "slope": float(prior.slope_at(step).high), **bounds(net)})
            rows[-1]["exact"] = truth
    return rows


def no_common_basis(depth: int = 5) -> list[dict]:
    """Operators and priors that share no eigenbasis: which representation serves, and what it relaxes."""
    generator = torch.Generator().manual_seed(2)
    pixels = (1, 16, 16)
    ridge = Ridge(torch.randn(4, 1, 3, 3, generator=generator, **double), Clip(4, 0.2).double(), cap=1.9)
    differences = Convolution(torch.tensor([0.0, -1.0, 1.0], **double)[None, None], (1, 256))
    hidden = Mask(torch.rand(1, 256, generator=generator, **double) < 0.7)
    plane = Mask(torch.rand(pixels, generator=generator, **double) < 0.7)
    sampled = FourierSampling(torch.rand(16, 16, generator=generator) < 0.4)
    cases: dict[str, Algorithm] = {
        "inpainting, learned ridge, forward-backward": ForwardBackward(plane, L1(0.01), ridge=ridge),
        "inpainting, differences, Condat-Vu": CondatVu(hidden, L1(0.02), differences),
        "inpainting, differences, Chambolle-Pock": ChambollePock(hidden, L1(0.02), differences),
        "tomography, learned ridge, forward-backward": ForwardBackward(
            Radon(pixels, torch.arange(12, **double) * math.pi / 12), L1(0.01), ridge=ridge
        ),
        "deblurring, total variation, forward-backward": ForwardBackward(ridge_blur(pixels), TV(0.02)),
        "complex MRI, soft threshold, FISTA": Fista(sampled, L1(0.01)),
    }
    rows = []
    for name, algorithm in cases.items():
        net = fm.unroll(algorithm, depth, learn=())
        rows.append({"case": name, **bounds(net)})
    return rows


def ridge_blur(shape: tuple[int, ...]) -> Convolution:
    kernel = torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1], **double)
    return Convolution(kernel.outer(kernel)[None, None], shape)
