"""The article on unrolled algorithms shows what its script computes: one family and one figure again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
FOLDER = Path(__file__).parents[1] / "docs" / "theory" / "families"
RESULTS = json.loads((FOLDER / "results.json").read_text())


@pytest.fixture
def article(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import experiments
    import make_figures

    yield experiments, make_figures
    for name in ("experiments", "make_figures"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("problem", ["small", "deconvolution"])
def test_one_family_is_reproduced(article, problem):
    experiments, _ = article
    maps = getattr(experiments, problem)()
    for found, stored in zip(experiments.curve(maps["hqs"], (1, 2, 3), problem == "small"), RESULTS[f"{problem}/hqs"]):
        assert found["basis"] == stored["basis"]
        for key in {"depth", "product", "averaged", "certified", "exact"} & stored.keys():
            assert found[key] == pytest.approx(stored[key], rel=1e-3), key
        assert found["attained"] <= found["certified"]


def test_stored_bounds_are_in_order():
    """lower <= truth <= upper for everything that the article shows."""
    lists = [part for rows in RESULTS.values() for part in (rows.values() if isinstance(rows, dict) else [rows])]
    rows = [row for part in lists for row in part]
    assert len(rows) > 100
    for row in rows:
        for low in ("attained", "jacobian", "class", "exact"):
            for high in ("certified", "averaged", "product"):
                if low in row and high in row:
                    assert row[low] <= row[high] * (1 + 1e-6), row
        if "exact" in row and "class" in row:
            assert row["class"] <= row["exact"] * (1 + 1e-6), row


def test_figures_are_drawn_from_the_results(article, tmp_path, monkeypatch):
    _, make_figures = article
    monkeypatch.setattr(make_figures, "HERE", tmp_path)
    make_figures.draw(RESULTS)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert len([name for name in drawn if name.endswith(".svg")]) == 22
    for name in drawn:
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text(), f"{name}: run make_figures.py draw"
