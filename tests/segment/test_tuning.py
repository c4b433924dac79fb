"""Hyperparameters by gradients: derivatives through both minimisers against finite differences, gains, refusals."""

import math

import pytest
import torch
from torch import nn

from firmly.errors import DataError, NotConverged, NotDifferentiable, SettingsError, ShapeError
from firmly.robust import generalised_cross_entropy, label_step, of_labels, pencil_loss, risk
from firmly.segment import contrast_weights
from firmly.segment.linear_minimum import LinearMinimum
from firmly.segment.tuning import (
    CONTRAST,
    ENERGY,
    RIDGE,
    Labelled,
    Range,
    Search,
    cross_entropy,
    learned_labels,
    log_loss,
    overlap_loss,
    tune_energy,
    tune_segmenter,
)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scenes(count=3, size=10, noise=0.5, seed=0):
    """Three regions of different brightness, moved about; labels are right."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.zeros(count, size, size, dtype=torch.int64)
    for one in maps:
        row, column = torch.randint(3, size - 3, (2,), generator=generator).tolist()
        one[row:, column:], one[:row] = 1, 2
    images = maps[:, None].double() + noise * torch.randn(count, 1, size, size, generator=generator).double()
    return Labelled(images, maps)


def wrong(part, share=0.3, seed=0):
    """Class 1 is called 0 on a share of its pixels, everywhere."""
    there = torch.rand(part.labels.shape, generator=torch.Generator().manual_seed(seed)) < share
    return Labelled(part.images, torch.where(there & (part.labels == 1), 0, part.labels))


def gce(scores, labels, q):
    return of_labels(generalised_cross_entropy(scores, q), labels).mean()


def optimistic(scores, labels, radius):
    losses = of_labels(generalised_cross_entropy(scores, 0.5), labels)
    return risk(losses, divergence="kl-penalty", radius=radius, sense="inf")


STARTS = {"ridge": 0.02, "coupling": 0.15, "temperature": 0.8, "contrast": 0.7, "q": 0.6, "radius": 2.0, "kappa": 0.8}
EXACT = Search(max_solves=1, accuracy=1e-8)


def ranges(names, **factors):
    return {name: Range(STARTS[name] * factors.get(name, 1.0), 1e-4, 1e3 if name != "q" else 1.0) for name in names}


@pytest.mark.parametrize(
    "objective, own, loss",
    [
        (cross_entropy, [], overlap_loss),
        (gce, ["q"], log_loss),
        (learned_labels, ["kappa"], log_loss),
        (optimistic, ["radius"], log_loss),
    ],
)
def test_hypergradients_against_finite_differences(objective, own, loss):  # through both minimisers, to 1e-5
    names = ["ridge", "coupling", "temperature", "contrast", *own]
    given, clean = wrong(scenes(2, 8)), scenes(1, 8, seed=1)

    def first(**factors):
        found = tune_segmenter(given, clean, nn.Identity(), ranges(names, **factors), objective, loss, EXACT)
        return found.history[0]

    step = first()
    assert step.residual < 1e-10
    h = 1e-4
    for name in names:
        ahead, behind = (first(**{name: math.exp(s * h)}).loss for s in (1, -1))
        assert step.gradient[name] == pytest.approx((ahead - behind) / (2 * h), rel=1e-5, abs=1e-8), name


def test_learned_labels_is_pencil_with_its_labels_solved_for():
    scores, labels = 2 * randn(40, 3), torch.randint(3, (40,), generator=torch.Generator().manual_seed(1))
    for kappa in (0.1, 1.0, 7.0):
        given = torch.tensor(kappa, dtype=torch.float64)
        maps = scores.T[None]  # one line of pixels
        laws = label_step(maps.softmax(1), labels[None], kappa)
        least = pencil_loss(maps, laws.log(), labels[None], kappa).mean()
        assert float(learned_labels(scores, labels, given)) == pytest.approx(
            float(least) / math.log1p(kappa), rel=1e-12
        )
    small, large = (float(learned_labels(scores, labels, torch.tensor(k).double())) for k in (1e-8, 1e12))
    assert small == pytest.approx(float(nn.functional.cross_entropy(scores, labels)), rel=1e-4)
    p = scores.softmax(1).gather(1, labels[:, None])
    assert large == pytest.approx(float(1 - p.mean()), rel=0.1)  # logarithmically slow
    certain = torch.tensor([[800.0, -800.0]], dtype=torch.float64, requires_grad=True)
    learned_labels(certain, torch.tensor([1]), torch.tensor(1.0)).backward()
    assert certain.grad is not None and bool(torch.isfinite(certain.grad).all())


def test_a_robust_loss_that_is_tuned_beats_cross_entropy():
    """45 % of class 1 are called 0; clean images decide."""
    given, clean, test = wrong(scenes(4, 16), 0.45), scenes(2, 16, seed=1), scenes(3, 16, seed=2)
    search = Search(max_solves=8, accuracy=1e-3)

    def accuracy(found):
        with torch.no_grad():
            return float((found.network(test.images).argmax(1) == test.labels).double().mean())

    plain = tune_segmenter(given, clean, nn.Identity(), RIDGE, search=search)
    assert plain.hyperparameters["coupling"] == 0
    for objective, own in ((gce, {"q": Range(0.7, 0.01, 1.0)}), (learned_labels, {"kappa": Range(1.0, 0.01, 100.0)})):
        found = tune_segmenter(given, clean, nn.Identity(), {**RIDGE, **ENERGY, **own}, objective, search=search)
        losses = [step.loss for step in found.history]
        assert found.loss == min(losses) < 0.9 * losses[0]
        assert accuracy(found) > accuracy(plain) + 0.02
        assert found.hyperparameters["coupling"] == found.network.energy.coupling > 0
        x = found.network(clean.images).detach()
        assert float(log_loss(x, clean.labels)) == pytest.approx(found.loss, abs=1e-3)


def test_without_ranges_of_its_own_the_weights_are_those_of_logistic_regression():
    from firmly.segment.linear_segmenter import Batch, fit_logistic

    part = scenes(2, 8)
    found = tune_segmenter(
        part, part, nn.Identity(), {"ridge": 0.01, "temperature": Range(1.0, 0.5, 2.0)}, search=EXACT
    )
    x = (part.images - part.images.mean()) / part.images.std(correction=0)
    theirs = fit_logistic([Batch(x, part.labels, None)], 3, C=100.0, coupling=0.0, tol=1e-9, max_iter=1000)
    ours = found.network.weight * part.images.std(correction=0)
    assert (ours - theirs.weight).abs().max() < 1e-6


def test_the_energy_for_scores_of_any_network():
    part = scenes(2, 12, noise=0.8)
    levels = torch.arange(3, dtype=torch.float64).reshape(1, 3, 1, 1)
    scores = -(part.images - levels).square()
    found = tune_energy(scores.float(), part, {**ENERGY, **CONTRAST}, search=Search(max_solves=10))
    before = log_loss(scores.softmax(1), part.labels)
    assert found.loss < 0.8 * float(before)
    x = found.energy(scores, contrast_weights(part.images, found.contrast))
    assert float(log_loss(x, part.labels)) == pytest.approx(found.loss, abs=1e-3)
    alone = tune_energy(scores, part, {"coupling": Range(0.1, 1e-3, 10.0)}, overlap_loss, Search(max_solves=5))
    assert alone.energy.temperature == 1.0 and alone.contrast == 0.0 and len(alone.history) == 5


def test_unknown_pixels_and_distributions():
    given, clean = scenes(2, 8), scenes(1, 8, seed=1)
    holes = given.labels.clone()
    holes[:, :3] = 255
    search = Search(max_solves=1)
    hidden = tune_segmenter(Labelled(given.images, holes), clean, nn.Identity(), RIDGE, search=search)
    laws = nn.functional.one_hot(given.labels, 3).movedim(-1, 1).double()
    laws[:, :, :3] = 0
    soft = tune_segmenter(Labelled(given.images, laws), clean, nn.Identity(), RIDGE, search=search)
    assert (hidden.network.weight - soft.network.weight).abs().max() < 1e-9
    x = torch.full((1, 2, 2, 2), 0.5, dtype=torch.float64)
    labels = torch.tensor([[[0, 1], [0, 255]]])
    assert float(log_loss(x, labels)) == pytest.approx(math.log(2))
    assert float(overlap_loss(x, labels)) == pytest.approx(1 - (1 / (1.5 + 2 - 1) + 0.5 / (1.5 + 1 - 0.5)) / 2)


def test_what_has_no_derivative_is_refused():
    given, clean = wrong(scenes(2, 8)), scenes(1, 8, seed=1)

    def hinge(scores, labels):
        own = scores.gather(1, labels[:, None])
        other = nn.functional.one_hot(labels, scores.shape[1]) == 0
        return ((scores + other).amax(1) - own[:, 0]).mean()

    def worst_pixels(scores, labels):
        return risk(nn.functional.cross_entropy(scores, labels, reduction="none"), divergence="cvar", radius=0.3)

    for objective in (hinge, worst_pixels):
        with pytest.raises(NotConverged):
            tune_segmenter(given, clean, nn.Identity(), RIDGE, objective)
    rows = randn(20, 2)
    problem = LinearMinimum(rows, torch.arange(20) % 2, 2, cross_entropy)
    ridge = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    W = problem.solve(ridge, {})
    (first,) = torch.autograd.grad(W.square().sum(), ridge, create_graph=True)
    with pytest.raises(NotDifferentiable):
        torch.autograd.grad(first, ridge)
    flat = LinearMinimum(rows[:, :1] * 0, torch.arange(20) % 2, 2, lambda s, y: 0.0 * s.sum())
    with pytest.raises(NotConverged, match="no isolated minimum"):
        flat.solve(ridge, {})


def test_bad_input_is_refused():
    given, clean = scenes(1, 8), scenes(1, 8, seed=1)
    with pytest.raises(SettingsError, match="ridge"):
        tune_segmenter(given, clean, nn.Identity(), ENERGY)
    with pytest.raises(SettingsError, match="nothing to tune"):
        tune_segmenter(given, clean, nn.Identity(), {"ridge": 0.1})
    with pytest.raises(SettingsError, match="0 < low < start < high"):
        tune_segmenter(given, clean, nn.Identity(), {"ridge": Range(1.0, 2.0, 3.0)})
    with pytest.raises(SettingsError, match="one number"):
        tune_segmenter(given, clean, nn.Identity(), RIDGE, lambda s, y: s.sum(1))
    with pytest.raises(SettingsError, match="an energy has"):
        tune_energy(randn(1, 3, 8, 8), clean, RIDGE)
    with pytest.raises(ShapeError, match="do not fit images"):
        tune_energy(randn(1, 3, 8, 9), clean)
    with pytest.raises(DataError, match="fewer than two"):
        tune_segmenter(Labelled(given.images, given.labels * 0), Labelled(clean.images, clean.labels * 0))
    with pytest.raises(DataError, match="NaN"):
        tune_segmenter(Labelled(given.images * math.nan, given.labels), clean, nn.Identity())
    for nothing in (torch.full_like(clean.labels, 255), torch.zeros(1, 3, 8, 8)):
        with pytest.raises(DataError, match="clean images"):
            tune_energy(randn(1, 3, 8, 8), Labelled(clean.images, nothing))
    soft = Labelled(given.images, nn.functional.one_hot(given.labels, 3).movedim(-1, 1).double())
    kappa = {**RIDGE, "kappa": Range(1.0, 0.1, 10.0)}
    with pytest.raises(DataError, match="class numbers"):
        tune_segmenter(soft, clean, nn.Identity(), kappa, learned_labels)
