"""Certificates as claims: what is proved holds in exact arithmetic, and what was tampered with is refused."""

from __future__ import annotations

import dataclasses
import json

import mpmath
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from firmly import certify, unroll, verify
from firmly.algorithms import ForwardBackward
from firmly.certificates import Certificate
from firmly.certificates.pencil import pencil
from firmly.certificates.representation import BasisChoice
from firmly.certificates.spectral import causal_multipliers, minimise_rho
from firmly.certificates.verify import certified_gain
from firmly.errors import FirmlyError, StorageError, VerificationError
from firmly.linear import Blur, Dense, FourierSampling
from firmly.prox import L1

from .systems import blocks_of, double, system_of
from .test_soundness import PIECEWISE, RandomNetwork, convolutional


def exact_required(family, mu) -> float:
    """sqrt of the smallest rho with M(rho, mu) >= 0, by 40-digit Cholesky and bisection on every block."""
    with mpmath.workdps(40):
        worst = mpmath.mpf(0)
        for b in range(len(family)):
            M = family.select(slice(b, b + 1)).matrix(0.0, mu)[0]
            base = mpmath.matrix([[mpmath.mpmathify(complex(x)) for x in row] for row in M.tolist()])
            n, inputs = base.rows, family.inputs

            def positive(rho, base=base, n=n, inputs=inputs):
                shifted = base.copy()
                for i in range(inputs):
                    shifted[i, i] += rho
                try:
                    mpmath.cholesky((shifted + shifted.H) / 2 + mpmath.eye(n) * mpmath.mpf(10) ** -35)
                except ValueError:
                    return False
                return True

            low, high = worst, max(worst, mpmath.mpf(1))
            if positive(low):
                continue
            while not positive(high):
                high *= 2
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (low, middle) if positive(middle) else (middle, high)
            worst = low
        return float(mpmath.sqrt(worst))


def test_no_verified_gain_is_below_the_exact_one():
    """With the multipliers of the search, on systems without symbol errors: only rounding is at stake."""
    for seed in range(12):
        net = RandomNetwork(seed, PIECEWISE, slopes=4)
        blocks = blocks_of(system_of(net, (net.size,)))
        family = pencil(blocks, True)
        if not family.multipliers:
            continue
        with torch.no_grad():
            mu = minimise_rho(family, 1e-9).mu
            for share in (0.0, 1e-6, 0.1):
                mixed = (1 - share) * mu + share * causal_multipliers(family)
                verified = certified_gain(blocks, mixed, True)
                if verified < float("inf"):
                    assert verified >= exact_required(family, mixed) * (1 - 1e-15)


def test_the_notes_case_where_a_solver_is_below_the_truth():
    """0.5 is the exact constant of S1; raw solver output is often below it by 1e-9."""
    system = system_of(nn.Sequential(Diagonal([1, 0.5]), nn.ReLU(), Diagonal([0.5, 1])), (2,))
    blocks = blocks_of(system)
    with torch.no_grad():
        found = minimise_rho(pencil(blocks, True), 1e-12)
        assert certified_gain(blocks, found.mu, True) >= 0.5


class Diagonal(nn.Linear):
    def __init__(self, entries):
        super().__init__(2, 2, bias=False)
        self.weight.data = torch.diag(torch.tensor(entries, **double))


def test_errors_of_symbols_enter_the_proof():
    """A block with errors is certified for every matrix within them: here 1 in 1000 more."""
    blocks = blocks_of(system_of(Dense(torch.tensor([[2.0]], **double)), (1,)))
    blocks.output.error = torch.tensor([0.002], **double)
    found = certified_gain(blocks, torch.zeros(0, **double), True)
    assert 2.002 <= found <= 2.02
    layered = blocks_of(system_of(nn.Sequential(Dense(torch.tensor([[2.0]], **double)), nn.ReLU()), (1,)))
    layered.rows[0].error = torch.tensor([0.002], **double)
    found = min(certified_gain(layered, torch.tensor([mu], **double), True) for mu in (1.5, 2.0, 2.5, 3.0))
    assert 2.002 <= found <= 2.02


@pytest.mark.parametrize("method", ["spectral", "lipsdp", "exact", "auto"])
def test_no_upper_end_below_the_truth_is_accepted_however_little(method):
    """The exact constant is 0.5, and what is reported is proved strictly."""
    net = nn.Sequential(Diagonal([1, 0.5]), nn.ReLU(), Diagonal([0.5, 1]))
    cert = certify(net, shape=(2,), method=method, tolerance=1e-9)
    assert 0.5 <= cert.upper and verify(cert, net)
    cert.upper = 0.5 * (1 - 1e-12)
    with pytest.raises(VerificationError, match="does not hold"):
        verify(cert, net)


# -- whole certificates --------------------------------------------------------------------------------------------


def dense_net(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.LeakyReLU(1.5), nn.Linear(3, 2)).to(dtype)


@pytest.fixture(scope="module")
def cert() -> Certificate:
    return certify(dense_net(), shape=(3,), method="spectral")


def test_a_certificate_verifies(cert, tmp_path):
    assert verify(cert, dense_net()) is cert
    path = cert.save(tmp_path / "folder" / "net.cert")
    loaded = verify(path, dense_net())
    assert (loaded.lower, loaded.upper, loaded.bounds) == (cert.lower, cert.upper, cert.bounds)
    assert torch.equal(loaded.multipliers, cert.multipliers)
    assert torch.equal(loaded.perturbation, cert.perturbation)
    assert loaded.basis == cert.basis
    assert loaded.inputs == cert.inputs
    assert str(loaded) == str(cert)
    assert not list(path.parent.glob(".*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_verifies_in_its_own_precision(dtype, tmp_path):
    net = dense_net(dtype)
    assert verify(certify(net, shape=(3,)).save(tmp_path / "a"), net)
    if dtype == torch.float32:
        assert verify(certify(net, shape=(3,)), net.double())  # the same numbers
    else:
        with torch.no_grad():
            net[0].weight.mul_(1 + 1e-12)
        cert = certify(net, shape=(3,))
        with pytest.raises(VerificationError, match="other weights"):
            verify(cert, net.float())  # rounded: other numbers


@pytest.mark.parametrize("method", ["product", "averaged", "spectral", "auto"])
@pytest.mark.parametrize("wrt", ["data", "start", "both"])
def test_every_method_and_input_verifies(method, wrt, tmp_path):
    net = unroll(ForwardBackward(Dense(torch.eye(3) + 0.3), L1(0.1)), 2)
    assert verify(certify(net, wrt=wrt, method=method).save(tmp_path / "a"), net)


def test_networks_in_fourier_and_in_norms_verify(tmp_path):
    net = unroll(ForwardBackward(Blur.gaussian(1.0, (1, 6, 6)), L1(0.1), step_size=1.5), 3)
    cert = certify(net)
    assert cert.basis.name == "fourier"
    assert verify(cert.save(tmp_path / "a"), net)
    padded = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 1, 3, padding=1))
    assert verify(certify(padded, shape=(1, 24, 24)).save(tmp_path / "b"), padded)
    skips = convolutional("dense skip", 0, torch.relu)
    assert verify(certify(skips, shape=(1, 5)).save(tmp_path / "c"), skips)


def test_other_weights_are_refused(cert):
    net = dense_net()
    with torch.no_grad():
        net[2].weight[0, 0] += 1e-9
    with pytest.raises(VerificationError, match="other weights"):
        verify(cert, net)


def test_the_same_weights_in_another_architecture_are_refused(cert):
    net = dense_net()
    for changed in (nn.LeakyReLU(2.0), nn.ReLU(), nn.Tanh(), nn.Identity(), nn.Softmax(-1)):
        net[3] = changed
        with pytest.raises(VerificationError):
            verify(cert, net)
    net[3] = nn.Hardshrink()
    with pytest.raises(VerificationError):
        verify(cert, net)


def test_other_numbers_that_are_no_parameters_are_refused():
    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.linear = Diagonal([1.0, 0.5])
            self.factor = factor

        def forward(self, x):
            return torch.relu(self.linear(x)) * self.factor

    cert = certify(Scaled(1.0), shape=(2,))
    with pytest.raises(VerificationError):
        verify(cert, Scaled(2.0))


TAMPERED = {
    "upper lowered": lambda c: {"upper": c.upper * (1 - 1e-3)},
    "upper lowered by little": lambda c: {"upper": c.upper * (1 - 1e-6), "multipliers": c.multipliers},
    "upper of zero": lambda c: {"upper": 0.0},
    "upper negative": lambda c: {"upper": -c.upper},
    "upper not a number": lambda c: {"upper": float("nan")},
    "upper a text": lambda c: {"upper": "small"},
    "lower raised": lambda c: {"lower": c.lower * 1.01},
    "lower not a number": lambda c: {"lower": float("nan")},
    "a multiplier changed": lambda c: {
        "multipliers": c.multipliers * torch.linspace(0.2, 3.0, len(c.multipliers), **double)
    },
    "a multiplier of zero": lambda c: {"multipliers": 0 * c.multipliers},
    "a negative multiplier": lambda c: {"multipliers": -c.multipliers},
    "a multiplier not a number": lambda c: {"multipliers": c.multipliers * float("nan")},
    "multipliers missing": lambda c: {"multipliers": None},
    "too few multipliers": lambda c: {"multipliers": c.multipliers[1:]},
    "no multipliers": lambda c: {"multipliers": c.multipliers[:0]},
    "claimed by another method": lambda c: {"method": "product", "multipliers": None},
    "claimed by an unknown method": lambda c: {"method": "magic", "multipliers": None},
    "pair changed": lambda c: {"perturbation": c.perturbation.flip(1)},
    "pair of another shape": lambda c: {"perturbation": torch.ones(1, 7, **double)},
    "pair of nothing": lambda c: {"perturbation": 0 * c.perturbation},
    "pair not a number": lambda c: {"perturbation": c.perturbation * float("nan")},
    "weights of another": lambda c: {"weights_hash": "0" * 64},
    "system of another": lambda c: {"system_hash": "0" * 64},
    "other basis": lambda c: {"basis": BasisChoice("norms")},
    "impossible basis": lambda c: {"basis": BasisChoice("fourier", (17,))},
    "operator out of range": lambda c: {"basis": BasisChoice("singular", (), 99)},
    "one multiplier per layer": lambda c: {"per_channel": False},
    "complex": lambda c: {"is_complex": True},
    "other input": lambda c: {"wrt": ("start",)},
    "other shape": lambda c: {"inputs": {"data": (4,)}},
    "no input": lambda c: {"inputs": {}},
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_certificate_is_refused(cert, name):
    with pytest.raises(VerificationError):
        verify(dataclasses.replace(cert, **TAMPERED[name](cert)), dense_net())


def test_a_complex_network_is_not_verified_as_a_real_one():
    mask = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) > 0.4
    net = unroll(ForwardBackward(FourierSampling(mask), L1(0.1)), 2)
    cert = certify(net)
    assert verify(cert, net)
    with pytest.raises(VerificationError):
        verify(dataclasses.replace(cert, is_complex=False), net)


# -- files ---------------------------------------------------------------------------------------------------------


def test_damaged_files_are_refused(cert, tmp_path):
    path = cert.save(tmp_path / "good")
    content = path.read_bytes()
    for size in (0, 1, 7, 8, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(VerificationError):
            verify(tmp_path / "cut", dense_net())
    (tmp_path / "noise").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "text").write_text("{}")
    for name in ("noise", "text"):
        with pytest.raises(VerificationError):
            Certificate.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Certificate.load(tmp_path / "nowhere")
    with pytest.raises(VerificationError):
        Certificate.load(tmp_path)


def test_no_flipped_byte_goes_unnoticed(cert, tmp_path):
    """A flipped byte makes a file that is refused, or one whose claims still hold."""
    content = bytearray(cert.save(tmp_path / "good").read_bytes())
    accepted = 0
    for place in range(0, len(content), max(1, len(content) // 150)):
        changed = bytearray(content)
        changed[place] ^= 0x11
        (tmp_path / "bad").write_bytes(changed)
        try:
            loaded = verify(tmp_path / "bad", dense_net())
        except (FirmlyError, UnicodeDecodeError):
            continue
        accepted += 1
        assert loaded.upper >= cert.upper * (1 - 1e-8)
        assert loaded.lower <= cert.lower * (1 + 1e-5)
    assert accepted < 100


def test_foreign_and_altered_files_are_refused(cert, tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(VerificationError):
        Certificate.load(tmp_path / "weights")
    path = cert.save(tmp_path / "good")
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["firmly"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    changes = [
        {"format": 99}, {"unknown": 1}, {"bounds": 3}, {"bounds": [{"method": "x"}]}, {"basis": {}}, {"wrt": None},
        {"inputs": []}, {"inputs": {"data": "abc"}},
    ]  # fmt: skip
    for change in changes:
        save_file(tensors, tmp_path / "bad", {"firmly": json.dumps({**facts, **change})})
        with pytest.raises(VerificationError):
            verify(tmp_path / "bad", dense_net())
    for text in ("[]", "3", '"text"', "null", "{}", "{"):
        save_file(tensors, tmp_path / "bad", {"firmly": text})
        with pytest.raises(VerificationError):
            Certificate.load(tmp_path / "bad")
    for name in ("point", "perturbation"):
        save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "bad", {"firmly": json.dumps(facts)})
        with pytest.raises(VerificationError):
            Certificate.load(tmp_path / "bad")


def test_a_failed_write_leaves_no_file(cert, tmp_path, monkeypatch):
    import os

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="the disk is full"):
        cert.save(tmp_path / "net")
    assert not list(tmp_path.iterdir())
