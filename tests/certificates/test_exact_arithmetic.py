"""Proofs in ball arithmetic: they hold where the certificate does, and fail just below it."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

import firmly as fm
from firmly.certificates import Certificate, certify, verify
from firmly.certificates.exact_arithmetic import Balls, positive_definite, prove_exactly
from firmly.certificates.family import Family
from firmly.certificates.pencil import pencil
from firmly.certificates.relax import relaxed
from firmly.certificates.representation import make_basis
from firmly.errors import SettingsError, VerificationError

from .systems import double, system_of

flint = pytest.importorskip("flint")


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 8), nn.LeakyReLU(0.2), nn.Linear(8, 3)).double()


def circular() -> nn.Module:
    torch.manual_seed(1)
    padded = {"padding": 1, "padding_mode": "circular"}
    return nn.Sequential(nn.Conv2d(1, 2, 3, **padded), nn.Tanh(), nn.Conv2d(2, 1, 3, **padded)).double()


def zero_padded() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1)).double()


def unrolled() -> nn.Module:
    A = fm.linear.Convolution(torch.ones(3, 3, **double) / 9, shape=(1, 8, 8))
    return fm.unroll(fm.algorithms.ForwardBackward(A, prior=fm.prox.L1(0.1)), depth=4).double()


NETWORKS = {
    "perceptron": (perceptron, (5,), "dense"),
    "circular": (circular, (1, 6, 6), "fourier"),
    "zero padded": (zero_padded, (1, 9, 9), "fourier"),
    "unrolled": (unrolled, None, "fourier"),
}


@pytest.fixture(scope="module", params=NETWORKS)
def proved(request):
    make, shape, basis = NETWORKS[request.param]
    net = make()
    certificate = certify(net, shape=shape, method="spectral", budget_s=10)
    assert certificate.basis.name == basis
    return net, certificate


def lowered(certificate: Certificate, factor: float) -> Certificate:
    changed = copy.copy(certificate)
    changed.upper = certificate.upper * factor
    return changed


def test_the_proof_holds_in_ball_arithmetic_and_not_below_the_bound(proved):
    net, certificate = proved
    assert verify(certificate, net, exact=True) is certificate
    prove_exactly(lowered(certificate, 1 + 1e-6), net)
    with pytest.raises(VerificationError, match="not certainly positive"):
        prove_exactly(lowered(certificate, 0.99), net)


def test_the_matrices_are_those_of_floating_point(proved):
    net, certificate = proved
    system = system_of(net, certificate.inputs, certificate.wrt)
    basis = make_basis(certificate.basis, system)
    blocked, _ = relaxed(system, basis)
    whole = Family(blocked, basis)
    whole.representatives = torch.arange(basis.blocks)
    shapes = pencil(whole.blocks(torch.zeros(1, dtype=torch.long)), certificate.per_channel)
    arithmetic = Balls(blocked, basis, shapes)
    for place, block in enumerate(Family(blocked, basis).representatives.tolist()[:5]):
        rows, output = arithmetic.rows(block)
        M = arithmetic.inequality(rows, output, arithmetic.arb(certificate.upper) ** 2, certificate.multipliers)
        part = pencil(Family(blocked, basis).blocks(torch.tensor([place])), certificate.per_channel)
        expected = part.matrix(certificate.upper**2, certificate.multipliers)[0]
        found = torch.tensor([[complex(z) for z in row] for row in M], dtype=torch.complex128)
        assert torch.allclose(found, expected.to(torch.complex128), rtol=1e-10, atol=1e-12)


def test_positive_definiteness_is_decided_beyond_double_precision():
    from flint import arb, ctx

    tiny = [[arb(1), arb(1)], [arb(1), arb(1) + arb(2) ** -80]]
    with ctx.workprec(128):
        assert positive_definite([[arb(1), arb(1)], [arb(1), arb(1) + arb(2) ** -80]])
        assert not positive_definite([[arb(1), arb(1)], [arb(1), arb(1) - arb(2) ** -80]])
    with ctx.workprec(53):
        assert not positive_definite(tiny)


def test_bounds_made_of_norms_have_nothing_to_prove():
    certificate = certify(perceptron(), shape=(5,), method="product")
    with pytest.raises(VerificationError, match="has no multipliers"):
        verify(certificate, perceptron(), exact=True)


def test_relaxed_maps_rest_on_floating_point_and_are_refused():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 9, 3), nn.ReLU())
    certificate = certify(net, shape=(1, 24, 24), method="spectral", budget_s=3)
    with pytest.raises(VerificationError, match="norms that only floating point"):
        verify(certificate, net, exact=True)


def test_without_flint_the_error_says_what_to_install(monkeypatch):
    net = perceptron()
    certificate = certify(net, shape=(5,), method="spectral")
    monkeypatch.setitem(sys.modules, "flint", None)
    with pytest.raises(SettingsError, match=r"firmly\[exact\]"):
        verify(certificate, net, exact=True)


def test_tampered_multipliers_are_refused():
    net = perceptron()
    certificate = certify(net, shape=(5,), method="spectral")
    certificate.multipliers = -certificate.multipliers
    with pytest.raises(VerificationError):
        prove_exactly(certificate, net)
    certificate.multipliers = certificate.multipliers[1:]
    with pytest.raises(VerificationError, match="do not fit"):
        prove_exactly(certificate, net)
