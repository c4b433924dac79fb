"""Calibration without backpropagation: it lowers the error, keeps rules, and refuses what it cannot fit."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from firmly.errors import SettingsError
from firmly.networks import Selection, lista
from firmly.networks.calibration import calibrate, calibrate_hyper, nmse_db


def problem(m=30, n=60, batch=200):
    generator = torch.Generator().manual_seed(0)
    D = torch.randn(m, n, generator=generator, dtype=torch.float64)
    D = D / D.norm(dim=0)
    codes = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    codes = codes * (torch.rand(batch, n, generator=generator) < 0.05)
    return D, codes @ D.mT, codes


@pytest.mark.parametrize("variant", ["alista", "ti", "cp"])
def test_every_layer_is_nearer_to_the_truth(variant):
    D, y, truth = problem()
    net = lista(D, 4, variant, weight=0.1)
    before = nmse_db(net(y), truth)
    reached = calibrate(net, y, truth)
    assert all(b < a for a, b in pairwise(reached))
    assert reached[-1] < before - 1
    assert nmse_db(net(y), truth) == pytest.approx(reached[-1], abs=1e-9)


def test_selection_pays_and_its_continuous_form_costs_little():
    D, y, truth = problem(60, 120)
    reached = {}
    for name, selection in {"none": None, "hard": Selection(), "continuous": Selection(ramp=1.0)}.items():
        reached[name] = calibrate(lista(D, 8, "alista", weight=0.1, selection=selection), y, truth)[-1]
    assert reached["hard"] < reached["none"] - 5
    assert reached["continuous"] < reached["none"] - 5


def test_certified_steps_stay_in_their_interval():
    D, y, truth = problem()
    net = lista(D, 4, "alista", weight=0.1, selection=None, certified=True)
    calibrate(net, y, truth)
    assert all(condition.holds for layer in net.conditions() for condition in layer)


def test_three_constants_of_hyperlista():
    D, y, truth = problem(60, 120)
    net = lista(D, 8, "hyper")
    before = nmse_db(net(y), truth)
    value = calibrate_hyper(net, y, truth, starts=[(5e-3, 1e-3, 5.0)])
    assert value < before and nmse_db(net(y), truth) == pytest.approx(value, abs=1e-9)
    assert bool((net.shared.constants.c > 0).all())


def test_other_variants_are_refused():
    D, y, truth = problem()
    with pytest.raises(SettingsError, match="step and a threshold per layer"):
        calibrate(lista(D, 2, "step"), y, truth)
    with pytest.raises(SettingsError, match="variant 'hyper'"):
        calibrate_hyper(lista(D, 2, "alista"), y, truth)


def test_decibels():
    truth = torch.tensor([[3.0, 4.0]])
    assert nmse_db(truth * 1.1, truth) == pytest.approx(-20, abs=1e-4)
    assert math.isfinite(nmse_db(truth, truth))
