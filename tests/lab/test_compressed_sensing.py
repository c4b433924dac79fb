"""The study of compressed sensing: settings, problems of equal size, and its own checks of what it claims."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from firmly.certificates import attack
from firmly.errors import SettingsError
from firmly.lab.experiments.compressed_sensing import STUDY, SensingSettings, bound, resized
from firmly.lab.experiments.sensing_problems import parameters, problem, total_variation
from firmly.lab.metrics import psnr
from firmly.lab.run_folder import RunFolder
from firmly.lab.study import run_study

SMOKE = STUDY.presets["smoke"]


@pytest.mark.parametrize("preset", ["default", "full"])
def test_the_networks_have_equally_many_parameters(preset: str) -> None:
    settings = STUDY.presets[preset]
    given = problem(settings)
    ours, rival = (parameters(net) for net in (given.ours(settings, settings.block), given.rival(settings.block)))
    assert abs(ours - rival) <= 0.04 * rival


def test_mri_smoke_run(tmp_path) -> None:
    settings = replace(SMOKE, task="mri", crop=32, size=64, steps=2, rival_steps=2, images=1)
    results = run_study(STUDY, settings, "smoke", RunFolder(tmp_path), lambda stage, event: None)
    text = (tmp_path / "report.html").read_text()
    assert "ADMM-Net" in text and results["page"]["facts"]["certified bound"] != "inf"
    assert "known only by 25%" in STUDY.told(settings)


def test_bounds_hold_for_the_network_they_are_said_of() -> None:
    settings = replace(SMOKE, threshold=(0.02, 0.01), certify_seconds=2.0)
    given = problem(settings)
    torch.manual_seed(0)
    ours = resized(given.ours(settings, 33), lambda size: given.ours(settings, size), 66)
    found = bound(given, settings, torch.rand(1, 1, 66, 66), given.rival(66), ours)
    least = min(found.closed_form, found.spectral)
    assert found.ours_attacked <= least * (1 + 1e-4)  # in float32
    y = given.operator(66)(torch.rand(1, 1, 66, 66).double())
    for radius in (1e-3, 1.0, 100.0):
        assert attack(ours.double(), y, radius, steps=10).ratio <= least * (1 + 1e-9)


def test_total_variation_betters_its_start() -> None:
    settings = replace(SMOKE, task="mri", ratio=0.5)
    given = problem(settings)
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    x = ((rows > 10) & (columns > 12)).float()[None, None]
    A, Q = given.operator(32), given.initial(32)
    y = A(x)
    better = total_variation(A, y, Q(y), 0.003, 300).real
    assert float(psnr(better, x)) > float(psnr(Q(y).real, x)) + 3


@pytest.mark.parametrize(
    "change", [{"ratio": 1.0}, {"crop": 50}, {"size": 300}, {"cap": 2.0}, {"threshold": (0.1,)}, {"phases": 0}]
)
def test_settings_out_of_range_are_refused(change: dict) -> None:
    with pytest.raises(SettingsError):
        replace(SensingSettings(), **change)
