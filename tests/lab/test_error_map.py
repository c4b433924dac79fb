"""The map of the errors of single pixels in a run and in its report."""

import re
import shutil
from itertools import pairwise
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import firmly as fm
from firmly.certificates import certify, error_map
from firmly.lab.error_map import map_errors, scale_bar
from firmly.lab.models import load_model
from firmly.lab.pictures import COLOURS, coloured
from firmly.lab.pipeline import held_out
from firmly.lab.report import render
from firmly.lab.run_folder import RunFolder

PNG = b"\x89PNG"


def test_the_map_of_a_run_bounds_what_attacks_do(finished_run):
    run, results = finished_run
    found = results["errors"]
    assert 0 < min(found["attacked"], found["aimed"])
    assert max(found["attacked"], found["aimed"]) <= found["smallest"] == found["largest"]
    assert found["largest"] <= results["certificate"]["upper"] * results["attack"]["radius"]
    assert found["tolerated"] * found["largest"] / results["attack"]["radius"] <= 0.1 * (1 + 1e-12)
    for name in ("certified", "attacked", "aimed"):
        assert (run / f"pictures/error-{name}.png").read_bytes().startswith(PNG)
    text = (run / "report.html").read_text()
    assert "How far every pixel can move" in text and "proved</text>" in text


def test_single_pixels_of_the_network_of_a_run_stay_within_the_map(finished_run):
    """Perturbations along rows of the Jacobian, at the radius of the report, in double precision."""
    run, results = finished_run
    network, origin = load_model(str(run.path))
    assert origin is not None
    network = network.double()
    y = held_out(origin.experiment, origin.settings)[2][[results["scene"]]].double().requires_grad_(True)
    radius = results["attack"]["radius"]
    output = network(y)
    for index in torch.randint(output.numel(), (12,), generator=torch.Generator().manual_seed(0)):
        (row,) = torch.autograd.grad(output.flatten()[index], y, retain_graph=True)
        with torch.no_grad():
            moved = (network(y + radius * row / row.norm()) - output).abs()
        assert 0 < float(moved.flatten()[index]) <= results["errors"]["largest"]
        assert float(moved.max()) <= results["errors"]["largest"]


def test_a_network_without_a_bound_gives_the_reason(tmp_path):
    class Square(nn.Module):
        def forward(self, y):
            return y * y

    y = torch.ones(1, 1, 8, 8)
    found = map_errors(RunFolder(tmp_path), Square(), y, torch.zeros_like(y), 0.1, None, 1.0)
    assert list(found) == ["reason"] and len(found["reason"]) > 20
    assert not (tmp_path / "pictures").exists()


def test_a_network_that_keeps_dark_pixels_has_a_map_of_them(tmp_path):
    blur = fm.linear.Convolution(torch.ones(3, 3) / 9, shape=(1, 32, 32))
    network = fm.unroll(fm.algorithms.ForwardBackward(blur, fm.prox.NonNegative()), depth=3, learn=()).double()
    image = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    image[..., 8:24, 8:24] = 1.0
    y = blur(image) - 0.05
    worst = torch.zeros_like(y)
    worst[0, 0, 16, 16] = 0.01
    run = RunFolder(tmp_path)
    found = map_errors(run, network, y, worst, 0.01, certify(network), 4.0)
    assert found["smallest"] == 0 < found["attacked"] <= found["aimed"] <= found["largest"]
    assert not found["everywhere"] and found["tolerated"] == 0.01  # a change of 0.1 is out of reach on this ball
    assert (tmp_path / "pictures/error-certified.png").exists()


def test_the_norm_that_a_change_takes():
    net = nn.Linear(3, 2, bias=False).double()
    net.weight.data = torch.tensor([[3.0, 0.0, 4.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    found = error_map(net, torch.zeros(1, 3, dtype=torch.float64), 2.0)
    assert torch.allclose(found.gain, torch.tensor([5.0, 1.0], dtype=torch.float64), rtol=1e-9)
    assert torch.allclose(found.bound, 2 * found.gain)
    assert found.tolerated(1.0) == pytest.approx(0.2) and found.tolerated(100.0) == 2.0
    with pytest.raises(ValueError, match="positive"):
        found.tolerated(0.0)


def test_runs_of_before_have_a_report_without_a_map(finished_run, tmp_path):
    run, _ = finished_run
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "old"))
    results = copy.read_json("results.json")
    results.pop("errors")
    copy.write_json("results.json", results)
    assert "How far every pixel can move" not in render(copy)
    results["errors"] = {"reason": "no <bound>"}
    copy.write_json("results.json", results)
    assert "How far every pixel can move" in render(copy) and "error scale" not in render(copy)


@pytest.mark.parametrize("width", [327, 720])
@pytest.mark.parametrize("largest", [9.9e-4, 0.1, 8.15, 1000.0])
def test_the_scale_stays_inside_its_frame(width, largest):
    root = ElementTree.fromstring(str(scale_bar(largest, width)))
    places = []
    for element in root.iter():
        if element.tag.endswith("text"):
            x, size = float(element.attrib["x"]), 6.9 * len(element.text or "")
            shift = {"middle": size / 2, "end": size}[element.attrib["text-anchor"]]
            places.append((x - shift, x - shift + size))
    assert all(left >= -1 and right <= width + 1 for left, right in places)
    places.sort()
    assert all(a[1] <= b[0] + 1 for a, b in pairwise(places)), "labels overlap"


def test_colours_rise_in_lightness():
    light = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in COLOURS]
    assert light == sorted(light) and re.match(rb"\x89PNG", coloured(torch.linspace(-1, 2, 12).reshape(3, 4)))
