"""Networks: shapes, training signals, limits, certificates, certified pixels against attacks, hypergradients."""

import pytest
import torch
from torch import nn

import firmly as fm
from firmly.certificates import rows
from firmly.errors import ConditionError, SettingsError, ShapeError
from firmly.linear import Gradient
from firmly.prox import L1
from firmly.segment import (
    EntropicDual,
    EntropicTV,
    UNet,
    certified_pixels,
    contrast_weights,
    fenchel_young,
    monotone_segmenter,
    unrolled_head,
    unrolled_segmenter,
)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_unrolled_head_tends_to_the_layer():
    s = 1.5 * randn(1, 3, 8, 10)
    head = unrolled_head(3, (8, 10), depth=500, coupling=0.4, border="neumann").double()
    with torch.no_grad():
        assert (head(s) - EntropicTV(0.4, accuracy=1e-8)(s)).abs().max() < 1e-4


def test_the_algorithm_converges_and_knows_its_rule():
    s = 1.5 * randn(1, 3, 6, 6)
    algorithm = EntropicDual(Gradient((3, 6, 6)), L1(0.4), temperature=0.7)
    solution = fm.solve(algorithm, s, tol=1e-9)
    assert solution.converged
    assert (solution.x - EntropicTV(0.4, 0.7, accuracy=1e-8)(s)).abs().max() < 1e-5
    limit = 4 * 0.7 / Gradient((3, 6, 6)).norm().upper ** 2
    with pytest.raises(ConditionError, match="temperature"):
        fm.solve(EntropicDual(Gradient((3, 6, 6)), L1(0.4), 0.7, step_size=1.01 * limit), s, tol=1e-6)


@pytest.mark.parametrize("build", [unrolled_segmenter, monotone_segmenter])
def test_networks_train(build):
    torch.manual_seed(0)
    net = build(1, 3, (8, 8))
    out = net(torch.randn(2, 1, 8, 8))
    assert out.shape == (2, 3, 8, 8)
    out[:, 0, 2:5].mean().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients.values())
    assert all(bool(g.any()) for name, g in gradients.items() if name.startswith(("0.", "2.")) and "bias" not in name)


def test_unet():
    torch.manual_seed(0)
    net = UNet(1, 4, width=4, levels=3)
    assert net(torch.randn(2, 1, 16, 12)).shape == (2, 4, 16, 12)
    net(torch.randn(2, 1, 16, 12)).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(ShapeError, match="multiples of 4"):
        net(torch.randn(2, 1, 15, 12))
    with pytest.raises(SettingsError, match="classes 2"):
        UNet(1, 1)
    certificate = fm.certify(net.eval(), shape=(1, 4, 4), budget_s=1)
    assert 0 < certificate.lower <= certificate.upper < 1e4


def test_networks_are_certified():
    torch.manual_seed(0)
    for net in (
        unrolled_segmenter(1, 3, (6, 6), depth=3, width=4),
        monotone_segmenter(1, 3, (6, 6), features=4),
        nn.Sequential(monotone_segmenter(1, 3, (6, 6), features=4), EntropicTV(0.3)),
    ):
        certificate = fm.certify(net, shape=(1, 6, 6), budget_s=1)
        assert 0 < certificate.lower <= certificate.upper < 100


def attacked(model, image, radius, prediction, steps=15):
    """Pixels whose class some perturbation |d| <= radius changes, by ascent on the margins."""
    lost = torch.zeros_like(prediction, dtype=torch.bool)
    for seed in range(3):
        d = randn(*image.shape, seed=seed)
        for _ in range(steps):
            d = (radius * d / d.norm()).requires_grad_()
            output = model(image + d)
            own = output.gather(1, prediction[:, None])[:, 0]
            other = output.scatter(1, prediction[:, None], -torch.inf).amax(1)
            lost |= output.argmax(1) != prediction
            (slope,) = torch.autograd.grad((other - own).clamp(min=-0.3).sum(), d)
            if not bool(slope.any()):
                break
            d = d.detach() + radius * slope / slope.norm()
    return lost


def test_certified_pixels_withstand_attacks():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular"), EntropicTV(0.1, accuracy=1e-4)).double()
    image = 3 * randn(1, 1, 8, 8)
    upper = fm.certify(net, shape=(1, 8, 8), budget_s=1).upper
    found = certified_pixels(net, image, 0.3, upper)
    assert 0 < int(found.certified.sum()) < 64
    lost = attacked(net, image, 0.3, found.prediction)
    assert int(lost.sum()) > 0 and not bool((lost & found.certified).any())
    gains = rows(net[0], shape=(1, 8, 8)).bounds
    of_scores = certified_pixels(net[0], image, 0.3, gains)
    lost = attacked(net[0], image, 0.3, of_scores.prediction)
    assert int(of_scores.certified.sum()) > 0 and not bool((lost & of_scores.certified).any())
    assert int(certified_pixels(net, image, 0.0, upper).certified.sum()) >= 60


def test_the_margin_rule_is_exact_for_a_linear_model():
    """Scores (a, -a) of one pixel: the nearest change of class is at margin / (sqrt 2 L)."""
    net = nn.Conv2d(1, 2, 1, bias=False).double()
    net.weight.data = torch.tensor([[[[3.0]]], [[[-3.0]]]], dtype=torch.float64)
    image = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    upper = fm.certify(net, shape=(1, 1, 1)).upper
    assert bool(certified_pixels(net, image, 0.4999, upper).certified.all())
    assert not bool(certified_pixels(net, image, 0.5001, upper).certified.any())


class DropoutInside(nn.Conv2d):
    """Dropout that is no module, and is seen only in what the model gives."""

    def __init__(self):
        super().__init__(1, 2, 1)

    def forward(self, input):
        return nn.functional.dropout(super().forward(input), 0.5, training=self.training)


def test_certified_pixels_refuse():
    image = randn(1, 1, 8, 8)
    with pytest.raises(SettingsError, match="training mode"):
        certified_pixels(UNet(1, 2, 4), image, 0.1, 1.0)
    with pytest.raises(SettingsError, match="output_error"):
        certified_pixels(monotone_segmenter(1, 2, (8, 8), 4), image, 0.1, 1.0)
    solved = fm.implicit(fm.algorithms.ForwardBackward(fm.linear.Identity((1, 8, 8)), L1(0.1)))
    inverted = fm.networks.Inverse(fm.networks.BregmaNet(1, 1, invertible=True, spatial=(8, 8)))
    for layer in (solved, inverted):
        with pytest.raises(SettingsError, match="output_error"):
            certified_pixels(nn.Sequential(layer, nn.Conv2d(1, 2, 1)), image, 0.1, 1.0)
    with pytest.raises(SettingsError, match="output_error is"):
        certified_pixels(nn.Conv2d(1, 2, 1), image, 0.1, 1.0, output_error=-1.0)
    with pytest.raises(SettingsError, match="gains are not negative"):
        certified_pixels(nn.Conv2d(1, 2, 1), image, 0.1, -torch.ones(2, 8, 8))
    with pytest.raises(ShapeError, match="one for each output"):
        certified_pixels(nn.Conv2d(1, 8, 1), image, 0.1, torch.ones(8))
    part = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).eval()
    part[1].train()
    with pytest.raises(SettingsError, match="training mode"):
        certified_pixels(part, image, 0.1, 1.0)
    for hidden in (nn.Sequential(nn.Conv2d(1, 2, 1), nn.RReLU()), DropoutInside()):
        with pytest.raises(SettingsError, match="training mode"):
            certified_pixels(hidden.train(), image, 0.1, 1.0)
        assert not bool(certified_pixels(hidden.eval(), image, 0.0, 1.0).margin.isnan().any())
    with pytest.raises(SettingsError, match="radius"):
        certified_pixels(nn.Conv2d(1, 2, 1), image, -0.1, 1.0)
    with pytest.raises(SettingsError, match="bound"):
        certified_pixels(nn.Conv2d(1, 2, 1), image, 0.1, float("nan"))
    with pytest.raises(ShapeError, match="two or more classes"):
        certified_pixels(nn.Conv2d(1, 1, 1), image, 0.1, 1.0)


def scene(size=8):
    truth = torch.zeros(1, size, size, dtype=torch.int64)
    truth[:, size // 3 :, size // 2 :] = 1
    truth[:, : size // 3] = 2
    levels = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    image = levels[truth][:, None] + 0.7 * randn(1, 1, size, size, seed=3)
    scores = -(image - levels.reshape(1, 3, 1, 1)).square()
    return image, scores, truth


def clean_loss(scores, truth, image, log_parameters, accuracy=1e-7):
    coupling, contrast = log_parameters.exp()
    layer = EntropicTV(coupling, accuracy=accuracy, max_iterations=200_000)
    x = layer(scores, contrast_weights(image, contrast))
    return nn.functional.nll_loss(x.clamp(min=1e-12).log(), truth)


def test_hypergradients_through_the_layer():  # 1e-5 against finite differences
    image, scores, truth = scene()
    logs = torch.tensor([-0.5, -1.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(clean_loss(scores, truth, image, logs), logs)
    for k in range(2):
        h = torch.zeros(2, dtype=torch.float64)
        h[k] = 1e-5
        with torch.no_grad():
            ahead, behind = (clean_loss(scores, truth, image, logs + s * h) for s in (1, -1))
        assert float(gradient[k]) == pytest.approx(float((ahead - behind) / 2e-5), rel=1e-5)


def test_coupling_and_contrast_by_bilevel():
    image, scores, truth = scene()

    def inner(parameters, start, tol):
        coupling, contrast = parameters
        return EntropicTV(coupling, accuracy=1e-4)(scores, contrast_weights(image, contrast))

    def outer(x, parameters):
        return nn.functional.nll_loss(x.clamp(min=1e-12).log(), truth)

    first = (torch.tensor(0.05, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))
    found = fm.bilevel(inner, outer, first, max_solves=8)
    assert found.objective < 0.9 * found.history[0].objective
    assert float(found.parameters[0]) > 0.05


def test_the_layer_is_a_head_of_any_backbone():
    torch.manual_seed(0)
    net = nn.Sequential(UNet(1, 3, 4, 2), EntropicTV(0.2, accuracy=1e-3))
    image, labels = torch.randn(2, 1, 8, 8), torch.randint(3, (2, 8, 8))
    loss = nn.functional.nll_loss(net(image).clamp(min=1e-6).log(), labels)
    loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in net.parameters())
    net.zero_grad()
    fenchel_young(net[0](image), labels, net[1]).mean().backward()
    assert all(p.grad is not None for p in net.parameters())
