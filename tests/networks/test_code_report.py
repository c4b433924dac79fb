"""Reports of every layer, the losses of sparse coding, and layer-wise training."""

from __future__ import annotations

import pytest
import torch

from firmly.errors import SettingsError
from firmly.networks import lista, nmse_db
from firmly.networks.code_report import lasso_loss, layer_reports, log_error, support_error
from firmly.networks.layerwise import train_layerwise
from firmly.priors import lasso


def problem(m=20, n=30, batch=50):
    generator = torch.Generator().manual_seed(0)
    D = torch.randn(m, n, generator=generator, dtype=torch.float64)
    D = D / D.norm(dim=0)
    codes = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    codes = codes * (torch.rand(batch, n, generator=generator) < 0.1)
    return D, codes @ D.mT, codes


def test_reports_of_ista_against_the_solver():
    D, y, _ = problem()
    solution = lasso(D, y, 0.1, tol=1e-12)
    net = lista(D, 40, "step", weight=0.1)
    reports = layer_reports(net, y, solution.code, 0.1)
    assert len(reports) == 40
    for code, report in zip(net.codes(y), reports):
        true_gap = float((lasso_loss(net.shared.D, y, code, 0.1) - solution.objective.mean()).detach())
        assert report.gap >= true_gap - 1e-12
        assert report.nmse == pytest.approx(nmse_db(code, solution.code))
    assert reports[-1].to_fixed_point < reports[0].to_fixed_point
    assert reports[-1].nmse == pytest.approx(20 * torch.log10(torch.tensor(reports[-1].to_fixed_point)).item(), abs=1.0)


def test_support_error_counts_wrong_entries():
    truth = torch.tensor([[1.0, 0.0, 2.0, 0.0]])
    assert support_error(truth, truth) == 0
    assert support_error(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), truth) == 1


def test_log_error_is_the_mean_over_the_last_layers():
    D, y, truth = problem()
    codes = lista(D, 3, "step").codes(y)
    wanted = sum(torch.log((c - truth).square().sum() / truth.square().sum()) for c in codes[-2:]) / 2
    torch.testing.assert_close(log_error(codes, truth, 2), wanted)
    with pytest.raises(SettingsError, match="the depth"):
        log_error(codes, truth, 4)


@pytest.mark.parametrize("variant", ["ti", "cp", "step"])
def test_layer_wise_training_lowers_the_error_of_every_layer(variant):
    D, y, truth = problem()
    net = lista(D, 3, variant, weight=0.1)
    before = [nmse_db(code, truth) for code in net.codes(y)]
    heard = []
    train_layerwise(net, lambda g: (y, truth), steps=40, rate=2e-2, callback=lambda k, loss: heard.append(k))
    after = [nmse_db(code, truth) for code in net.codes(y)]
    assert heard == [0, 1, 2]
    assert after[-1] < before[-1] and after[-1] < after[0]


def test_training_without_steps_is_refused():
    D, y, truth = problem()
    with pytest.raises(SettingsError, match="steps is at least 1"):
        train_layerwise(lista(D, 2, "step"), lambda g: (y, truth), steps=0)
