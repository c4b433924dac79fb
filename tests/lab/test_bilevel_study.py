"""The study of penalties: its data, its right and wrong derivatives, its choices, and what it asks for."""

from __future__ import annotations

import sys

import pytest
import torch

from firmly.errors import SettingsError
from firmly.lab.experiments.bilevel import BilevelSettings
from firmly.lab.experiments.bilevel_accuracy import Lasso, on_data, right_and_wrong
from firmly.lab.experiments.bilevel_choices import Chooser
from firmly.lab.experiments.bilevel_problems import read, split


def test_right_and_wrong_derivatives():
    table, error = right_and_wrong(0)
    values = {row[0]: float(row[1]) for row in table.rows}
    assert error < 1e-8
    assert values["closed form"] == pytest.approx(3.798876, abs=1e-6)  # the number of the notes, drawn with seed 0
    assert values["implicit(..., Neumann(10))"] == pytest.approx(3.044376, abs=2e-6)
    assert values["Neumann series, 10 powers, of T(b) − b"] == pytest.approx(-15.4533, abs=1e-4)
    said = {row[0]: row[3] for row in table.rows}
    assert said["implicit(..., Neumann(10))"] == said["implicit(..., OneStep())"] == "warned"


def test_central_differences_of_the_lasso():
    problem = Lasso(3)
    weight = torch.tensor(problem.weight, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(problem.by_newton(weight), weight)
    assert float(found) == pytest.approx(problem.closed_form(), rel=1e-10)


@pytest.mark.parametrize("data", ["photographs", "diabetes", "breast-cancer", "digits"])
def test_data(data):
    if data != "photographs":
        pytest.importorskip("sklearn", reason="needs scikit-learn, the extra `sklearn`")
    table = read(data, 60, 0.05)
    draw = split(table, 0)
    p = len(table.names)
    assert draw.train.A.shape == (60, p + 1) and draw.validation[0].shape == (60, p) and len(draw.test[0]) > 60
    torch.testing.assert_close(draw.train.A[:, :-1].mean(0), torch.zeros(p, dtype=torch.float64), rtol=0, atol=1e-12)
    assert table.groups.shape == (p,) and int(table.groups.max()) + 1 == len(table.group_names)
    assert sorted(set(table.groups.tolist())) == list(range(len(table.group_names)))
    assert len(table.descriptions) == p and (table.grid is None or table.grid.shape == (p, 2))
    weights = torch.full((p,), 0.1 * draw.train.largest, dtype=torch.float64)
    assert on_data(draw, weights, 0) < 1e-5


def test_choices_on_one_draw():
    table = read("photographs", 60, 0.05)
    chooser = Chooser(table, split(table, 1), 15, 0)
    one, group, function = chooser.one, chooser.by_group(), chooser.by_function()
    grid, random = chooser.grid(20, 100.0), chooser.random(0.0)
    assert one.validation <= 1.01 * grid.validation
    assert max(group.validation, function.validation) <= one.validation
    assert len(random.progress) == 1 and random.solves == 1 and grid.solves == 20
    for choice in (one, group, function, grid, random):
        assert choice.weights.shape == (40,) and bool((choice.weights > 0).all())
        again = chooser.draw.train.solve(choice.weights)
        assert float(chooser.error(again)) == pytest.approx(choice.validation, rel=1e-3)
    for g in range(len(table.group_names)):
        assert len(set(group.weights[table.groups == g].tolist())) == 1


def test_scikit_learn_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SettingsError, match=r"firmly\[sklearn\]"):
        read("diabetes", 100, 0.0)


def test_bad_settings():
    for bad in ({"samples": 10}, {"noise": -1.0}, {"draws": 0}, {"grid": 2}):
        with pytest.raises(SettingsError, match="given" if "noise" not in bad and "draws" not in bad else "is"):
            BilevelSettings(**bad)
