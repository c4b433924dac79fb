"""The loss of Student's distribution: SciPy's density, laws and void, derivatives, and images of wrong labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.robust import TLoss

f64 = torch.float64


def problem(classes=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, 3, 4, generator=generator, dtype=f64)
    return logits, torch.randint(0, classes, (2, 3, 4), generator=generator)


def test_it_is_the_density_of_students_distribution():
    logits, labels = problem()
    found = TLoss(3.0).double()(logits, labels)
    errors = (logits.softmax(1)[:, 1] - labels).reshape(2, 12).numpy()
    expected = [-scipy.stats.multivariate_t(np.zeros(12), np.eye(12), df=3.0).logpdf(e) / 12 for e in errors]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)  # log_nu is kept in single precision at first


@pytest.mark.parametrize("classes", [2, 4])
def test_laws_and_void(classes):
    logits, labels = problem(classes)
    labels[0, 1] = 255
    logits.requires_grad_()
    loss = TLoss().double()
    valid = labels != 255
    laws = torch.nn.functional.one_hot(torch.where(valid, labels, 0), classes).movedim(-1, 1) * valid[:, None]
    torch.testing.assert_close(loss(logits, labels), loss(logits, laws.double()))
    (slope,) = torch.autograd.grad(loss(logits, labels).sum(), logits)
    assert bool((slope[0, :, 1] == 0).all()) and bool((slope[1] != 0).all())
    cut = logits[:1, :, [0, 2]], labels[:1, [0, 2]]
    torch.testing.assert_close(loss(logits, labels)[:1], loss(*cut))
    nothing = torch.full_like(labels, 255)
    assert loss(logits, nothing).tolist() == [0.0, 0.0]
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits)
    assert torch.autograd.gradcheck(
        lambda nu: torch.func.functional_call(loss, {"log_nu": nu}, (logits.detach(), labels)),
        torch.tensor(0.3, dtype=f64, requires_grad=True),
    )


def test_images_of_wrong_labels_pull_less():
    truth = torch.arange(256).reshape(1, 16, 16) % 2
    logits = (3.0 * (2 * torch.nn.functional.one_hot(truth, 2).movedim(-1, 1) - 1)).double().repeat(2, 1, 1, 1)
    logits.requires_grad_()
    labels = torch.cat([truth, 1 - truth])
    (slope,) = torch.autograd.grad(TLoss().double()(logits, labels).sum(), logits)
    (plain,) = torch.autograd.grad((logits.softmax(1)[:, 1] - labels).square().sum(), logits)
    pull, of_squares = slope.abs().amax((1, 2, 3)), plain.abs().amax((1, 2, 3))
    assert pull[1] / pull[0] < 0.02 * of_squares[1] / of_squares[0]


def test_images_that_are_labelled_the_wrong_way_round_are_given_up():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 2, (20, 8, 8), generator=generator)
    images = (2.0 * truth - 1)[:, None] + 0.5 * torch.randn(20, 1, 8, 8, generator=generator)
    labels = truth.clone()
    labels[:7] = 1 - truth[:7]

    def sure(of, *parameters):
        model = torch.nn.Conv2d(1, 2, 1)
        torch.nn.init.zeros_(model.weight)
        model.weight.data[1] = 0.1
        optimiser = torch.optim.Adam([*model.parameters(), *parameters], 0.05)
        for _ in range(300):
            optimiser.zero_grad()
            of(model(images)).backward()
            optimiser.step()
        return float(model(images).detach().softmax(1).gather(1, truth[:, None]).mean())

    loss = TLoss()
    assert sure(lambda z: torch.nn.functional.cross_entropy(z, labels)) < 0.7  # it says as often as labels do
    assert sure(lambda z: loss(z, labels).mean(), *loss.parameters()) > 0.9


def test_bad_input_is_refused():
    logits, labels = problem()
    with pytest.raises(SettingsError, match="positive"):
        TLoss(0.0)
    with pytest.raises(ShapeError, match="do not fit"):
        TLoss()(logits, labels[:1])
    with pytest.raises(DataError, match="between 0 and 1"):
        TLoss()(logits, labels + 1)
    with pytest.raises(DataError, match="not negative"):
        TLoss()(logits, -torch.ones_like(logits))
    assert float(TLoss(math.e).log_nu.detach()) == 1.0
