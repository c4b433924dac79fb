"""The star of sensitivities stays inside its frame and says its numbers, rounded outward."""

import re
from xml.etree import ElementTree

import pytest

from firmly.lab.charts import Mark
from firmly.lab.star_chart import star_chart

MARKS = [Mark("data", 1.4483, "ours"), Mark("start", 0.9999, "ours"), Mark("bias", 3.02, "ours"), Mark("mask", 0.5)]


@pytest.mark.parametrize("width", [375, 900])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_star_stays_inside_its_frame(width, count):
    drawing = str(star_chart(MARKS[:count], width, [0.9 * m.value for m in MARKS[:count]], "sensitivities"))
    root = ElementTree.fromstring(drawing)
    left, top, right, bottom = map(float, root.attrib["viewBox"].split())
    assert (left, top, right) == (0, 0, width)
    for element in root.iter():
        for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", element.attrib.get("points", "")):
            assert 0 <= float(x) <= width and 0 <= float(y) <= bottom
        if element.tag.endswith("text"):
            x, size = float(element.attrib["x"]), 6.9 * len(element.text or "")
            shift = {"start": 0, "middle": size / 2, "end": size}[element.attrib["text-anchor"]]
            assert x - shift >= -1 and x - shift + size <= width + 1, element.text
            assert 8 <= float(element.attrib["y"]) <= bottom
    assert "1.45" in drawing and "1.3 to" in drawing
