"""Source localisation: inverses against closed forms, optimality of the sparse ones, the two-dipole problem."""

from __future__ import annotations

import math

import pytest
import torch

from firmly.data import leadfield_from_mne, meg_sample, vectorview
from firmly.errors import DataError, ShapeError
from firmly.lab.experiments.meg_problems import two_dipoles
from firmly.priors.sources import (
    GroupLista,
    MinimumNorm,
    SourceModel,
    gamma_map,
    localisation_error,
    mixed_norm,
    peaks,
    reweighted_mixed_norm,
    spatial_dispersion,
    whitener,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def small():
    return SourceModel(normal(12, 20, 2), depth=0.5)


@pytest.fixture(scope="module")
def head():
    leadfield = vectorview()
    return SourceModel(leadfield.gain), leadfield.positions


def test_the_leadfield_is_as_coherent_as_the_notes_say(head):
    gain = head[0].gain[:, :, 0]
    columns = gain / gain.norm(dim=0)
    alike = (columns.mT @ columns).abs().fill_diagonal_(0)
    assert gain.shape == (306, 609)
    assert float(alike.max()) == pytest.approx(0.9972, abs=2e-4)
    assert float(alike.amax(0).median()) == pytest.approx(0.952, abs=2e-3)
    assert float(torch.linalg.matrix_norm(columns, 2)) ** 2 == pytest.approx(117.7, abs=0.1)


def test_scales_follow_the_depth_and_the_trace(small):
    size = small.gain.norm(dim=(0, 2))
    ratio = small.scale * size**0.5
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-12)
    assert float(small.weighted.square().sum()) == pytest.approx(12, rel=1e-12)


def test_a_whitener_whitens_and_drops_what_has_no_noise():
    root = normal(8, 5)
    covariance = root @ root.mT
    white = whitener(covariance)
    assert white.shape == (5, 8)
    torch.testing.assert_close(white @ covariance @ white.mT, torch.eye(5).double(), rtol=0, atol=1e-9)
    with pytest.raises(DataError, match="not positive semidefinite"):
        whitener(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(DataError, match="positive diagonal"):
        whitener(torch.zeros(2, 2))


@pytest.mark.parametrize("normalisation", ["none", "dspm", "sloreta"])
def test_linear_inverses_equal_their_formulas(small, normalisation):
    R = torch.diag(small.scale.repeat_interleave(2) ** 2)
    G = small.matrix
    C = G @ R @ G.mT + torch.eye(12).double() / 9
    K = R @ G.mT @ torch.linalg.inv(C)
    seen = {"none": None, "dspm": K @ K.mT, "sloreta": K @ C @ K.mT}[normalisation]
    if seen is not None:
        K = K / seen.diagonal().reshape(20, 2).sum(1).sqrt().repeat_interleave(2)[:, None]
    inverse = MinimumNorm(small, normalisation)
    torch.testing.assert_close(inverse.matrix, K, rtol=1e-9, atol=1e-12)
    norm = inverse.norm()
    assert norm.lower <= float(torch.linalg.matrix_norm(K, 2)) <= norm.upper


def test_sloreta_has_no_error_for_one_source_without_noise(head):
    model, positions = head
    inverse = MinimumNorm(model, "sloreta")
    for source in (0, 200, 608):
        field = (model.gain[:, source] @ torch.tensor([0.6, -0.8]).double())[None, None]
        strength = model.strength(inverse(field))[0]
        assert float(localisation_error(strength, positions, torch.tensor([source]))[0]) == 0


@pytest.mark.parametrize("orientations", [1, 2])
def test_mixed_norm_satisfies_its_optimality_conditions(orientations):
    model = SourceModel(normal(12, 20, orientations), depth=0.3)
    data = normal(3, 5, 12, seed=1)
    for window, estimate in zip(data, mixed_norm(model, data, alpha=50, tol=1e-12, debias=False)):
        G, Y = model.weighted.unflatten(1, (20, orientations)), window.mT
        X = (estimate.courses / model.scale[:, None]).permute(1, 2, 0)
        pull = torch.einsum("mno,mt->not", G, Y - torch.einsum("mno,not->mt", G, X))
        penalty = 0.5 * float(torch.einsum("mno,mt->not", G, Y).norm(dim=(1, 2)).max())
        size = X.norm(dim=(1, 2))
        assert 1 <= len(estimate.active) < 20
        on = size > 0
        wanted = penalty * X[on] / size[on, None, None]
        torch.testing.assert_close(pull[on], wanted, rtol=0, atol=1e-5 * penalty)
        assert float(pull[~on].norm(dim=(1, 2)).max()) <= penalty * (1 + 1e-6)
        assert "within the tolerance" in estimate.status and estimate.gap <= 1e-12


def test_debiasing_is_least_squares_on_the_active_sources(small):
    data = normal(1, 4, 12, seed=2)
    estimate = mixed_norm(small, data, alpha=60)[0]
    columns = small.gain[:, estimate.active].flatten(1)
    fit = torch.linalg.lstsq(columns, data[0].mT).solution
    torch.testing.assert_close(estimate.courses[:, estimate.active].flatten(1).mT, fit, rtol=1e-6, atol=1e-9)


def test_gamma_map_of_one_source_has_a_closed_form():
    gain, data = normal(7, 1, 1), 3 * normal(1, 9, 7, seed=3)
    model = SourceModel(gain, depth=0.0)
    g = model.weighted[:, 0]
    power, seen = g.square().sum(), (data[0] @ g).square().sum() / 9
    gamma = (seen - 0.5 * power) / power**2  # the maximiser of the evidence for noise of variance 0.5
    assert float(gamma) > 0
    course = gamma * (data[0] @ g) / (0.5 + gamma * power) * model.scale
    estimate = gamma_map(model, data, noise=0.5, tol=1e-13, max_iterations=10_000)[0]
    torch.testing.assert_close(estimate.courses[:, 0, 0], course, rtol=1e-6, atol=0)


def test_gamma_map_prunes(small):
    few = gamma_map(small, normal(1, 6, 12, seed=3), tol=1e-8)[0]
    assert 0 < len(few.active) < 20 and "active sources" in few.status


def test_two_dipoles_are_found(head):
    model, positions = head
    errors, counts = [], []
    for seed in range(3):
        truth, data = two_dipoles(model, positions, seed)
        estimate = reweighted_mixed_norm(model, data)[0]
        errors.append(localisation_error(estimate.strength(), positions, truth))
        counts.append(len(estimate.active))
    assert float(torch.cat(errors).mean()) <= 4e-3
    assert counts == [2, 2, 2]


def test_group_lista_is_forward_backward_and_knows_its_input(small):
    network = GroupLista(small, times=6, depth=2, components=6, threshold=1e-3)
    y = normal(2, 6, 12, seed=4)
    P = network.balance @ small.weighted
    z = network.cosines @ y @ network.balance
    layer = network.unrolled.layers[0]
    x = torch.zeros(2, 6, 40).double()
    for layer in network.unrolled.layers:
        t = layer.step_size
        x = layer.prior.prox(x - t * (x @ P.mT - z) @ P, t)
    torch.testing.assert_close(network(y), x * small.scale.repeat_interleave(2), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(network.cosines @ network.cosines.mT, torch.eye(6).double(), rtol=0, atol=1e-12)


def test_peaks_keep_their_distance():
    positions = torch.tensor([[0.0, 0, 0], [0.01, 0, 0], [0.05, 0, 0]])
    assert peaks(torch.tensor([3.0, 2.0, 1.0]), positions).tolist() == [0, 2]
    assert peaks(torch.tensor([3.0, 2.0, 0.0]), positions).tolist() == [0]
    assert spatial_dispersion(torch.tensor([1.0, 0.0, 1.0]), positions, torch.tensor([0])) == pytest.approx(
        0.05 / math.sqrt(2)
    )
    with pytest.raises(DataError, match="no peaks"):
        localisation_error(torch.zeros(3), positions, torch.tensor([0]))


def test_what_cannot_be_used_is_refused(small):
    with pytest.raises(ShapeError, match="sensors"):
        mixed_norm(small, normal(1, 4, 11))
    with pytest.raises(DataError, match="percentage"):
        mixed_norm(small, normal(1, 4, 12), alpha=100.0)
    with pytest.raises(DataError, match="not finite"):
        MinimumNorm(small)(torch.full((1, 4, 12), math.nan))
    with pytest.raises(DataError, match="no field"):
        SourceModel(torch.zeros(3, 2))
    with pytest.raises(DataError, match="normalisation"):
        MinimumNorm(small, "loreta")  # type: ignore[arg-type]


def test_silence_has_no_sources(small):
    estimate = mixed_norm(small, torch.zeros(1, 4, 12))[0]
    assert len(estimate.active) == 0 and float(estimate.courses.abs().max()) == 0


@pytest.mark.parametrize("directions", [1, 3])
def test_forward_solutions_of_mne_are_read(directions):
    field, places = normal(5, 4 * directions), normal(4, 3)
    forward = {"sol": {"data": field.numpy()}, "source_rr": places.numpy(), "nsource": 4}
    leadfield = leadfield_from_mne(forward)
    assert leadfield.gain.shape == (5, 4, directions)
    torch.testing.assert_close(leadfield.gain.flatten(1), 1e-9 * field)
    with pytest.raises(DataError, match="three times as many"):
        leadfield_from_mne({**forward, "sol": {"data": field[:, :-1].numpy()}})


def test_the_recording_is_whole():
    recording = meg_sample()
    assert recording.evoked.shape == (4, len(recording.times), 306)
    white = whitener(recording.covariance)
    assert white.shape == (303, 306)
    before = recording.evoked[0, recording.times < 0] @ white.mT * math.sqrt(int(recording.averages[0]))
    assert 0.5 < float(before.std()) < 2.0
