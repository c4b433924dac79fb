"""Every public loss of uncertain labels: laws, void pixels, two classes, volumes, both precisions, derivatives."""

from __future__ import annotations

import itertools

import pytest
import torch

import firmly.robust as fr

TRANSITION = {2: [[0.8, 0.2], [0.1, 0.9]], 4: (0.6 * torch.eye(4) + 0.1).tolist()}


def transition(logits):
    return torch.tensor(TRANSITION[logits.shape[1]], dtype=torch.float64)


def of_classes(loss):
    """The mean over valid pixels of a loss that is one of every class."""
    return lambda logits, labels, valid: fr.of_labels(loss(logits), labels)[valid].mean()


def with_average(logits, labels, valid):
    average = torch.full_like(logits, 1 / logits.shape[1])
    return (fr.of_labels(fr.cross_entropy(logits), labels) + fr.early_learning(logits, average))[valid].mean()


def of_people(logits, labels, valid):
    return fr.AnnotatorConfusion(2, logits.shape[1]).to(logits)(logits, torch.stack([labels, labels], 1))


LOSSES = {
    "cross_entropy": of_classes(fr.cross_entropy),
    "generalised_cross_entropy": of_classes(fr.generalised_cross_entropy),
    "mean_absolute_error": of_classes(fr.mean_absolute_error),
    "symmetric_cross_entropy": of_classes(fr.symmetric_cross_entropy),
    "active_passive": of_classes(fr.active_passive),
    "forward_correction": of_classes(lambda z: fr.forward_correction(z, transition(z))),
    "backward_correction": of_classes(lambda z: fr.backward_correction(fr.cross_entropy(z), transition(z))),
    "bi_tempered": of_classes(fr.bi_tempered),
    "early_learning": with_average,
    "pencil_loss": lambda z, y, valid: fr.pencil_loss(z, torch.zeros_like(z), y, beta=0.1)[valid].mean(),
    "label_risk": lambda z, y, valid: fr.label_risk(fr.cross_entropy(z), y, 0.1, mask=valid).risk.sum(),
    "risk": lambda z, y, valid: fr.risk(
        fr.of_labels(fr.cross_entropy(z), y), valid, divergence="chi2", radius=0.1, sense="inf"
    ),
    "co_trained": lambda z, y, valid: (
        fr.co_trained(*[fr.of_labels(fr.cross_entropy(z), y)] * 2, forget=0.1, mask=valid).first
    ),
    "normalised_dice": lambda z, y, valid: fr.normalised_dice(z, y),
    "TLoss": lambda z, y, valid: fr.TLoss().to(z)(z, y).sum(),
    "AnnotatorConfusion": of_people,
}
CASES = list(itertools.product((2, 4), ((7,), (4, 5), (2, 3, 4)), (torch.float32, torch.float64)))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("classes, shape, dtype", CASES, ids=str)
def test_loss(name, classes, shape, dtype):
    loss = LOSSES[name]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, classes, *shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (3, *shape), generator=generator)
    labels[:, 0] = 255
    valid = labels != 255
    x = logits.to(dtype).requires_grad_()
    value = loss(x, labels, valid)
    assert value.shape == () and value.dtype == dtype and bool(value.isfinite())
    (slope,) = torch.autograd.grad(value, x)
    assert slope.dtype == dtype and bool(slope.isfinite().all()) and bool((slope[:, :, 0] == 0).all())
    wild = torch.where(valid.unsqueeze(1), logits, 100 * logits).to(dtype)
    assert torch.equal(loss(wild, labels, valid), value), "void pixels are looked at"
    direction = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    ends = [loss(logits + step * direction, labels, valid) for step in (-1e-6, 1e-6)]
    derivative = float((slope * direction).sum())
    assert float((ends[1] - ends[0]).detach()) / 2e-6 == pytest.approx(
        derivative, abs=2e-5 if dtype == torch.float32 else 1e-7
    )

    one_hot = torch.nn.functional.one_hot(torch.where(valid, labels, 0), classes).movedim(-1, 1) * valid.unsqueeze(1)
    if name != "AnnotatorConfusion":  # people name classes
        same = loss(x.detach(), one_hot.to(dtype), valid)
        assert float(same.detach()) == pytest.approx(
            float(value.detach()), rel=1e-5 if dtype == torch.float32 else 1e-12
        )
        soft = 0.8 * one_hot + 0.2 / classes * valid.unsqueeze(1)
        between = loss(x, soft.to(dtype), valid)
        (slope,) = torch.autograd.grad(between, x)
        assert bool(between.isfinite()) and bool((slope[:, :, 0] == 0).all()) and bool((slope != 0).any())


def test_no_public_loss_is_forgotten():
    others = {"margin_loss", "plain_loss", "segpgd_loss", "LabelRisk"}  # of attacks; a result
    public = {name for name in fr.__all__ if name.lower().endswith(("loss", "entropy", "correction", "error", "risk"))}
    assert public - others <= set(LOSSES)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", LOSSES)
def test_on_the_gpu(name):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (2, 5, 6), generator=generator)
    labels[:, 0] = 255
    here = LOSSES[name](logits, labels, labels != 255)
    there = LOSSES[name](logits.cuda(), labels.cuda(), (labels != 255).cuda())
    assert there.is_cuda and torch.allclose(here, there.cpu(), rtol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_searches_and_smoothing_on_the_gpu():
    generator = torch.Generator().manual_seed(0)
    laws = torch.randn(2, 4, 5, 6, generator=generator).softmax(1)
    labels = torch.randint(0, 4, (2, 5, 6), generator=generator)
    for prune in ("both", "class", "noise-rate", "rank", "confusion"):
        found = fr.label_errors(laws.cuda(), labels.cuda(), prune)
        assert torch.equal(found.wrong.cpu(), fr.label_errors(laws, labels, prune).wrong)
    assert torch.allclose(fr.smoothed_labels(labels.cuda(), 4).cpu(), fr.smoothed_labels(labels, 4))
    adele = fr.Adele(4, started=[True] * 4)
    assert torch.equal(adele.corrected(laws.cuda(), labels.cuda()).cpu(), adele.corrected(laws, labels))
    X, y = torch.randn(30, 3, generator=generator).double(), labels.flatten()[:30].clamp(max=1).double() * 2 - 1
    for norm in ("l1", "l2", "linf"):
        here, there = (fr.wasserstein_logistic(X.to(d), y.to(d), 0.1, 1.0, norm) for d in ("cpu", "cuda"))
        assert torch.allclose(here.weight, there.weight.cpu(), atol=1e-6)
