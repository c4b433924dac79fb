"""Training and repair inside a stability budget."""

import math

import pytest
import torch

from firmly.certificates import certify
from firmly.errors import NotCertifiable
from firmly.lab.budget import BudgetPenalty, repair
from firmly.lab.experiments import find
from firmly.lab.weights import learned


def network():
    experiment = find("deblur")
    settings = experiment.presets["smoke"]
    torch.manual_seed(0)
    return experiment.network(settings, 32, settings.cap)


def test_penalty_is_zero_inside_the_budget_and_points_inwards_outside():
    net = network()
    upper = certify(net, method="spectral").upper
    assert BudgetPenalty(2 * upper)(net, 0).item() == 0
    penalty = BudgetPenalty(upper / 2, weight=1.0)
    value = penalty(net, 0)
    assert abs(value.item() - 3 * math.log(2 / 0.97)) < 3e-2 and penalty(net, 1) == 0
    value.backward()
    with torch.no_grad():
        for p in (p for p in net.parameters() if p.grad is not None):  # thresholds do not enter the bound
            p -= 1e-3 * p.grad / max(float(p.grad.norm()), 1e-12)
    assert certify(net, method="spectral").upper < upper


def test_repair_ends_with_a_proof_within_the_budget():
    net = network()
    budget = 0.8 * certify(net, method="spectral").upper
    before = {k: v.clone() for k, v in learned(net).items()}
    certificate = repair(net, budget)
    assert 0.9 * budget < certificate.upper <= budget
    moved = max(float((v - before[k]).abs().max()) for k, v in learned(net).items())
    assert 0 < moved < 1


def test_repair_says_when_a_budget_is_out_of_reach():
    with pytest.raises(NotCertifiable, match=r"below the budget of 0\.001"):
        repair(network(), 1e-3, max_steps=3)
