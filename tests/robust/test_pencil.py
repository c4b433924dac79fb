"""PENCIL: the fixed point of the labels, its distance from the released code, the store through augmentations."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import grad

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.prox import TV, Zero
from firmly.robust import LabelStore, View, label_logits, label_step, pencil_loss, smooth_label_step

f64 = torch.float64


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


def ten_classes() -> torch.Tensor:
    p = torch.full((1, 10, 1), 0.4 / 9, dtype=f64)
    p[0, 3] = 0.6
    return p


@pytest.mark.parametrize(
    "alpha, expected, flips", [(0.05, 0.362963, True), (0.1, 0.522222, False), (0.4, 0.808889, False)]
)
def test_the_fixed_point_of_the_labels(alpha, expected, flips):
    p, y = ten_classes(), torch.tensor([[0]])
    d = label_step(p, y, kappa=10 * alpha)
    assert d[0, 0].item() == pytest.approx(expected, abs=1e-6)
    assert (d.argmax(1).item() == 3) is flips
    # minimisation of the loss itself arrives there
    states = label_logits(y, 10).double().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [states], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = pencil_loss(p.log(), states, y, kappa=10 * alpha).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert float((states.detach().softmax(1) - d).abs().max()) < 2e-8


@pytest.mark.parametrize("alpha, expected", [(0.05, 0.0845), (0.1, 0.2164), (0.4, 0.7426)])
def test_the_released_double_softmax_is_another_loss(alpha, expected):
    p, states = ten_classes()[0, :, 0], torch.zeros(10, dtype=f64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [states], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        d = states.softmax(0)
        loss = (p * (p.log() - d.log())).sum() - 10 * alpha * d.log_softmax(0)[0]
        loss.backward()
        return loss

    optimiser.step(closure)
    assert states.softmax(0)[0].item() == pytest.approx(expected, abs=5e-5)


def test_the_loss_of_the_paper():
    logits, states, labels = randn(3, 5, 7), randn(3, 5, 7, seed=1), torch.arange(21).reshape(3, 7) % 5
    p, d = logits.softmax(1), states.softmax(1)
    kl = (p * (p / d).log()).sum(1)
    compatible = -d.gather(1, labels.unsqueeze(1)).squeeze(1).log()
    entropy = -(p * p.log()).sum(1)
    assert torch.allclose(pencil_loss(logits, states, labels, 2.0, 0.3), kl + 2 * compatible + 0.3 * entropy)


def test_void_pixels():
    logits, states = randn(1, 3, 4).requires_grad_(), randn(1, 3, 4, seed=1).requires_grad_()
    labels = torch.tensor([[0, 255, 2, 255]], dtype=torch.uint8)
    loss = pencil_loss(logits, states, labels, 1.0, 0.1)
    slopes = grad(loss.sum(), (logits, states))
    assert all(bool((slope[..., 1::2] == 0).all()) for slope in slopes) and bool((loss[:, 1::2] == 0).all())
    p = logits.detach().softmax(1)
    assert torch.equal(label_step(p, labels)[..., 1::2], p[..., 1::2])
    assert bool((label_logits(labels, 3)[..., 1::2] == 0).all())


def test_kappa_is_the_margin_of_a_flip():
    p = randn(1, 4, 1000).mul(2).softmax(1)
    labels = torch.arange(1000).reshape(1, 1000) % 4
    for kappa in (0.1, 0.5, 1.0):
        flipped = label_step(p, labels, kappa).argmax(1) != labels
        margin = p.amax(1) - p.gather(1, labels.unsqueeze(1)).squeeze(1)
        assert torch.equal(flipped, margin > kappa)


def test_proximal_steps_end_at_the_closed_form_and_with_a_prior_at_smoother_maps():
    p, labels = randn(1, 3, 8, 8).softmax(1), (randn(1, 8, 8, seed=2).abs() * 2).long() % 3
    states = label_logits(labels, 3, strength=1.0).double()
    smooth, prior = label_step(p, labels, 0.5).log(), TV(0.2, accuracy=1e-3)
    for _ in range(400):
        states = smooth_label_step(states, p, labels, Zero(), kappa=0.5, step_size=2.5)
    for _ in range(10):
        smooth = smooth_label_step(smooth, p, labels, prior, kappa=0.5, step_size=2.5)
    assert float((states.softmax(1) - label_step(p, labels, 0.5)).abs().max()) < 1e-6
    assert float(TV().value(smooth.softmax(1))) < 0.5 * float(TV().value(states.softmax(1)))

    def objective(s):
        return float(pencil_loss(p.log(), s, labels, 0.5).sum() + prior.value(s))

    best = objective(smooth)
    for seed in range(5):
        assert objective(smooth + 1e-2 * randn(*smooth.shape, seed=seed)) > best


def test_on_void_labels_follow_predictions_alone():
    p, labels = randn(1, 3, 4, 4).softmax(1), torch.full((1, 4, 4), 255)
    labels[0, :2] = 1
    states = label_logits(labels, 3, strength=1.0).double()
    for _ in range(400):
        states = smooth_label_step(states, p, labels, Zero(), kappa=0.5, step_size=2.5)
    assert float((states.softmax(1) - label_step(p, labels, 0.5)).abs().max()) < 1e-6
    assert float((states.softmax(1) - p)[:, :, 2:].abs().max()) < 1e-6


VIEWS = [
    View(corner, extent, size, flips)
    for corner, extent in (((0, 0), (12, 16)), ((2, 3), (8, 10)))
    for size in (None, tuple(2 * e for e in extent), tuple(e // 2 for e in extent))
    for flips in ((), (0,), (1,), (0, 1))
]


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_views_are_undone(view):
    image = torch.linspace(0, 1, 12, dtype=f64)[:, None] + torch.linspace(0, 3, 16, dtype=f64)
    image = torch.stack([image, 1 - image])
    seen = view.of_image(image)
    assert tuple(seen.shape[1:]) == (view.size or view.extent)
    back = view.back(seen)
    inner = (slice(None), slice(2, -2), slice(2, -2))  # linear interpolation is exact on planes, away from the border
    assert torch.allclose(back[inner], view.crop(image)[inner], atol=1e-12)
    labels = (image[0] > 2).to(torch.uint8)
    assert view.of_labels(labels).dtype == torch.uint8
    plain = torch.stack([labels, 1 - labels]).double()
    assert bool((view.of_labels(labels) == view.of_image(plain).argmin(0)).double().mean() > 0.85)


def test_the_store_follows_augmentations():
    K, side = 6, 16
    truth = (torch.arange(side)[:, None] // 4 + torch.arange(side) // 8) % K
    truth = torch.stack([truth, truth.flip(0), truth.flip(1)])
    labels = truth.clone()
    labels[:, 5, :] = 0  # wrong labels
    labels[:, 0, 0] = 255
    store = LabelStore(labels, K, momentum=0.5, kept=2)
    assert store.bytes_per_pixel == 7
    assert torch.equal(store.labels([0], kappa=1.0)[0].argmax(0)[1:], labels[0][1:])  # nothing was predicted yet
    laws = 0.9 * torch.nn.functional.one_hot(truth, K).movedim(-1, 1) + 0.1 / K
    corners, flips = itertools.product((0, 4), (0, 4)), ((), (0,), (1,), (0, 1))
    views = [View(corner, (12, 12), None, flip) for corner in corners for flip in flips]
    for view in views:
        predictions = torch.stack([view.of_image(law.double()) for law in laws])
        store.update([0, 1, 2], predictions, [view] * 3)
    assert torch.allclose(store.average([1]), laws[[1]].float(), atol=2e-3)
    believed = store.labels([0, 1, 2], kappa=0.3).argmax(1)
    assert torch.equal(believed, truth)
    kept = store.labels([0, 1, 2], kappa=1.5).argmax(1)
    assert torch.equal(kept[:, 1:], labels[:, 1:])
    view = View((2, 3), (8, 8), (16, 16), (1,))
    assert store.labels([2], [view]).shape == (1, K, 16, 16)
    assert torch.allclose(store.labels([2], [view]).sum(1), torch.ones(1, 16, 16), atol=1e-5)
    copy = LabelStore(labels, K, momentum=0.5, kept=2)
    copy.load_state_dict(store.state_dict())
    assert torch.equal(copy.average([0]), store.average([0]))


def test_means_of_many_classes_lose_little():
    K = 40
    store, exact = LabelStore(torch.zeros(1, 20, 20, dtype=torch.long), K), None
    whole = LabelStore(torch.zeros(1, 20, 20, dtype=torch.long), K, kept=K)
    for visit in range(30):
        p = (4 * randn(1, K, 20, 20, seed=1) + randn(1, K, 20, 20, seed=visit)).softmax(1)
        exact = p if exact is None else 0.9 * exact + 0.1 * p
        store.update([0], p)
        whole.update([0], p)
    assert exact is not None
    assert float((whole.average([0]) - exact).abs().max()) < 3e-3, "half precision"
    found = store.average([0])
    assert float((found.argmax(1) == exact.argmax(1)).double().mean()) > 0.95
    assert torch.allclose(found.sum(1), torch.ones(1, 20, 20), atol=1e-5)


def test_two_classes_are_kept_whole():
    store = LabelStore(torch.zeros(1, 5, 5, dtype=torch.long), 2, momentum=0.5)
    assert store.bytes_per_pixel == 7
    laws = [randn(1, 2, 5, 5, seed=seed).softmax(1) for seed in range(2)]
    for law in laws:
        store.update([0], law)
    assert torch.allclose(store.average([0]).double(), (laws[0] + laws[1]) / 2, atol=1e-3)
    with pytest.raises(SettingsError, match="some are kept"):
        LabelStore(torch.zeros(1, 5, 5, dtype=torch.long), 2, kept=0)


def test_volumes():
    store = LabelStore(torch.zeros(1, 4, 6, 8, dtype=torch.long), 3)
    view = View((0, 1, 2), (4, 4, 4), (2, 2, 2), (0, 2))
    store.update([0], randn(1, 3, 2, 2, 2).softmax(1), [view])
    assert store.average([0], [view]).shape == (1, 3, 2, 2, 2)


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda: label_step(ten_classes(), torch.tensor([[11]])), DataError),
        (lambda: label_step(ten_classes(), torch.tensor([[0.0]])), DataError),
        (lambda: label_step(ten_classes(), torch.tensor([[0]]), -1.0), SettingsError),
        (lambda: label_step(ten_classes(), torch.tensor([[0, 1]])), ShapeError),
        (lambda: pencil_loss(ten_classes(), ten_classes()[:, :3], torch.tensor([[0]])), ShapeError),
        (lambda: smooth_label_step(ten_classes(), ten_classes(), torch.tensor([[0]]), Zero(), 1.0, 2.0), SettingsError),
        (lambda: LabelStore(torch.zeros(1, 2, 2, dtype=torch.long), 1), SettingsError),
        (lambda: LabelStore(torch.zeros(1, 2, 2, dtype=torch.long), 3, 0.999), SettingsError),
        (lambda: LabelStore(torch.zeros(1, 2, 2), 3), DataError),
        (lambda: LabelStore(torch.full((1, 2, 2), 7), 3), DataError),
        (lambda: LabelStore(torch.zeros(1, 2, 2, dtype=torch.long), 3).update([0], torch.ones(1, 3, 2, 2)), DataError),
        (lambda: LabelStore(torch.zeros(1, 2, 2, dtype=torch.long), 3).update([0], torch.ones(1, 2, 2, 2)), ShapeError),
        (lambda: LabelStore(torch.zeros(1, 2, 2, dtype=torch.long), 3).labels([0], [View((1, 1), (2, 2))]), ShapeError),
    ],
)
def test_bad_input_is_refused(call, error):
    with pytest.raises(error):
        call()


def test_the_store_does_not_depend_on_the_default_precision():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        store = LabelStore(torch.zeros(1, 5, 5, dtype=torch.long), 3)
        store.update([0], randn(1, 3, 5, 5, seed=0).softmax(1))
        assert store.average([0]).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
