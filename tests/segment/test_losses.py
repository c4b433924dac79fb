"""Fenchel-Young and structured hinge losses: gradients, convexity, what they are at zero coupling."""

import pytest
import torch
import torch.nn.functional as F

from firmly.errors import DataError, NotConverged, SettingsError, ShapeError
from firmly.segment import EntropicTV, fenchel_young, structured_hinge
from firmly.segment.grid import both_ends, contrast_weights, differences

EXACT = {"accuracy": 1e-8, "max_iterations": 200_000}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_labels(*shape, classes=4, seed=0):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def difference_quotient(function, point, direction, h=1e-6):
    with torch.no_grad():
        return float((function(point + h * direction) - function(point - h * direction)) / (2 * h))


def test_fenchel_young_is_cross_entropy_without_coupling():
    s, labels = randn(2, 4, 6, 5), some_labels(2, 6, 5)
    labels[0, :2] = 255
    expected = 0.7 * F.cross_entropy(s / 0.7, labels, ignore_index=255, reduction="none").flatten(1).sum(1)
    assert (fenchel_young(s, labels, EntropicTV(0.0, 0.7)) - expected).abs().max() < 1e-12


def test_fenchel_young_gradients():  # S1 of the theory notes
    labels = some_labels(1, 8, 10)
    labels[0, 3, 4:7] = 255
    values = {
        "scores": 1.5 * randn(1, 4, 8, 10),
        "coupling": torch.tensor(0.4, dtype=torch.float64),
        "weights": 0.5 + randn(2, 8, 10, seed=1).abs(),
    }
    for which, point in values.items():

        def function(value, which=which):
            given = {**values, which: value}
            layer = EntropicTV(given["coupling"], **EXACT)
            return fenchel_young(given["scores"], labels, layer, given["weights"]).sum()

        leaf = point.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf)
        direction = randn(*point.shape, seed=2)
        measured = difference_quotient(function, point, direction)
        assert float((gradient * direction).sum()) == pytest.approx(measured, rel=1e-7), which
        if which == "scores":
            assert bool((gradient[0, :, 3, 4:7] == 0).all())


def test_fenchel_young_of_soft_labels_vanishes_at_their_scores():
    s = randn(2, 3, 5, 6)
    layer = EntropicTV(0.3, **EXACT)
    y = layer(s)
    assert fenchel_young(s, y, layer).abs().max() < 1e-9
    y = y.clone()
    y[0, :, 0, 0] = 0  # unknown
    loss = fenchel_young(s, y, layer)
    assert loss[1].abs() < 1e-9 and bool((loss >= -1e-12).all())


def test_both_losses_are_jointly_convex():
    labels = some_labels(1, 5, 5, classes=3)
    for seed in range(3):
        a, b = 2 * randn(1, 3, 5, 5, seed=seed), 2 * randn(1, 3, 5, 5, seed=seed + 9)
        for loss in (
            lambda s, c: float(fenchel_young(s, labels, EntropicTV(c, **EXACT))),
            lambda s, c: float(structured_hinge(s, labels, c, accuracy=1e-8, max_iterations=100_000)),
        ):
            assert loss((a + b) / 2, 0.4) <= (loss(a, 0.1) + loss(b, 0.7)) / 2 + 1e-6


def test_the_hinge_is_that_of_crammer_and_singer_without_coupling():
    s, labels = randn(2, 4, 6, 5).requires_grad_(), some_labels(2, 6, 5)
    labels[1, :, 0] = 255
    valid = labels != 255
    given = s.gather(1, labels.where(valid, 0)[:, None])[:, 0]
    other = F.one_hot(labels.where(valid, 0), 4).movedim(-1, 1) == 0
    expected = (((s + other).amax(1) - given) * valid).flatten(1).sum(1)
    loss = structured_hinge(s, labels)
    assert (loss - expected).abs().max() < 1e-10
    ours, theirs = (torch.autograd.grad(value.sum(), s)[0] for value in (loss, expected))
    assert (ours - theirs).abs().max() < 1e-12


def linear_program(s, labels, coupling):
    """The hinge loss from a conic solver's view: variables x and t >= |D x|, by scipy."""
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import block_diag, eye, hstack, kron, vstack

    y = F.one_hot(labels, s.shape[1]).movedim(-1, 1).double()
    augmented = (s + 1 - y)[0]
    n = augmented.numel()
    basis = torch.eye(n, dtype=torch.float64).reshape(n, *augmented.shape)
    D = differences(basis).flatten(1).T.numpy()
    m = len(D)
    pixels = n // s.shape[1]
    rows = vstack([hstack([D, -eye(m)]), hstack([-D, -eye(m)])])
    cost = np.concatenate([-augmented.flatten().numpy(), np.full(m, coupling)])
    sums = hstack([kron(np.ones((1, s.shape[1])), eye(pixels)), block_diag([np.zeros((pixels, m))])])
    found = linprog(cost, rows, np.zeros(2 * m), sums, np.ones(pixels), bounds=(0, None), method="highs")
    tv = coupling * float(differences(y).abs().sum())
    return -found.fun + tv - float((s * y).sum())


def test_the_hinge_is_the_linear_program():
    s, labels = 2 * randn(1, 3, 4, 5), some_labels(1, 4, 5, classes=3)
    loss = structured_hinge(s, labels, 0.6, accuracy=1e-7, max_iterations=100_000)
    assert float(loss) == pytest.approx(linear_program(s, labels, 0.6), abs=1e-5)
    rough = structured_hinge(s, labels, 0.6, accuracy=1e-2)
    assert float(loss) - 1e-5 <= float(rough) <= float(loss) + 20 * 1e-2


def test_the_hinge_is_certified_whatever_all_classes_have_in_common():
    s, labels = 1e8 + randn(1, 3, 6, 5), some_labels(1, 6, 5, classes=3)
    loss, expected = (structured_hinge(z, labels, 1.0, accuracy=1e-6) for z in (s, s - 1e8))
    assert float((loss - expected).abs()) < 4e-5


def test_the_hinge_subgradient():
    labels = some_labels(1, 4, 5, classes=3)
    s = (2 * randn(1, 3, 4, 5)).requires_grad_()
    coupling = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    exact = {"accuracy": 1e-9, "max_iterations": 200_000}
    of_s, of_coupling = torch.autograd.grad(structured_hinge(s, labels, coupling, **exact).sum(), (s, coupling))
    direction = randn(1, 3, 4, 5, seed=5)
    measured = difference_quotient(
        lambda z: structured_hinge(z, labels, 0.6, **exact).sum(), s.detach(), direction, 1e-5
    )
    assert float((of_s * direction).sum()) == pytest.approx(measured, abs=1e-3)
    one = torch.tensor(1.0, dtype=torch.float64)
    measured = difference_quotient(
        lambda c: structured_hinge(s.detach(), labels, c, **exact).sum(), coupling.detach(), one, 1e-5
    )
    assert float(of_coupling) == pytest.approx(measured, abs=1e-3)


def test_bad_labels_are_refused():
    s, layer = randn(1, 3, 4, 4), EntropicTV(0.1)
    with pytest.raises(ShapeError, match="class numbers are"):
        fenchel_young(s, some_labels(1, 4, 5), layer)
    with pytest.raises(DataError, match="class numbers are 0"):
        structured_hinge(s, torch.full((1, 4, 4), 3))
    with pytest.raises(ShapeError, match="distributions have the shape"):
        fenchel_young(s, torch.ones(1, 4, 4), layer)
    with pytest.raises(DataError, match="sum to 1"):
        fenchel_young(s, torch.ones(1, 3, 4, 4), layer)
    learned = torch.full((1, 3, 4, 4), 1 / 3, requires_grad=True)
    for loss in (lambda: fenchel_young(s, learned, layer), lambda: structured_hinge(s, learned)):
        with pytest.raises(DataError, match="detach"):
            loss()
    with pytest.raises(SettingsError, match="temperature"):
        fenchel_young(s, some_labels(1, 4, 4, classes=3), EntropicTV(0.1, torch.ones((), requires_grad=True)))
    with pytest.raises(NotConverged, match="best segmentation"):
        structured_hinge(s, some_labels(1, 4, 4, classes=3), 0.5, accuracy=1e-9, max_iterations=3)


def test_edges():
    valid = torch.tensor([[[True, True, False], [True, False, True]]])
    inside = both_ends(valid)
    assert inside[0, 0].tolist() == [[True, False, False], [False, False, False]]
    assert inside[0, 1].tolist() == [[True, False, False], [False, False, False]]
    weights = contrast_weights(torch.tensor([[[[0.0, 1.0], [0.0, 3.0]]]]), 2.0)
    assert weights.shape == (1, 2, 2, 2)
    assert float(weights[0, 1, 0, 0]) == pytest.approx(float(torch.exp(torch.tensor(-2.0))))
    assert float(weights[0, 0, 0, 0]) == 1.0
