"""Losses for noisy labels: limits, published properties, derivatives, soft labels and void pixels."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn import functional as F

import firmly.robust as fr
from firmly.errors import DataError, SettingsError, ShapeError

f64 = torch.float64
K = 4
T = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0, 0.9, 0.1, 0], [0.2, 0, 0.8, 0], [0, 0, 0.3, 0.7]], dtype=f64)
LOSSES = {
    "cross-entropy": fr.cross_entropy,
    "generalised": fr.generalised_cross_entropy,
    "absolute": fr.mean_absolute_error,
    "symmetric": fr.symmetric_cross_entropy,
    "active passive": fr.active_passive,
    "forward": functools.partial(fr.forward_correction, transition=T),
    "backward": lambda logits: fr.backward_correction(fr.cross_entropy(logits), T),
    "bi-tempered": fr.bi_tempered,
    "bi-tempered, t2 = 1": functools.partial(fr.bi_tempered, t1=0.5, t2=1.0),
}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


LOGITS, LABELS = 2 * randn(2, K, 3, 3), (randn(2, 3, 3, seed=1).abs() * 3).long() % K


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_derivatives(loss):
    x = randn(2, K, 2).requires_grad_()
    assert gradcheck(loss, (x,)) and gradgradcheck(loss, (x,))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_labels_laws_and_void(loss):
    logits = LOGITS.clone().requires_grad_()
    every = loss(logits)
    laws = F.one_hot(LABELS, K).movedim(-1, 1).double()
    assert torch.equal(fr.of_labels(every, LABELS), fr.of_labels(every, laws))
    smooth = 0.9 * laws + 0.1 / K
    expected = 0.9 * fr.of_labels(every, LABELS) + 0.1 * every.mean(1)
    assert torch.allclose(fr.of_labels(every, smooth), expected)
    void = LABELS.clone()
    void[0] = 255
    found = fr.of_labels(every, void.to(torch.uint8))
    (slope,) = grad(found.sum(), logits)
    assert bool((found[0] == 0).all()) and bool((slope[0] == 0).all()) and bool((slope[1] != 0).any())


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_extreme_logits_are_finite(loss):
    logits = torch.tensor([[80.0, -80.0, 0.0, 3.0]], requires_grad=True)
    values = loss(logits)
    (slope,) = grad(values.sum(), logits)
    assert bool(values.isfinite().all()) and bool(slope.isfinite().all())


def test_cross_entropy_is_the_one_of_torch():
    assert torch.allclose(
        fr.of_labels(fr.cross_entropy(LOGITS), LABELS), F.cross_entropy(LOGITS, LABELS, reduction="none")
    )


def test_closed_forms():
    p = LOGITS.softmax(1)
    assert torch.allclose(fr.generalised_cross_entropy(LOGITS, 0.7), (1 - p**0.7) / 0.7)
    assert torch.allclose(fr.generalised_cross_entropy(LOGITS, 1e-9), -p.log(), atol=1e-6)
    one_hot = torch.eye(K, dtype=f64).reshape(1, K, K, 1, 1)
    assert torch.allclose(fr.mean_absolute_error(LOGITS), (p.unsqueeze(2) - one_hot).abs().sum(1))
    floor = torch.where(one_hot > 0, 0.0, -4.0)  # reverse cross-entropy -sum_k p_k log q_k, log 0 = -4
    reverse = -(p.unsqueeze(2) * floor).sum(1)
    assert torch.allclose(fr.symmetric_cross_entropy(LOGITS, 0.1, 1.0), -0.1 * p.log() + reverse)
    normalised = p.log() / p.log().sum(1, keepdim=True)
    assert torch.allclose(fr.active_passive(LOGITS, 2.0, 0.5), 2 * normalised + 0.5 * reverse)
    noisy = torch.einsum("bjhw,jk->bkhw", p, T)
    assert torch.allclose(fr.forward_correction(LOGITS, T), -noisy.log())


def test_a_label_that_no_class_has_costs_infinitely_and_spoils_no_gradient():
    transition = torch.tensor([[0.7, 0.3, 0.0], [0.2, 0.8, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    losses = fr.forward_correction(logits, transition)
    assert bool(losses[:, 2].isinf().all())
    labels = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]])
    (gradient,) = torch.autograd.grad(fr.of_labels(losses, labels).sum(), logits)
    noisy = torch.einsum("bjn,jk->bkn", logits.softmax(1), transition).gather(1, labels[:, None])
    (expected,) = torch.autograd.grad(-noisy.log().sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_uniform_noise_moves_no_minimiser_of_bounded_losses():
    for loss in (fr.mean_absolute_error(LOGITS), fr.active_passive(LOGITS)):
        total = loss.sum(1)
        assert float(total.max() - total.min()) < 1e-12


def test_backward_correction_is_unbiased():
    clean = fr.cross_entropy(LOGITS)
    corrected = fr.backward_correction(clean, T)
    assert torch.allclose(torch.einsum("jk,bkhw->bjhw", T, corrected), clean)


def test_bi_tempered():
    assert torch.allclose(fr.bi_tempered(LOGITS, 1.0, 1.0), fr.cross_entropy(LOGITS), atol=1e-12)
    assert torch.allclose(fr.bi_tempered(LOGITS, 1.0, 1.0 + 1e-7), fr.cross_entropy(LOGITS), atol=1e-5)
    for t in (1.05, 1.2, 1.7, 1.95):
        from firmly.robust.losses import tempered_logarithms

        p = tempered_logarithms(LOGITS, t).exp()
        assert float((p.sum(1) - 1).abs().max()) < 1e-12
    bounded = fr.bi_tempered(torch.tensor([[0.0, 1e6]], dtype=f64), 0.5, 1.3)
    assert float(bounded.max()) <= 1 / 0.5 + 1e-9
    # the Bregman divergence of log_t1 between e_y and p
    t1, p = 0.8, tempered_logarithms(LOGITS, 1.2).exp()
    log_t = (p ** (1 - t1) - 1) / (1 - t1)
    direct = -log_t - (1 - (p ** (2 - t1)).sum(1, keepdim=True)) / (2 - t1)
    assert torch.allclose(fr.bi_tempered(LOGITS, t1, 1.2), direct)


def test_early_learning():
    average = randn(2, K, 3, 3, seed=4).softmax(1)
    p = LOGITS.softmax(1)
    assert torch.allclose(fr.early_learning(LOGITS, average, 2.0), 2 * (1 - (p * average).sum(1)).log())
    assert math.isfinite(float(fr.early_learning(torch.tensor([[99.0, 0.0]]), torch.tensor([[1.0, 0.0]]))))


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda: fr.cross_entropy(LOGITS.long()), ShapeError),
        (lambda: fr.cross_entropy(LOGITS[0, 0, 0]), ShapeError),
        (lambda: fr.generalised_cross_entropy(LOGITS, 0.0), SettingsError),
        (lambda: fr.symmetric_cross_entropy(LOGITS, floor=1.0), SettingsError),
        (lambda: fr.active_passive(LOGITS, -1.0), SettingsError),
        (lambda: fr.bi_tempered(LOGITS, 1.2, 0.8), SettingsError),
        (lambda: fr.early_learning(LOGITS, LOGITS[:, :1]), ShapeError),
        (lambda: fr.early_learning(LOGITS, LOGITS, -1.0), SettingsError),
        (lambda: fr.forward_correction(LOGITS, T.T), DataError),
        (lambda: fr.forward_correction(LOGITS, T[:3]), ShapeError),
        (lambda: fr.backward_correction(LOGITS, torch.full((K, K), 0.25)), DataError),
        (lambda: fr.of_labels(LOGITS, LABELS + 3), DataError),
        (lambda: fr.of_labels(LOGITS, LABELS.double()), ShapeError),
        (lambda: fr.of_labels(LOGITS, LABELS[:, 0]), ShapeError),
        (lambda: fr.of_labels(LOGITS, -torch.ones_like(LOGITS)), DataError),
    ],
)
def test_bad_input_is_refused(call, error):
    with pytest.raises(error):
        call()


def test_early_learning_with_the_store_withstands_memorisation():
    """Many features and few pixels: cross-entropy learns wrong labels by heart, through crops and flips too."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 2, (4, 8, 8), generator=generator)
    wrong = torch.rand(truth.shape, generator=generator) < 0.35
    labels = torch.where(wrong, 1 - truth, truth)
    images = torch.randn(4, 250, 8, 8, generator=generator)
    images[:, 0] = 6.0 * (2 * truth - 1) + images[:, 0]
    views = [fr.View((0, 0), (8, 8), None, flips) for flips in ((), (0,), (1,), (0, 1))]

    def right(weight: float) -> float:
        model = torch.nn.Conv2d(250, 2, 1)
        torch.nn.init.zeros_(model.weight)
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        store = fr.LabelStore(labels, 2, momentum=0.7)
        for step in range(200):
            seen = [views[step % 4]] * 4
            logits = model(torch.stack([view.of_image(x) for view, x in zip(seen, images)]))
            given = torch.stack([view.of_labels(y) for view, y in zip(seen, labels)])
            store.update(range(4), logits.detach().softmax(1), seen)
            losses = fr.of_labels(fr.cross_entropy(logits), given)
            losses = losses + fr.early_learning(logits, store.average(range(4), seen), weight)
            optimiser.zero_grad()
            losses.mean().backward()
            optimiser.step()
        return float((model(images).argmax(1) == truth).double().mean())

    assert right(0.0) < 0.8 and right(3.0) > 0.95
