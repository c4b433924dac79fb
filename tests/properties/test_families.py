"""No unrolled algorithm, with random parameters in every layer, moves its output further than its certificate says."""

from __future__ import annotations

import warnings

import pytest
import torch

from firmly import certify, unroll, verify
from firmly.algorithms import (
    Admm,
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
from firmly.linear import Convolution, Dense, FourierSampling, Mask, Radon
from firmly.prox import L1, MCP, SCAD, TV, Clip, ElasticNet, NonNegative, Ridge

torch.set_num_threads(1)
double = {"dtype": torch.float64}


def drawn(generator: torch.Generator, kind: str):
    """(A, K, weak): a map, an analysis map, and whether both are circular."""
    if kind == "dense":
        A, K = (torch.randn(shape, generator=generator, **double) for shape in ((4, 3), (2, 3)))
        return Dense(A), Dense(K)
    kernels = torch.randn(2, 1, 1, 3, generator=generator, **double)
    if kind == "circular":
        return Convolution(kernels[0], (1, 5)), Convolution(kernels[1], (1, 5))
    return Mask(torch.rand(1, 5, generator=generator, **double) < 0.6), Convolution(kernels[1], (1, 5))


def prior_of(generator: torch.Generator):
    weight = float(0.05 + 0.3 * torch.rand((), generator=generator))
    return (L1(weight), ElasticNet(weight, 0.5), NonNegative())[int(torch.randint(3, (), generator=generator))]


MAKERS = {
    "forward_backward": lambda A, K, g: ForwardBackward(A, g, ridge=Tikhonov(K)),
    "fista": lambda A, K, g: Fista(A, g, ridge=Tikhonov(K)),
    "hqs": lambda A, K, g: Hqs(A, g),
    "douglas_rachford": lambda A, K, g: DouglasRachford(A, g, relaxation=1.5),
    "admm": lambda A, K, g: Admm(A, g),
    "admm_analysis": lambda A, K, g: Admm(A, g, K=K),
    "chambolle_pock": lambda A, K, g: ChambollePock(A, g, K),
    "condat_vu": lambda A, K, g: CondatVu(A, g, K, constraint=NonNegative()),
    "dual_forward_backward": lambda A, K, g: DualForwardBackward(K, g),
    "heavy_ball": lambda A, K, g: HeavyBall(A, ridge=Tikhonov(K)),
}


def scattered(algorithm, depth: int, generator: torch.Generator, **options) -> torch.nn.Module:
    """The network with its own random numbers in every layer, each inside its rule."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = unroll(algorithm, depth, **options).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.8 * torch.randn(parameter.shape, generator=generator, **double).to(parameter.dtype)
    return net


def steepest(net, wrt: str, generator: torch.Generator, points: int = 3, dtype=torch.float64) -> float:
    """The largest norm of a Jacobian with respect to the inputs that are perturbed, at points of several sizes."""
    best = 0.0
    for scale in (0.05, 1.0, 20.0):
        for _ in range(points):
            y, x = (scale * torch.randn(1, *net.inputs[n], generator=generator, **double) for n in ("data", "start"))
            y, x = y.to(dtype), x.to(dtype)
            call = {
                "data": (lambda y: net(y).flatten(), y),
                "start": (lambda x, y=y: net(y, x).flatten(), x),
                "both": (lambda y, x: net(y, x).flatten(), (y, x)),
            }[wrt]
            found = torch.autograd.functional.jacobian(*call)
            parts = found if isinstance(found, tuple) else (found,)
            joint = torch.cat([part.flatten(1) for part in parts], dim=1)
            best = max(best, float(torch.linalg.matrix_norm(joint, 2)))
    return best


@pytest.mark.parametrize("kind", ["dense", "circular", "mask"])
@pytest.mark.parametrize("name", MAKERS)
def test_certificate_holds_everywhere(name, kind):
    generator = torch.Generator().manual_seed(100 * list(MAKERS).index(name) + len(kind))
    A, K = drawn(generator, kind)
    algorithm = MAKERS[name](A, K, prior_of(generator))
    depth = 1 + int(torch.randint(4, (), generator=generator))
    net = scattered(algorithm, depth, generator)
    for wrt, method in (("data", "auto"), ("start", "spectral"), ("both", "spectral"), ("data", "averaged")):
        cert = certify(net, wrt=wrt, method=method, budget_s=1.0)
        assert steepest(net, wrt, generator, points=1) <= cert.upper * (1 + 1e-9), (wrt, method)
        assert cert.lower <= cert.upper
        verify(cert, net)


@pytest.mark.parametrize("prior", [MCP(0.3, 2.0), SCAD(0.3, 3.0)], ids=["mcp", "scad"])
@pytest.mark.parametrize("name", ["forward_backward", "fista", "hqs", "douglas_rachford", "admm", "chambolle_pock"])
def test_weakly_convex_priors(name, prior):
    generator = torch.Generator().manual_seed(1)
    A, K = drawn(generator, "dense")
    A = Dense(A.weight / A.norm().upper)
    net = unroll(MAKERS[name](A, K, prior), 3, learn=(), waive=("prior",)).double()
    cert = certify(net, budget_s=2.0)
    assert max(high for _, high in slopes_of(net)) > 1 or name == "chambolle_pock"
    assert steepest(net, "data", generator, points=6) <= cert.upper * (1 + 1e-9)
    verify(cert, net)


def slopes_of(net):
    from firmly.certificates.signal import trace
    from firmly.certificates.system import Nonlinear

    return [n.slope for n in trace(net, net.inputs, ("data",), False).nodes if isinstance(n, Nonlinear)]


def imaging():
    """Networks whose maps share no basis, or are complex."""
    generator = torch.Generator().manual_seed(2)
    pixels = (1, 6, 6)
    ridge = Ridge(torch.randn(3, 1, 3, 3, generator=generator, **double), Clip(3, 0.2).double(), cap=1.9)
    mask = Mask(torch.rand(pixels, generator=generator, **double) < 0.6)
    scan = Radon(pixels, torch.arange(4, **double) * 0.7)
    sampled = FourierSampling(torch.rand(6, 6, generator=generator) < 0.5)
    kernel = torch.randn(1, 1, 3, 3, generator=generator, **double)
    return {
        "inpainting, ridge": ForwardBackward(mask, L1(0.1), ridge=ridge),
        "inpainting, heavy ball": HeavyBall(mask, ridge=ridge, momentum=0.3),
        "tomography, ridge": ForwardBackward(scan, L1(0.1), ridge=ridge),
        "total variation": ForwardBackward(Convolution(kernel, pixels), TV(0.05, accuracy=1e-4)),
        "magnetic resonance": Fista(sampled, L1(0.1)),
        "magnetic resonance, Chambolle-Pock": ChambollePock(sampled, L1(0.1), sampled),
    }


@pytest.mark.parametrize("name", imaging())
def test_maps_without_a_common_basis(name):
    algorithm = imaging()[name]
    net = unroll(algorithm, 3, learn=()).double()
    cert = certify(net, budget_s=2.0)
    assert cert.lower <= cert.upper
    verify(cert, net)
    generator = torch.Generator().manual_seed(3)
    if cert.is_complex:  # as a real map of real and imaginary parts
        best = 0.0
        for scale in (0.05, 1.0, 20.0):
            y = scale * torch.randn(1, *net.inputs["data"], generator=generator, dtype=torch.complex128)
            real = lambda t: torch.view_as_real(net(torch.view_as_complex(t))).flatten()  # noqa: E731
            J = torch.autograd.functional.jacobian(real, torch.view_as_real(y).clone(), vectorize=False)
            best = max(best, float(torch.linalg.matrix_norm(J.flatten(1), 2)))
    else:
        best = steepest(net, "data", generator, points=1)
    assert best <= cert.upper * (1 + (1e-2 if "variation" in name else 1e-9))  # an inner solver of that accuracy
