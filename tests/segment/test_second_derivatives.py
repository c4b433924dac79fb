"""Second derivatives through segmentation layers and risks: right, or refused; never wrong without a word."""

import pytest
import torch
from torch.autograd import grad, gradgradcheck

from firmly.errors import NotDifferentiable, SettingsError
from firmly.priors import Logistic, SparseLinear
from firmly.robust import label_risk, risk
from firmly.segment import EntropicTV, contrast_weights, fenchel_young, random_walker, structured_hinge
from firmly.segment.linear_minimum import LinearMinimum
from firmly.segment.tuning import cross_entropy


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.randint(3, (1, 4, 5), generator=torch.Generator().manual_seed(0))
MARKS = torch.full((1, 4, 5), 255)
MARKS[0, 0, 0], MARKS[0, 3, 4] = 0, 1
X, NUMBERS = randn(30, 4), torch.arange(30) % 2


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def layer_of(coupling, temperature=1.0):
    return EntropicTV(coupling, temperature, accuracy=1e-3)


# each takes (one tensor, another one) that its value depends on, and is not linear in the pair
REFUSED = {
    "EntropicTV: scores, coupling": (
        lambda s, c: layer_of(c)(s), (randn(1, 3, 4, 5), scalar(0.2)),
    ),
    "EntropicTV: scores, temperature": (
        lambda s, t: layer_of(0.2, t)(s), (randn(1, 3, 4, 5), scalar(1.1)),
    ),
    "EntropicTV: scores, weights": (
        lambda s, w: layer_of(0.2)(s, w), (randn(1, 3, 4, 5), torch.ones(2, 4, 5, dtype=torch.float64)),
    ),
    "EntropicTV: scores, contrast": (
        lambda s, b: layer_of(0.2)(s, contrast_weights(randn(1, 1, 4, 5), b)), (randn(1, 3, 4, 5), scalar(1.0)),
    ),
    "EntropicTV without coupling": (
        lambda s, t: layer_of(0.0, t)(s), (randn(1, 3, 4, 5), scalar(1.1)),
    ),
    "fenchel_young": (
        lambda s, c: fenchel_young(s, LABELS, layer_of(c)), (randn(1, 3, 4, 5), scalar(0.2)),
    ),
    "structured_hinge": (
        lambda s, c: structured_hinge(s, LABELS, c, accuracy=1e-2), (randn(1, 3, 4, 5), scalar(0.2)),
    ),
    "random_walker": (
        lambda a, b: random_walker(a * b, MARKS, 2)[:, 0], (0.5 + randn(1, 2, 4, 5).abs(), scalar(1.3)),
    ),
    "LinearMinimum": (
        lambda r, q: LinearMinimum(X, NUMBERS, 2, lambda s, y, q: q * cross_entropy(s, y)).solve(r, {"q": q}),
        (scalar(0.1), scalar(1.2)),
    ),
    "SparseLinear": (
        lambda a, b: SparseLinear(X, NUMBERS[:, None].double(), Logistic()).solve(a * b)[:2],
        (scalar(0.02), torch.ones(4, dtype=torch.float64)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_second_derivative_is_refused_however_it_is_asked_for(name):
    function, points = REFUSED[name]
    a, b = (p.clone().requires_grad_() for p in points)
    out = function(a, b)
    for loss in (out.sum(), (out * randn(*out.shape, seed=1)).sum(), out.square().sum()):
        first = grad(loss, (a, b), create_graph=True)
        assert all(bool(torch.isfinite(g).all()) for g in first)
        for asked in first:
            for other in (0.0, a.square().sum() * b.square().sum()):  # alone, and beside terms that have one
                with pytest.raises(NotDifferentiable):
                    grad(asked.sum() + other, (a, b), retain_graph=True, allow_unused=True)
    for plain in (grad(function(a, b).sum(), a), grad(function(a.detach(), b).sum(), b)):
        assert bool(torch.isfinite(plain[0]).all())


@pytest.mark.parametrize("divergence", ["kl", "chi2", "cvar", "tv", "wasserstein", "kl-penalty"])
@pytest.mark.parametrize("sense", ["sup", "inf"])
def test_second_derivatives_of_risks(divergence, sense):
    x = randn(2, 7).requires_grad_()

    def value(z):
        return risk(z.square() + z, divergence=divergence, radius=0.35, sense=sense)

    assert gradgradcheck(value, (x,))
    radius = scalar(0.35).requires_grad_()
    (of_radius,) = grad(risk(x.square(), divergence=divergence, radius=radius, sense=sense), radius, create_graph=True)
    with pytest.raises((SettingsError, NotDifferentiable)):
        grad(of_radius, radius)


@pytest.mark.parametrize("sense", ["sup", "inf"])
@pytest.mark.parametrize("over", ["pixel", "image", "batch"])
def test_second_derivatives_of_label_risks(sense, over):
    x = randn(1, 3, 2, 3).requires_grad_()
    labels = LABELS[:, :2, :3]
    assert gradgradcheck(lambda z: label_risk(z.square() + z, labels, 0.15, sense=sense, over=over).risk, (x,))
