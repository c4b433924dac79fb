"""The random walker against a dense solve, closed forms, finite differences and the maximum principle."""

import pytest
import torch

from firmly.errors import ConditionError, DataError, NotConverged, ShapeError
from firmly.segment import contrast_weights, random_walker
from firmly.segment.random_walker import laplacian


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def marked(*shape, classes=3, share=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    markers = torch.where(torch.rand(shape, generator=generator) < share, 0, 255)
    numbers = torch.randint(classes, shape, generator=generator)
    markers = torch.where(markers == 255, 255, numbers)
    for k in range(classes):
        markers[:, -1, k] = k
    return markers


def test_against_a_dense_solve():
    weights, markers = 0.1 + rand(2, 2, 7, 6), marked(2, 7, 6)
    x = random_walker(weights, markers, 3)
    for b in range(2):
        n = 42
        L = laplacian(torch.eye(n, dtype=torch.float64).reshape(1, n, 7, 6), weights[b : b + 1])[0].reshape(n, n)
        free = (markers[b] == 255).flatten()
        one_hot = torch.nn.functional.one_hot(markers[b].flatten()[~free], 3).double()
        expected = torch.linalg.solve(L[free][:, free], -L[free][:, ~free] @ one_hot)
        assert (x[b].flatten(1).T[free] - expected).abs().max() < 1e-10
        assert (x[b].flatten(1).T[~free] - one_hot).abs().max() == 0


def test_a_line_is_an_interpolation_of_resistances():
    weights = torch.tensor([[[[1.0, 0.5, 0.25, 7.0]]]], dtype=torch.float64)[:, :, 0]  # (1, 1, 4): one axis
    markers = torch.tensor([[0, 255, 255, 1]])
    x = random_walker(weights, markers, 2)
    resistance = torch.tensor([0.0, 1.0, 3.0, 7.0], dtype=torch.float64) / 7
    assert (x[0, 1] - resistance).abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(7, 6), (3, 4, 5)])
def test_gradients(shape):
    weights, markers = 0.1 + rand(2, len(shape), *shape), marked(2, *shape)
    v = rand(2, 3, *shape, seed=3)
    leaf = weights.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((random_walker(leaf, markers, 3) * v).sum(), leaf)
    direction, h = rand(*weights.shape, seed=4) - 0.5, 1e-5
    ahead, behind = ((random_walker(weights + s * h * direction, markers, 3) * v).sum() for s in (1, -1))
    assert float((gradient * direction).sum()) == pytest.approx(float((ahead - behind) / (2 * h)), rel=1e-7)


def test_the_maximum_principle_where_contrast_is_extreme():
    """S2 of the theory notes in small: a volume whose edge weights span many orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    volume = torch.randn(1, 1, 9, 9, 9, generator=generator, dtype=torch.float64)
    volume[..., 4, :, :] += 3
    weights = contrast_weights(0.02 * volume, 5e4, floor=1e-6)
    assert float(weights.max() / weights.min()) > 1e5
    markers = torch.full((1, 9, 9, 9), 255)
    markers[0, 0, 0, 0], markers[0, -1, -1, -1] = 0, 1
    x = random_walker(weights, markers, 2)
    assert float(x.min()) >= 0 and float(x.max()) <= 1
    assert (x.sum(1) - 1).abs().max() < 1e-12
    assert (laplacian(x, weights) * (markers == 255)).abs().max() < 1e-10


def test_it_follows_the_contours_of_an_image():
    image = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    image[..., 9:] = 1.0
    markers = torch.full((1, 16, 16), 255)
    markers[0, 8, 0], markers[0, 8, 15] = 0, 1
    x = random_walker(contrast_weights(image, 8.0), markers, 2)
    assert bool((x.argmax(1)[0] == (image[0, 0] > 0)).all())
    contrast = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    random_walker(contrast_weights(image, contrast), markers, 2)[0, 1, :, 8].sum().backward()
    assert contrast.grad is not None and float(contrast.grad) < 0  # a higher wall lets less of class 1 through


def test_bad_input_is_refused():
    weights, markers = 0.1 + rand(1, 2, 5, 5), torch.full((1, 5, 5), 255)
    with pytest.raises(ConditionError, match="no marker"):
        random_walker(weights, markers, 2)
    markers[0, 0, 0] = 0
    cut = weights.clone()
    cut[0, 0, 1] = 0  # nothing joins the rows 0, 1 with the others
    with pytest.raises(ConditionError, match="15 pixels"):
        random_walker(cut, markers, 2)
    with pytest.raises(ConditionError, match="not negative"):
        random_walker(-weights, markers, 2)
    with pytest.raises(ShapeError, match="weights are"):
        random_walker(weights[:, :1], markers, 2)
    with pytest.raises(DataError, match="two classes"):
        random_walker(weights, markers, 1)
    markers[0, 4, 4] = 1
    with pytest.raises(NotConverged, match="residual"):
        random_walker(weights, markers, 2, max_iterations=2)
