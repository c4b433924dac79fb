"""Hyperparameters by gradients: derivatives through both minimisers against finite differences, gains, refusals."""

import math

import pytest
import torch
from torch import nn

from firmly.errors import DataError, NotConverged, NotDifferentiable, SettingsError, ShapeError
from firmly.robust import generalised_cross_entropy, of_labels, risk
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


STARTS = {"ridge": 0.02, "coupling": 0.15, "temperature": 0.8, "contrast": 0.7, "q": 0.6, "radius": 2.0}
EXACT = Search(max_solves=1, accuracy=1e-8)


def ranges(names, **factors):
    return {name: Range(STARTS[name] * factors.get(name, 1.0), 1e-4, 1e3 if name != "q" else 1.0) for name in names}


@pytest.mark.parametrize("loss", [log_loss, overlap_loss])
@pytest.mark.parametrize("objective, own", [(cross_entropy, []), (gce, ["q"]), (optimistic, ["radius"])])
def test_hypergradients_against_finite_differences(objective, own, loss):
    names = ["ridge", "coupling", "temperature", "contrast", *own]
    given, clean = wrong(scenes()), scenes(2, seed=1)

    def first(**factors):
        found = tune_segmenter(given, clean, nn.Identity(), ranges(names, **factors), objective, loss, EXACT)
        return found.history[0]

    step = first()
    assert step.residual < 1e-10
    h = 1e-4
    for name in names:
        ahead, behind = (first(**{name: math.exp(s * h)}).loss for s in (1, -1))
        assert step.gradient[name] == pytest.approx((ahead - behind) / (2 * h), rel=1e-5, abs=1e-8), name
