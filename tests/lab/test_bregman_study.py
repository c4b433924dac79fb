"""The study of Bregman networks: its networks, its radii against closed forms, its data, and what it refuses."""

from __future__ import annotations

import io
import math
import sys

import pytest
import torch
from PIL import Image
from torch import nn

import firmly as fm
from firmly.errors import NotCertifiable, SettingsError
from firmly.lab.experiments import bregman_robustness as robust
from firmly.lab.experiments.bregman import BregmanSettings
from firmly.lab.experiments.bregman_data import Samples, read, regions
from firmly.lab.experiments.bregman_networks import KINDS, Budget, Shape, accuracy, classifier, fit
from firmly.lab.experiments.bregman_page import answer
from firmly.lab.experiments.bregman_pictures import CLASSES, band, band_picture, region_picture, star_picture
from firmly.lab.flows import Interval
from firmly.lab.run_folder import RunFolder

SHAPE = Shape(6, 3)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "softplus"])
def test_networks_are_their_formulas(activation, generator):
    shape = Shape(6, 3, activation)
    rho = fm.prox.legendre(activation)
    data = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    sizes = set()
    for kind in KINDS:
        net = classifier(kind, 4, 3, shape, 0).double()
        sizes.add(sum(p.numel() for p in net.parameters()))
        x = rho(net[0](data))
        for layer in list(net[1].children())[-1].children() if kind == "BregmaNet" else list(net[1].children())[1:]:
            W = layer.linear.weight
            z = x @ W.mT + (layer.bias if kind == "BregmaNet" else layer.linear.bias)
            x = rho(z) if kind == "MLP" else x + rho(z) if kind == "ResNet" else rho(rho.inverse(x) + z)
        torch.testing.assert_close(net(data), net[2](x), rtol=1e-9, atol=1e-9)
        if kind == "BregmaNet":
            dual = classifier("BregmaNet, dual", 4, 3, shape, 0).double()
            torch.testing.assert_close(dual(data), net[2](rho.inverse(x)), rtol=1e-7, atol=1e-7)
    assert len(sizes) == 1


def test_weights_begin_equal_up_to_their_scale():
    mlp, resnet, bregman = (classifier(kind, 4, 3, SHAPE, 7) for kind in KINDS)
    for other in (resnet, bregman):
        assert torch.equal(mlp[0].weight, other[0].weight) and torch.equal(mlp[2].weight, other[2].weight)
    W = mlp[1][1].linear.weight
    assert torch.equal(resnet[1][1].linear.weight, bregman[1].layers[0].linear.weight)
    torch.testing.assert_close(W, resnet[1][1].linear.weight * math.sqrt(3))


def linear_classifier(features: int, width: int, classes: int, generator: torch.Generator) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(features, width), nn.Identity(), nn.Linear(width, classes)).double()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return net


@pytest.mark.parametrize("features", [3, 20])  # fewer and more than the width
def test_radii_of_a_linear_classifier_are_distances(features, generator):
    net = linear_classifier(features, 5, 4, generator)
    x = torch.randn(40, features, generator=generator)
    with torch.no_grad():
        outputs = net(x.double())
        M = net[2].weight @ net[0].weight
    labels = outputs.argmax(1)
    labels[:3] = (labels[:3] + 1) % 4  # wrong ones
    samples = Samples(x, labels)
    known = robust.constants(net, 5.0)
    size = float(torch.linalg.matrix_norm(M, 2))
    assert known.lower == pytest.approx(size, rel=1e-6) and size <= known.upper <= size * (1 + 1e-4)
    differences = (M[:, None] - M[None]).norm(dim=2)
    assert bool((known.pairs >= differences).all())
    torch.testing.assert_close(known.pairs, differences, rtol=1e-2, atol=0)
    distance = (outputs.gather(1, labels[:, None]) - outputs) / differences[labels]
    distance[torch.arange(40), labels] = math.inf
    distance = distance.amin(1).clamp(min=0)
    proved = robust.certified_radii(net, samples, known.pairs)
    assert bool((proved <= distance).all())
    torch.testing.assert_close(proved, distance, rtol=1e-2, atol=1e-6)
    sizes = 1.05 * float(distance.max()) * torch.arange(1, 9) / 8
    attacked = robust.attacked_radii(net, samples, sizes, 40, 0)
    assert bool((attacked >= distance * (1 - 1e-9)).all())
    assert float((attacked - distance <= 0.05 * distance).double().mean()) >= 0.9 and bool(attacked.isfinite().all())
    assert bool((attacked[:3] == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_inputs_leave_the_constant(kind):
    net = classifier(kind, 30, 3, SHAPE, 1).double()
    small, slack = robust.with_fewer_inputs(net, 1.0)
    assert small[0].in_features == 6 and slack < 1e-9
    whole, reduced = (fm.certify(n, shape=(n[0].in_features,), budget_s=3.0) for n in (net, small))
    assert reduced.upper == pytest.approx(whole.upper, rel=5e-3)
    assert robust.with_fewer_inputs(classifier(kind, 4, 3, SHAPE, 1).double(), 1.0)[1] == 0.0


def test_a_singular_first_map_keeps_a_bound():
    net = classifier("BregmaNet", 30, 3, SHAPE, 1).double()
    net[0].weight.data[1] = net[0].weight.data[0]
    net[0].weight.data[2] *= 1e-14
    known = robust.constants(net, 2.0)
    assert fm.certify(net, shape=(30,), budget_s=2.0).lower <= known.upper < math.inf


def test_an_attack_inside_a_proof_is_an_error(monkeypatch, tmp_path):
    split = read("spirals", 100, 50, 0)
    net = fit("BregmaNet", split, SHAPE, Budget(50, 32, (1e-2,), 0.0), 0, RunFolder(tmp_path), "t").net
    effort = robust.Effort(1.0, 10, 1.0)
    found = robust.robustness(net, split.test, effort, 0)
    assert found.accuracy == accuracy(net, split.test)
    assert bool((found.certified <= found.attacked).all()) and found.steepest <= found.constants.upper
    at = [0.0, 0.1, 0.5]
    proved, left = found.curve("certified", at), found.curve("attacked", at)
    assert proved[0] == left[0] == found.accuracy and all(a <= b for a, b in zip(proved, left))
    assert found.mean("certified", 1.0) <= found.mean("attacked", 1.0) <= 1.0
    true = found.constants
    monkeypatch.setattr(robust, "constants", lambda *_: true._replace(pairs=true.pairs * 1e-3))
    with pytest.raises(NotCertifiable, match="please report"):
        robust.robustness(net, split.test, effort, 0)


def test_training_goes_on_where_it_was_and_chooses_a_rate(tmp_path):
    split = read("spirals", 100, 50, 0)
    rates = (1e-6, 1e-2)
    run = RunFolder(tmp_path)
    one, two = (fit("ResNet", split, SHAPE, Budget(50, 32, (rate,), 0.0), 0, run, "t") for rate in rates)
    best = fit("ResNet", split, SHAPE, Budget(50, 32, rates, 0.0), 0, run, "t")
    chosen = two if two.validation > one.validation else one
    assert (best.rate, best.validation) == (chosen.rate, chosen.validation)
    assert all(torch.equal(a, b) for a, b in zip(best.net.parameters(), chosen.net.parameters()))
    assert len(run.metrics("epoch")) == 10, "checkpoints are taken up, not trained again"


def test_data(monkeypatch):
    split = read("spirals", 60, 30, 3)
    assert [len(s.x) for s in (split.train, split.validation, split.test)] == [60, 15, 30] and split.side is None
    pytest.importorskip("sklearn", reason="needs scikit-learn, the extra `sklearn`")
    split = read("digits", 100, 50, 3)
    assert [len(s.x) for s in (split.train, split.validation, split.test)] == [100, 25, 50]
    assert split.features == 64 and 0 <= float(split.train.x.min()) and float(split.train.x.max()) == 1
    whole = read("digits", 5000, 5000, 3)
    assert sum(len(s.x) for s in (whole.train, whole.test)) == 1078 + 360
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SettingsError, match=r"firmly\[sklearn\]"):
        read("digits", 100, 50, 3)


def test_mnist_is_read_from_its_files(tmp_path, monkeypatch):
    folder = tmp_path / "mnist"
    folder.mkdir()
    pixels = torch.randint(256, (40, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for prefix in ("train", "t10k"):
        header = bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in (40, 28, 28))
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + bytes(pixels.flatten().tolist()))
        labels = bytes((0, 0, 8, 1)) + (40).to_bytes(4, "big") + bytes(i % 10 for i in range(40))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    monkeypatch.setenv("FIRMLY_DATA", str(tmp_path))
    split = read("mnist", 20, 10, 0)
    assert split.train.x.shape == (20, 784) and len(split.validation.x) == 5 and split.side == 28
    torch.testing.assert_close(split.test.x, pixels[:10].flatten(1).float() / 255)
    assert not any(torch.equal(a, b) for a in split.train.x for b in split.validation.x)


def test_regions_divide_the_picture():
    parts = regions(8)
    assert len(parts) == 9 and bool((torch.stack(list(parts.values())).sum(0) == 1).all())
    assert parts["top left"].reshape(8, 8)[:2, :2].all()


def test_pictures(generator):
    curves = [[1.0, 0.9, 0.2], [1.0, 0.7, 0.4]]
    found = band("ResNet", [0.0, 0.5, 1.0], curves)
    assert found.mean == pytest.approx([1.0, 0.8, 0.3]) and found.low[0] == found.high[0] == 1.0
    assert found.high[1] == pytest.approx(0.8 + 12.706 * 0.1, rel=1e-6)
    alone = band("MLP", [0.0, 0.5, 1.0], curves[:1])
    assert alone.low == alone.high == alone.mean
    assert Image.open(io.BytesIO(band_picture([found, alone], "radius", "accuracy"))).size == (460, 330)
    assert star_picture({"MLP": {"a": 1.0, "b": 2.0, "c": 0.5}}).startswith(b"\x89PNG")
    net = linear_classifier(2, 2, 2, generator)
    for p, value in zip(
        net.parameters(), (torch.eye(2), torch.zeros(2), torch.tensor([[1.0, 0], [-1, 0]]), torch.zeros(2))
    ):
        p.data = value.double()
    none = Samples(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    picture = Image.open(io.BytesIO(region_picture(net, torch.full((2, 2), 2.0), none, 0.1))).convert("RGB")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(460, 460, 3).int()
    right, left = pixels[200, 400], pixels[200, 60]
    assert right[2] > right[0] and left[0] > left[2], CLASSES


def test_answers():
    assert [answer(Interval(m, h)) for m, h in ((1, 0.5), (-1, 0.5), (0.2, 0.5))] == ["more", "less", "no difference"]
    assert answer(Interval(1.0, math.inf)) == "one seed, no answer"


def test_bad_settings():
    for bad in ({"train": 3}, {"width": 0}, {"steps": 1}, {"rates": ()}, {"rates": (0.0,)}, {"decay": -1.0},
                {"seeds": 0}, {"seeds": 11}, {"radius": 0.0}, {"attack_steps": 0}):  # fmt: skip
        with pytest.raises(SettingsError):
            BregmanSettings(**bad)
