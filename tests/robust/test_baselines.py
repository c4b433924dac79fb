"""Baselines: estimated transitions, co-trained trimming, annotators' confusion, the normalised Dice loss."""

from __future__ import annotations

import pytest
import torch

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.robust import (
    AnnotatorConfusion,
    co_trained,
    cross_entropy,
    forward_correction,
    normalised_dice,
    of_labels,
    transition_from_anchors,
    transition_from_clean,
)

T = torch.tensor([[0.8, 0.2, 0.0], [0.1, 0.7, 0.2], [0.3, 0.0, 0.7]], dtype=torch.float64)


def laws(truth):
    """What a perfect model of noisy labels predicts."""
    return T[truth].movedim(-1, 1)


def test_transitions_of_a_perfect_model_are_exact():
    truth = torch.randint(0, 3, (2, 20, 20), generator=torch.Generator().manual_seed(0))
    clean = truth.clone()
    clean[0, :5] = 255
    torch.testing.assert_close(transition_from_clean(laws(truth), clean, prior=1e-9), T, atol=1e-9, rtol=0)
    torch.testing.assert_close(transition_from_anchors(laws(truth)), T, atol=1e-12, rtol=0)
    assert torch.equal(transition_from_clean(laws(truth), torch.full_like(truth, 255)), torch.eye(3).double())
    mask = clean != 255
    assert transition_from_anchors(laws(truth), mask=mask).shape == (3, 3)


def test_a_transition_found_recovers_the_clean_posterior():
    generator = torch.Generator().manual_seed(1)
    truth = torch.randint(0, 3, (1, 60, 60), generator=generator)
    noisy = torch.multinomial(T[truth.flatten()], 1, generator=generator).reshape(truth.shape)
    found = transition_from_clean(laws(truth), truth)
    logits = torch.zeros(1, 3, 60, 60, dtype=torch.float64)
    for k in range(3):
        logits[:, k] = torch.where(truth == k, 20.0, 0.0)
    right = of_labels(forward_correction(logits, found), noisy).mean()
    wrong = of_labels(forward_correction(logits.roll(1, 1), found), noisy).mean()
    assert right < wrong


def test_networks_trim_for_each_other():
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.rand(2, 6, 7, generator=generator, requires_grad=True) for _ in range(2))
    mask = torch.rand(2, 6, 7, generator=generator) > 0.2
    found = co_trained(first, second, 0.3, mask)
    count = int(mask.sum())
    kept = round(0.7 * count)
    assert int(found.trusted_by_first.sum()) == int(found.trusted_by_second.sum()) == kept
    assert not (found.trusted_by_first & ~mask).any()
    limit = first[mask].sort().values[kept - 1]
    assert torch.equal(found.trusted_by_first, mask & (first <= limit))
    torch.testing.assert_close(found.second, second[found.trusted_by_first].mean())
    found.first.backward()
    assert second.grad is None and first.grad is not None
    assert torch.equal(first.grad != 0, found.trusted_by_second)
    everything = co_trained(first, second, 0.0, mask)
    assert torch.equal(everything.trusted_by_first, mask)


def test_annotators_are_told_apart():
    generator = torch.Generator().manual_seed(3)
    truth = torch.randint(0, 3, (1, 50, 50), generator=generator)
    said = [torch.multinomial(A[truth.flatten()], 1, generator=generator).reshape(1, 50, 50) for A in (T, T.flip(0, 1))]
    annotations = torch.stack(said, 1)
    annotations[:, 0, :2] = 255
    logits = (12.0 * torch.nn.functional.one_hot(truth, 3).movedim(-1, 1)).double()
    model = AnnotatorConfusion(2, 3, trace_weight=0.0).double()
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = model(logits, annotations)
        loss.backward()
        return loss

    optimiser.step(closure)
    torch.testing.assert_close(model.matrices().detach(), torch.stack([T, T.flip(0, 1)]), atol=0.05, rtol=0)


def test_the_annotators_loss_is_its_formula():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    annotations = torch.randint(0, 3, (2, 2, 2, 2), generator=generator)
    annotations[0, 1, 0, 0] = 255
    model = AnnotatorConfusion(2, 3, trace_weight=0.5, sure=1.0).double()
    A, p = model.matrices(), logits.softmax(1)
    total, count = 0.0, 0
    for b, r, i, j in [(b, r, i, j) for b in range(2) for r in range(2) for i in range(2) for j in range(2)]:
        k = int(annotations[b, r, i, j])
        if k != 255:
            total, count = total - (p[b, :, i, j] * A[r, :, k]).sum().log(), count + 1
    expected = total / count + 0.5 * (A[0].trace() + A[1].trace()) / 2
    torch.testing.assert_close(model(logits, annotations), expected)
    model = AnnotatorConfusion(1, 3, trace_weight=0.0, sure=60.0).double()  # an annotator who is always right
    one = annotations[:, :1]
    torch.testing.assert_close(
        model(logits, one), of_labels(cross_entropy(logits), one[:, 0]).sum() / (one != 255).sum()
    )
    assert torch.autograd.gradcheck(lambda z: AnnotatorConfusion(2, 3).double()(z, annotations), logits)


def test_confusion_of_pixels_is_its_formula():
    generator = torch.Generator().manual_seed(6)
    network = torch.nn.Conv2d(1, 2 * 9, 1).double()
    model = AnnotatorConfusion(2, 3, trace_weight=0.5, sure=1.0, network=network).double()
    images = torch.randn(2, 1, 2, 3, generator=generator, dtype=torch.float64)
    logits = torch.randn(2, 3, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    annotations = torch.randint(0, 3, (2, 2, 2, 3), generator=generator)
    annotations[0, 1, 0, 0] = 255
    A, p = model.matrices(images), logits.softmax(1)
    torch.testing.assert_close(A.sum(3), torch.ones(2, 2, 3, 2, 3, dtype=torch.float64))
    total, traces, counts = 0.0, [0.0, 0.0], [0, 0]
    for b, r, i, j in [(b, r, i, j) for b in range(2) for r in range(2) for i in range(2) for j in range(3)]:
        k = int(annotations[b, r, i, j])
        if k != 255:
            total = total - (p[b, :, i, j] * A[b, r, :, k, i, j]).sum().log()
            traces[r], counts[r] = traces[r] + A[b, r, :, :, i, j].trace(), counts[r] + 1
    expected = total / sum(counts) + 0.5 * (traces[0] / counts[0] + traces[1] / counts[1]) / 2
    torch.testing.assert_close(model(logits, annotations, images), expected)
    assert torch.autograd.gradcheck(lambda z, x: model(z, annotations, x), (logits, images.requires_grad_()))
    torch.nn.init.zeros_(network.weight)  # a network that says the same everywhere: the confusion of all pixels
    torch.nn.init.zeros_(network.bias)
    torch.testing.assert_close(
        model(logits, annotations, images),
        AnnotatorConfusion(2, 3, trace_weight=0.5, sure=1.0).double()(logits, annotations),
    )
    with pytest.raises(SettingsError, match="exactly if"):
        model(logits, annotations)
    with pytest.raises(ShapeError, match="annotators of"):
        AnnotatorConfusion(3, 3, network=network).double()(logits, annotations.repeat(1, 2, 1, 1)[:, :3], images)


def test_annotators_who_err_in_one_half_are_found():
    generator = torch.Generator().manual_seed(7)
    truth = torch.randint(0, 2, (1, 40, 40), generator=generator)
    half = (torch.arange(40) < 20).double().expand(1, 1, 40, 40)
    flip = (torch.rand(1, 40, 40, generator=generator) < 0.4) & (half[:, 0] > 0)
    annotations = torch.stack([torch.where(flip, 1 - truth, truth), truth], 1)
    logits = (12.0 * torch.nn.functional.one_hot(truth, 2).movedim(-1, 1)).double()
    model = AnnotatorConfusion(2, 2, trace_weight=0.0, sure=2.0, network=torch.nn.Conv2d(1, 8, 1)).double()
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = model(logits, annotations, half)
        loss.backward()
        return loss

    optimiser.step(closure)
    right = model.matrices(half).detach().diagonal(dim1=2, dim2=3)[0].mean(-1)  # (annotator, height, width)
    assert right[0, :, :20].mean() == pytest.approx(0.6, abs=0.05) and right[0, :, 20:].min() > 0.99
    assert right[1].min() > 0.99


def test_normalised_dice():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 4), generator=generator)
    labels[0, 0] = 255
    p, valid = logits.softmax(1), labels != 255
    parts = []
    for k in range(3):
        g, q = (labels == k)[valid].double(), p[:, k][valid]
        parts.append(((q - g).abs() ** 1.5).sum() / (q.square().sum() + g.square().sum() + 1e-5))
    torch.testing.assert_close(normalised_dice(logits, labels), torch.stack(parts).mean())
    assert torch.autograd.gradcheck(lambda z: normalised_dice(z, labels), logits)
    logits.grad = None
    normalised_dice(logits, labels).backward()
    assert logits.grad is not None and (logits.grad[0, :, 0] == 0).all()


def test_refusals():
    losses = torch.rand(2, 3, 3)
    with pytest.raises(SettingsError, match="forget"):
        co_trained(losses, losses, 1.0)
    with pytest.raises(ShapeError, match="differ"):
        co_trained(losses, losses[:1], 0.1)
    with pytest.raises(ShapeError, match="valid pixel"):
        co_trained(losses, losses, 0.1, torch.zeros(2, 3, 3, dtype=torch.bool))
    with pytest.raises(ShapeError, match="annotations are"):
        AnnotatorConfusion(2, 3)(torch.rand(1, 3, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.long))
    with pytest.raises(SettingsError, match="annotator"):
        AnnotatorConfusion(0, 3)
    with pytest.raises(SettingsError, match="quantile"):
        transition_from_anchors(torch.rand(1, 3, 4, 4), 0.0)
    with pytest.raises(DataError, match="between"):
        transition_from_clean(torch.rand(1, 2, 4, 4).softmax(1), torch.full((1, 4, 4), 2))
    with pytest.raises(SettingsError, match="power"):
        normalised_dice(torch.rand(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long), 3.0)


@pytest.mark.parametrize("spoil", [lambda p: p * float("nan"), torch.log, lambda p: 2 * p])
def test_transitions_are_not_estimated_from_what_is_no_law(spoil):
    p = torch.full((1, 3, 2, 2), 1 / 3, dtype=torch.float64)
    with pytest.raises(DataError, match="softmax"):
        transition_from_clean(spoil(p), torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(DataError, match="softmax"):
        transition_from_anchors(spoil(p))
