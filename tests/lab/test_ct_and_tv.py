"""What the studies of tomography and of total variation measure; that they run is in test_studies.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import firmly as fm
from firmly.errors import SettingsError
from firmly.lab.experiments.ct import CtSettings, forward_backward
from firmly.lab.experiments.ct_problem import Phantoms, measured, problem, unused_error
from firmly.lab.experiments.tv import TvSettings, snr
from firmly.lab.experiments.tv_problem import heartbeat, iterated, jumps
from firmly.lab.metrics import psnr
from firmly.networks.learned_tv import largest_tv_weight, tv_objective


def test_the_tooth_from_few_views():
    p = problem(48, 6)
    assert p.data.shape == (2, 1, 30, 48) and p.unused_data.shape == (2, 1, 151, 48)
    assert 0.9 < float(torch.quantile(p.reference.flatten(), 0.999)) < 1.1
    # filtered back projection of the used views resembles that of all, and explains views that it has not seen
    back = p.B.T(p.weighted)
    assert float(psnr(back, p.reference).min()) > 18
    assert unused_error(p, p.reference) < 0.9 * unused_error(p, back) < 0.2
    upside_down = p.B.T(p.B.weighted(p.data.flip(-1)))
    assert unused_error(p, upside_down) > 2 * unused_error(p, back)


def test_phantoms_and_their_data():
    p = problem(32, 12)
    objects = [Phantoms(32, "train").batch(3, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(objects[0], objects[1]) and not torch.equal(objects[0], objects[2])
    assert float(objects[0].min()) == 0 and 0.5 < float(objects[0].max()) < 1.2
    generator = torch.Generator().manual_seed(0)
    clean = measured(p.B, objects[0], 0.0, generator)
    torch.testing.assert_close(clean, p.B(objects[0]))
    noise = measured(p.B, objects[0], 1.0, generator) - clean
    expected = (p.B.codomain[1] * p.B.root.square().sum()).sqrt()
    assert abs(float(noise.flatten(1).norm(dim=1).mean() / expected) - 1) < 0.1


def test_the_certificate_of_the_network_verifies_and_holds(tmp_path, monkeypatch):
    """By intervals of singular values, as at full size, where the norm of the scanner comes from its rays."""
    monkeypatch.setattr("firmly.linear.norms.SMALL_SIDE", 100)
    p = problem(32, 20)
    net = forward_backward(replace(CtSettings(), depth=2, filters=4, filter_size=3), p.B, 1.0)
    certificate = fm.certify(net, budget_s=5)
    assert certificate.basis.name == "singular"
    certificate.save(tmp_path / "ct")
    fm.verify(tmp_path / "ct", net)
    pairs = torch.randn(2, 100, *p.B.codomain, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        moved = (net(pairs[0]) - net(pairs[1])).flatten(1).norm(dim=1) / (pairs[0] - pairs[1]).flatten(1).norm(dim=1)
    assert float(moved.max()) <= certificate.upper < 2 * certificate.lower


def test_jumps_have_the_setting_of_the_paper():
    p = jumps(8, 5, 20, 0.1, seed=0)
    torch.testing.assert_close(p.A.weight.norm(dim=0), torch.ones(8, dtype=torch.float64))
    assert abs(p.A.norm().upper ** 2 - 2.818) < 1e-3
    torch.testing.assert_close(largest_tv_weight(p.A, p.test), torch.ones(20, dtype=torch.float64))
    nearby = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert bool((tv_objective(p.A, 0.1, nearby, p.test) >= p.best_test).all())


def test_heartbeat():
    p = heartbeat(32, 10, 0.0, seed=0)
    assert p.truth.shape == p.test_truth.shape == (10, 32) and p.data.shape == (10, 15)
    torch.testing.assert_close(p.data, p.truth.unfold(1, 4, 2).mean(-1))
    again = heartbeat(32, 10, 0.05, seed=0)
    assert 0.03 < float((again.data - p.data).std()) < 0.07
    assert snr(p.truth, p.truth + 1e-9) > 100


def test_iterations_are_all_kept():
    from firmly.algorithms import ForwardBackward
    from firmly.prox import TV1D

    p = jumps(6, 4, 5, 0.1, seed=1)
    found = iterated(ForwardBackward(p.A, TV1D(0.1)), p.test, 4)
    assert len(found) == 4 and not torch.equal(found[2], found[3])


def test_settings_are_checked():
    for wrong in ({"size": 8}, {"every": 0}, {"tv_weights": ()}, {"attack": 0.0}):
        with pytest.raises(SettingsError):
            CtSettings(**wrong)
    for wrong in ({"n": 1}, {"depths": (5, 2)}, {"certified_depth": 3}, {"noise": 0.0}, {"window": 4}):
        with pytest.raises(SettingsError):
            TvSettings(**wrong)
