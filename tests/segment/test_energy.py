"""The entropic energy layer: its minimiser, its derivatives against finite differences, its certificate."""

import math

import pytest
import torch

import firmly as fm
from firmly.errors import ConditionError, DataError, NotCertifiable, NotConverged, ShapeError
from firmly.segment import EntropicTV
from firmly.segment.grid import differences, divergence
from firmly.segment.regions import region_means, regions

EXACT = {"accuracy": 1e-8, "max_iterations": 200_000}


def scores_of(*shape, scale=1.5, seed=0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def checked_minimum(scores, coupling, weights):
    """The minimiser, after a brute-force check of optimality: no random feasible direction lowers the energy."""
    layer = EntropicTV(coupling, **EXACT)
    x = layer(scores, weights)

    def objective(z):
        return layer.energy(z, weights) - (z * scores).flatten(1).sum(1)

    best = objective(x)
    generator = torch.Generator().manual_seed(1)
    for size in (0.3, 1e-2, 1e-4):
        for _ in range(20):
            other = torch.rand(x.shape, generator=generator, dtype=torch.float64)
            z = (1 - size) * x + size * other / other.sum(1, keepdim=True)
            assert bool((objective(z) >= best - 1e-12).all())
    return x


def test_the_minimum_is_a_minimum():
    scores = scores_of(2, 3, 4, 5)
    weights = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = checked_minimum(scores, 0.4, weights)
    assert torch.allclose(x.sum(1), torch.ones(2, 4, 5, dtype=torch.float64), atol=1e-14)


def test_the_energy_of_two_pixels_in_closed_form():
    """Two classes, two pixels that differ: each moves by the coupling in its score difference, or both agree."""
    s = torch.tensor([[[2.0, -1.0]], [[0.0, 0.0]]], dtype=torch.float64)[None, :, 0]  # (1, 2, 2), one axis
    moved = EntropicTV(0.3, **EXACT)(s)
    expected = torch.sigmoid(torch.tensor([2.0 - 0.6, -1.0 + 0.6], dtype=torch.float64))
    assert torch.allclose(moved[0, 0], expected, atol=1e-9)
    merged = EntropicTV(5.0, **EXACT)(s)
    assert torch.allclose(merged[0, 0], torch.sigmoid(torch.tensor([0.5, 0.5], dtype=torch.float64)), atol=1e-9)


def test_without_coupling_it_is_the_softmax():
    s = scores_of(2, 4, 8, 10).requires_grad_()
    for layer in (EntropicTV(0.0, 0.7), EntropicTV(torch.zeros(4, dtype=torch.float64), 0.7)):
        x, softmax = layer(s), (s / 0.7).softmax(1)
        assert (x - softmax).abs().max() < 1e-14
        v = scores_of(2, 4, 8, 10, seed=3)
        assert (torch.autograd.grad(x, s, v)[0] - torch.autograd.grad(softmax, s, v)[0]).abs().max() < 1e-12


def difference_quotient(function, point, direction, h=1e-5):
    with torch.no_grad():
        return float((function(point + h * direction) - function(point - h * direction)) / (2 * h))


@pytest.mark.parametrize("which", ["scores", "coupling", "weights", "temperature"])
def test_derivatives_against_finite_differences(which):  # S1 of the theory notes
    v = scores_of(1, 4, 8, 10, seed=1)
    values = {
        "scores": scores_of(1, 4, 8, 10),
        "coupling": torch.tensor([0.4, 0.3, 0.5, 0.4], dtype=torch.float64),
        "weights": 0.5 + torch.rand(2, 8, 10, generator=torch.Generator().manual_seed(4), dtype=torch.float64),
        "temperature": torch.tensor(1.1, dtype=torch.float64),
    }

    def function(value):
        given = {**values, which: value}
        layer = EntropicTV(given["coupling"], given["temperature"], **EXACT)
        return (layer(given["scores"], given["weights"]) * v).sum()

    point = values[which].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(point), point)
    direction = torch.randn(point.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    measured = difference_quotient(function, values[which], direction)
    assert float((gradient * direction).sum()) == pytest.approx(measured, rel=2e-8, abs=2e-8)


def test_volumes_and_batches():
    s = scores_of(2, 3, 3, 4, 5)
    layer = EntropicTV(0.3, **EXACT)
    together = layer(s)
    alone = torch.cat([layer(s[k : k + 1]) for k in range(2)])
    assert (together - alone).abs().max() < 1e-7
    point, v = s.clone().requires_grad_(), scores_of(2, 3, 3, 4, 5, seed=2)
    (gradient,) = torch.autograd.grad(layer(point), point, v)
    direction = scores_of(2, 3, 3, 4, 5, seed=6)
    measured = difference_quotient(lambda z: (layer(z) * v).sum(), s, direction)
    assert float((gradient * direction).sum()) == pytest.approx(measured, rel=1e-7)


def test_the_certified_error_holds():
    s = scores_of(1, 4, 16, 16)
    exact = EntropicTV(0.5, **EXACT).solve(s).x
    for accuracy in (1e-1, 1e-2, 1e-3):
        found = EntropicTV(0.5, accuracy=accuracy).solve(s)
        assert float((found.x - exact).norm()) <= float(found.error) <= accuracy * 16
    again = EntropicTV(0.5, accuracy=1e-3).solve(s, start=found.dual)
    assert again.iterations == 0


def test_what_all_classes_have_in_common_costs_no_digits():
    s = 1e12 + scores_of(1, 3, 6, 5)
    layer = EntropicTV(0.5, accuracy=1e-6)
    assert torch.allclose(layer(s), layer(s - 1e12), atol=1e-7)


def test_single_precision_and_a_constant_image():
    s = scores_of(1, 3, 6, 6).float().requires_grad_()
    x = EntropicTV(0.2)(s)
    assert x.dtype == torch.float32
    x[0, 0].sum().backward()
    assert s.grad is not None and bool(torch.isfinite(s.grad).all())
    sharp = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    sharp[:, 0, :, :2], sharp[:, 1, :, 2:] = 2000.0, 2000.0  # probabilities of exactly 0
    sharp.requires_grad_()
    (gradient,) = torch.autograd.grad(EntropicTV(0.1)(sharp)[0, 0].sum(), sharp)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda():
    s = scores_of(2, 3, 8, 8)
    layer = EntropicTV(0.3, **EXACT)
    here, there = s.clone().requires_grad_(), s.cuda().requires_grad_()
    a, b = layer(here), layer(there)
    assert (a - b.cpu()).abs().max() < 1e-7
    v = scores_of(2, 3, 8, 8, seed=1)
    assert (torch.autograd.grad(a, here, v)[0] - torch.autograd.grad(b, there, v.cuda())[0].cpu()).abs().max() < 1e-6


def test_the_certificate_is_the_strong_convexity():
    layer = EntropicTV(0.4, temperature=0.8, accuracy=1e-2)  # certificates take the error off
    certificate = fm.certify(layer, shape=(3, 5, 6))
    assert certificate.upper == pytest.approx(1 / 1.6, rel=1e-6)
    assert certificate.lower <= certificate.upper
    assert any("minimiser of the energy" in line for line in certificate.assumptions)
    near = torch.zeros(1, 2, 1, 1, dtype=torch.float64)  # where the bound is attained: two classes at one half
    moved = EntropicTV(0.0, 0.8)
    ratio = (moved(near + torch.tensor([[[[1e-6]], [[-1e-6]]]])) - moved(near)).norm() / (1e-6 * math.sqrt(2))
    assert float(ratio) == pytest.approx(1 / 1.6, rel=1e-5)
    with pytest.raises(NotCertifiable, match="depend on the input"):

        class FromTheImage(torch.nn.Module):
            def forward(self, s):
                return layer(s, s[:, :2])

        fm.certify(FromTheImage(), shape=(3, 5, 6))


def test_a_monotone_map():
    """<dx, ds> >= 2 temperature |dx|^2 for random pairs, which is what the certificate uses."""
    layer = EntropicTV(0.4, 0.6, **EXACT)
    for seed in range(5):
        a, b = scores_of(1, 3, 5, 5, seed=seed), scores_of(1, 3, 5, 5, seed=seed + 10, scale=0.5)
        dx, ds = layer(a + b) - layer(a), b
        assert float((dx * ds).sum()) >= 2 * 0.6 * float(dx.square().sum()) - 1e-9


def test_bad_input_is_refused():
    s = scores_of(1, 3, 4, 4)
    with pytest.raises(ConditionError, match="temperature is positive"):
        EntropicTV(1.0, 0.0)
    with pytest.raises(ConditionError, match="coupling is not negative"):
        EntropicTV(-1.0)
    with pytest.raises(ConditionError, match="finite"):
        EntropicTV(math.inf)
    with pytest.raises(ShapeError, match="at least two classes"):
        EntropicTV()(s[:, :1])
    with pytest.raises(ShapeError, match="each of 3 classes"):
        EntropicTV(torch.ones(2))(s)
    with pytest.raises(ShapeError, match="edge weights"):
        EntropicTV()(s, torch.ones(2, 3, 3))
    with pytest.raises(ConditionError, match="not negative"):
        EntropicTV()(s, -torch.ones(2, 4, 4))
    with pytest.raises(DataError, match="finite"):
        EntropicTV()(s * math.nan)
    with pytest.raises(NotConverged, match="certified to"):
        EntropicTV(accuracy=1e-8, max_iterations=5)(s)


def test_regions_against_scipy():
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    flat = torch.rand(2, 3, 2, 7, 1, generator=torch.Generator().manual_seed(0)) < 0.5
    flat = torch.cat([flat, torch.rand(2, 3, 2, 7, 8, generator=torch.Generator().manual_seed(1)) < 0.5], -1)
    label, count = regions(flat, 2)
    number = torch.arange(label.numel()).reshape(label.shape)
    down, right = flat[:, :, 0, :-1], flat[:, :, 1, :, :-1]
    i = torch.cat([number[:, :, :-1][down], number[..., :-1][right]])
    j = torch.cat([number[:, :, 1:][down], number[..., 1:][right]])
    graph = coo_matrix((torch.ones(len(i)), (i, j)), shape=(label.numel(),) * 2)
    expected_count, expected = connected_components(graph, directed=False)
    assert count == expected_count
    pairs = {(int(a), int(b)) for a, b in zip(label.flatten(), expected)}
    assert len(pairs) == count
    assert torch.allclose(region_means(label.double(), label, count), label.double())


def test_the_adjoint_of_the_differences():
    x, p = scores_of(2, 3, 4, 5), scores_of(2, 3, 2, 4, 5, seed=1)
    assert float((differences(x) * p).sum()) == pytest.approx(float((x * divergence(p)).sum()), rel=1e-12)
