"""Numbers for readers, scales, and charts that stay inside their frame."""

import re
from xml.etree import ElementTree

import pytest

from firmly.lab.charts import (
    Line,
    Mark,
    Scale,
    at_least,
    at_most,
    bracket_chart,
    dot_chart,
    line_chart,
    number,
    spread,
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (19.72, "19.7"), (6664, "6,664"), (0.95, "0.95"), (1234567.0, "1.23·10⁶"), (1e7, "10⁷"), (100.0, "100")],
)
def test_number(value, expected):
    assert number(value) == expected


def test_bounds_are_rounded_outward():
    assert (at_most(6.1945), at_least(6.1945)) == ("6.2", "6.19")
    assert (at_most(19.71), at_least(19.79)) == ("19.8", "19.7")
    assert at_most(float("inf")) == "no finite bound"


def test_scales():
    scale = Scale(1, 1000, 0, 300, log=True)
    assert scale(10) == pytest.approx(100) and 100 in scale.ticks()
    assert Scale(0, 10, 0, 100).ticks(5) == [0, 2, 4, 6, 8, 10]
    assert spread([10, 12, 60], 16) == [10, 26, 60]


def drawings(width):
    marks = [Mark("product of norms", 792.6), Mark("averaged recursion", 22.7), Mark("spectral LMI", 9.98, "ours")]
    beyond = [Mark("twin, attained", 6664.0, "twin")]
    lines = [Line("Certified", [(1, 27.0), (2, 28.5), (3, 29.1)], "ours"), Line("Twin", [(1, 27), (3, 29.2)], "twin")]
    dots = [Line(n, [(0, 27.0 + i), (1, 29.0 - i)], "ours") for i, n in enumerate(("Blurred", "TV", "Certified"))]
    yield bracket_chart(9.7, 9.98, marks, width, beyond, "bounds")
    yield line_chart(lines, width, 240, "epoch", "dB", label="training")
    yield line_chart([Line("", [(4, 27.0), (32, 29.0)])], width, 240, "bound", "dB", log_x=True, dots=True, label="b")
    yield dot_chart(["camera", "cat"], dots, width, "dB", "images")


@pytest.mark.parametrize("width", [327, 720])
def test_charts_are_valid_and_stay_inside_their_frame(width):
    for drawing in drawings(width):
        root = ElementTree.fromstring(str(drawing))
        assert root.get("aria-label") and root.get("role") == "img"
        height = float(root.get("height"))
        for element in root.iter():
            for key in ("x", "x1", "x2", "cx"):
                assert 0 <= float(element.get(key, 0)) <= width
            for key in ("y", "y1", "y2", "cy"):
                assert 0 <= float(element.get(key, 0)) <= height
            if element.tag == "text" and element.get("text-anchor") == "start":
                assert float(element.get("x")) + 6.2 * len(element.text or "") <= width + 2, element.text
            if element.tag == "text" and element.get("text-anchor") == "end":
                assert float(element.get("x")) - 6.2 * len(element.text or "") >= -2, element.text


def test_labels_are_escaped():
    chart = bracket_chart(1, 2, [Mark("<b>", 3.0)], 327, label='"quoted"')
    assert "<b>" not in chart and "&lt;b&gt;" in chart
    assert re.search(r'aria-label="&#34;quoted&#34;"', str(chart))
