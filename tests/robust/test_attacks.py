"""Attacks on networks whose least perturbation is known, and what they leave alone."""

import copy
import math

import pytest
import torch
from torch import nn

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.robust import DAG, PGD, AlmaProx, MinimalPGD, logit_lead, logit_ratio, margin_loss, plain_loss, segpgd_loss
from firmly.robust.attacked_model import AttackedModel, Record


class Channels(nn.Module):
    """Scores are the channels, times a number for each image: a label falls when |delta| = half its lead everywhere."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return 3 * x


def batch(classes, size=12, images=2, seed=0):
    """Images with their right labels, pixels without a label, and the least norm at which 99 % of the others fall."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.25 + 0.5 * torch.rand(images, classes, size, size, generator=generator, dtype=torch.float64)
    labels = x.argmax(1)
    top = x.topk(2, dim=1).values
    for image in range(images):
        labels[image, : 2 * image + 1] = 255
    leads = [(top[i, 0] - top[i, 1])[labels[i] != 255].sort().values / 2 for i in range(images)]
    least = torch.stack([lead[math.ceil(0.99 * len(lead)) - 1] for lead in leads])
    return x, labels, least


def test_of_successes_that_of_least_norm_is_kept():
    x, labels, _ = batch(2, images=1)
    under = AttackedModel(Channels(), x, labels, AlmaProx())
    record, every = Record(under, math.inf), labels != 255
    for size, norm, success in ((0.3, 0.3, False), (0.2, 0.2, True), (0.1, 0.1, True), (0.15, 0.1, True)):
        record.meet(x + size, every if success else every & (torch.rand(labels.shape) < 0.5))
        assert float(record.norm) == pytest.approx(norm) and bool(record.success) == success
    record.meet(x + 0.01, torch.zeros_like(every))  # a failure, however small
    assert float(record.norm) == pytest.approx(0.1) and float(record.apsr) == 1


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_alma_prox_nearly_finds_the_least_norm(classes):
    x, labels, least = batch(classes)
    found = AlmaProx(steps=400)(Channels(), x, labels)
    assert bool(found.success.all()) and bool((found.apsr >= 0.99).all())
    assert bool((found.norm >= least).all())
    assert bool((found.norm <= 1.05 * least).all())
    assert torch.equal(found.norm, (found.images - x).abs().flatten(1).amax(1))


@pytest.mark.parametrize("classes", [2, 4])
def test_minimal_pgd_finds_the_least_norm_to_its_bisection(classes):
    x, labels, least = batch(classes)
    found = MinimalPGD(radius=0.5, steps=5, bisections=12, loss=margin_loss)(Channels(), x, labels)
    assert bool(found.success.all())
    assert bool((found.norm >= least).all())
    assert bool((found.norm <= least + 0.5 / 2**11).all())


def test_dag_succeeds_and_is_no_better():
    x, labels, least = batch(3)
    found = DAG(step=0.01)(Channels(), x, labels)
    assert bool(found.success.all())
    assert bool((found.norm >= least).all()) and bool((found.norm <= least + 0.02).all())


def test_targets_are_reached():
    x, labels, _ = batch(4)
    wanted = torch.where(labels == 255, 255, (labels + 1) % 4)
    top = x.amax(1) - x.gather(1, wanted.where(labels != 255, 0)[:, None]).squeeze(1)
    least = torch.stack([(top[i][labels[i] != 255].sort().values / 2) for i in (0,)])[0]
    for attack in (
        AlmaProx(steps=600, targeted=True),
        MinimalPGD(radius=0.6, steps=10, targeted=True),
        DAG(step=0.01, targeted=True),
    ):
        found = attack(Channels(), x, labels=wanted)
        hit = Channels()(found.images).argmax(1) == wanted
        share = hit.flatten(1).sum(1) / (wanted != 255).flatten(1).sum(1)
        assert bool(found.success.all()) and torch.allclose(share.double(), found.apsr)
        assert float(found.norm[0]) >= float(least[math.ceil(0.99 * len(least)) - 1])


@pytest.mark.parametrize("attack", [AlmaProx(steps=40), DAG(step=0.01, steps=20), MinimalPGD(radius=0.4, steps=4)])
def test_a_batch_is_its_images_one_by_one_and_void_pixels_stay(attack):
    x, labels, _ = batch(3, images=3)
    together = attack(Channels(), x, labels)
    for i in range(3):
        alone = attack(Channels(), x[i : i + 1], labels[i : i + 1])
        assert torch.allclose(alone.images, together.images[i : i + 1], rtol=0, atol=1e-9)
        assert torch.allclose(alone.apsr, together.apsr[i : i + 1])
    void = (labels == 255)[:, None].expand_as(x)
    assert torch.equal(together.images[void], x[void])


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [None, 3])
def test_pgd_stays_in_ball_and_box(norm, dtype, seed):
    x, labels, _ = batch(3)
    x = x.to(dtype) / 0.75
    for radius in (1e-3, 0.1, 2.0):
        found = PGD(radius=radius, norm=norm, steps=7, seed=seed, loss=segpgd_loss)(Channels(), x, labels)
        delta = (found.images.double() - x.double()).flatten(1)
        assert bool((torch.linalg.vector_norm(delta, torch.inf if norm == "linf" else 2, dim=1) <= radius).all())
        assert found.images.dtype == dtype and float(found.images.min()) >= 0 and float(found.images.max()) <= 1
    again = PGD(radius=2.0, norm=norm, steps=7, seed=seed, loss=segpgd_loss)(Channels(), x, labels)
    assert torch.equal(again.images, found.images)


def test_l2_attack_of_a_linear_network_is_the_best_one():
    """With the plain scores as loss, the gradient is constant and the best perturbation lies along it."""
    x, labels, _ = batch(2, size=4, images=1)
    found = PGD(radius=0.01, norm="l2", steps=2, box=None, loss=lambda z, y, r, p: -z.gather(1, y[:, None])[:, 0])
    moved = found(Channels(), x, labels).images - x
    keep = torch.nn.functional.one_hot(labels.where(labels != 255, 0), 2).movedim(-1, 1) * (labels != 255)[:, None]
    expected = -0.01 * keep / keep.sum().sqrt()
    assert moved.abs().max() == 0 or torch.allclose(moved, expected, atol=1e-12)


def test_losses():
    generator = torch.Generator().manual_seed(1)
    z, y = torch.randn(1, 3, 2, 2, generator=generator).double(), torch.tensor([[[0, 1], [2, 0]]])
    reached = z.argmax(1) != y
    plain = plain_loss(z, y, reached, 0.5)
    assert torch.allclose(plain, -z.log_softmax(1).gather(1, y[:, None])[:, 0])
    assert torch.allclose(segpgd_loss(z, y, reached, 0.5), torch.where(reached, 0.25, 0.75) * plain)
    assert torch.equal(margin_loss(z, y, reached, 0.5) == 0, reached)


class Busy(nn.Module):
    """A network with everything that an attack could disturb."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 3, 1)
        )

    def forward(self, x):
        return self.layers(x)


ATTACKS = [
    AlmaProx(steps=5),
    DAG(steps=3),
    PGD(radius=0.1, steps=3),
    PGD(radius=0.1, steps=3, norm="l2", seed=0),
    MinimalPGD(radius=0.1, steps=2, bisections=2),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
def test_the_network_is_left_as_it_was(attack):
    torch.manual_seed(0)
    model = Busy().train()
    model.layers[1].eval()
    model(torch.rand(2, 1, 8, 8)).sum().backward()
    before, modes = copy.deepcopy(model), [m.training for m in model.modules()]
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    x, labels = torch.rand(2, 1, 8, 8), torch.randint(3, (2, 8, 8))
    given = x.clone(), labels.clone()
    found = attack(model, x, labels)
    assert [m.training for m in model.modules()] == modes
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before.buffers(), model.buffers(), strict=True))
    assert torch.equal(x, given[0]) and torch.equal(labels, given[1])
    assert not found.images.requires_grad
    with torch.no_grad():
        assert torch.equal(attack(model, x, labels).images, found.images)
    with torch.inference_mode():
        assert torch.equal(attack(model, x.clone(), labels).images, found.images)
    with pytest.raises(DataError):
        attack(model, x, labels + 5)
    assert [m.training for m in model.modules()] == modes


def test_attacks_stop_when_done():
    x, labels, _ = batch(3)
    wrong = torch.where(labels == 255, 255, (labels + 1) % 3)
    for attack in (AlmaProx(), DAG(), PGD(radius=0.1), MinimalPGD(radius=0.1)):
        model = Channels()
        found = attack(model, x, wrong)
        assert model.calls == 1
        assert torch.equal(found.images, x) and float(found.norm.max()) == 0 and found.median_norm == 0
    model = Channels()
    found = PGD(radius=0.5, steps=100)(model, x, labels)
    assert bool((found.apsr == 1).all()) and model.calls < 60


def test_what_cannot_be_reached_does_not_overflow():
    x, labels = torch.full((1, 3, 4, 4), 0.5), torch.zeros(1, 4, 4, dtype=torch.long)
    certain = nn.Conv2d(3, 3, 1)
    state = {"weight": torch.eye(3)[:, :, None, None], "bias": torch.tensor([100.0, 0.0, 0.0])}
    certain.load_state_dict(state)
    for constraint in (logit_ratio, logit_lead):
        found = AlmaProx(steps=300, step=0.01, constraint=constraint)(certain, x, labels)
        assert not bool(found.success.any()) and float(found.apsr) == 0 and bool(found.images.isfinite().all())


def test_failures_have_infinite_norm_in_the_median():
    x, labels, _ = batch(3)
    found = MinimalPGD(radius=1e-3, steps=3, bisections=2)(Channels(), x, labels)
    assert not bool(found.success.any())
    assert found.median_norm == math.inf
    assert bool((found.norm <= 1e-3).all())
    mixed = found._replace(success=torch.tensor([True, True, False]), norm=torch.tensor([0.1, 0.3, 0.2]).double())
    assert mixed.median_norm == pytest.approx(0.3)


def test_refusals():
    x, labels, _ = batch(3)
    attack, model = PGD(radius=0.1, steps=1), Channels()
    with pytest.raises(ShapeError, match="floating point"):
        attack(model, x[0], labels)
    with pytest.raises(ShapeError, match="integers"):
        attack(model, x, labels.double())
    with pytest.raises(DataError, match="outside of the box"):
        attack(model, 255 * x, labels)
    with pytest.raises(DataError, match="NaN"):
        attack(model, x * torch.nan, labels)
    with pytest.raises(DataError, match="image 1 has no pixel"):
        attack(model, x, torch.stack([labels[0], torch.full_like(labels[1], 255)]))
    with pytest.raises(DataError, match="3 classes"):
        attack(model, x, labels.where(labels != 0, 7))
    with pytest.raises(ShapeError, match="scores"):
        attack(nn.Flatten(), x, labels)
    with pytest.raises(DataError, match="differentiable"):
        attack(Rounded(), x, labels)
    with pytest.raises(DataError, match="rounding"):
        PGD(radius=1e-8)(model, x.float(), labels)
    for wrong in (
        lambda: PGD(radius=-1.0),
        lambda: PGD(radius=1.0, norm="l1"),
        lambda: PGD(radius=1.0, steps=0),
        lambda: AlmaProx(steps=1),
        lambda: AlmaProx(least_multiplier=0.0),
        lambda: DAG(step=0.0),
        lambda: DAG(success=1.5),
        lambda: DAG(box=(1.0, 0.0)),
        lambda: MinimalPGD(radius=1.0, bisections=0),
    ):
        with pytest.raises(SettingsError):
            wrong()


class Rounded(nn.Module):
    def forward(self, x):
        return x.detach().round()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
def test_on_cuda(attack):
    x, labels, _ = batch(3)
    here, there = attack(Channels(), x, labels), attack(Channels(), x.cuda(), labels.cuda())
    assert torch.allclose(here.images, there.images.cpu(), atol=1e-9)
