"""From an experiment's name to a verified certificate and a report."""

import dataclasses
import json

import pytest
import torch

from firmly.certificates import Certificate, verify
from firmly.errors import SettingsError, VerificationError
from firmly.lab.experiments import EXPERIMENTS, find
from firmly.lab.models import load_model, read_run
from firmly.lab.pipeline import held_out, run_experiment
from firmly.lab.run_folder import RunFolder
from firmly.lab.study import Study
from firmly.lab.weights import learned


def silent(stage, event):
    pass


def test_a_run_leaves_everything_that_is_promised(finished_run):
    run, results = finished_run
    names = {str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file()}
    assert {
        "settings.toml", "environment.json", "metrics.jsonl", "results.json", "report.html", "certificate.safetensors",
        "weights/certified.safetensors", "weights/certified.json", "weights/unconstrained.safetensors",
        "weights/budget-4.safetensors", "certificates/budget-4.safetensors", "pictures/truth.png", "pictures/ours.png",
    } <= names  # fmt: skip
    assert json.loads((run / "results.json").read_text()) == json.loads(json.dumps(results))
    keys = ["measured", "wiener", "tv", "budget-4", "budget-5", "ours", "twin"]
    assert [m["key"] for m in results["methods"]] == keys
    assert read_run(run).settings.budget == (4.0, 5.0)


def test_budgets_are_kept_and_proved(finished_run):
    run, results = finished_run
    for budget in (4, 5):
        network, _ = load_model(str(run / f"weights/budget-{budget}.safetensors"))
        certificate = verify(run / f"certificates/budget-{budget}.safetensors", network)
        assert certificate.lower <= certificate.upper <= budget
    assert [b["worst_case"]["upper"] <= b["budget"] for b in results["budgets"]] == [True, True]


def test_the_model_of_a_run_is_the_one_that_its_certificate_is_about(finished_run):
    run, results = finished_run
    network, origin = load_model(str(run.path))
    certificate = verify(run / "certificate.safetensors", network)
    assert certificate.upper == results["certificate"]["upper"]
    _, truth, y = held_out(origin.experiment, origin.settings)
    with torch.no_grad():
        error = (network(y) - truth).square().flatten(1).mean(1)
        reported = next(m for m in results["methods"] if m["key"] == "ours")["psnr"]
        assert float((-10 * error.log10()).mean()) == pytest.approx(reported)
    other, _ = load_model(str(run / "weights/budget-4.safetensors"))
    with pytest.raises(VerificationError, match="other weights"):
        verify(run / "certificate.safetensors", other)


def test_the_attack_does_not_beat_the_certificate(finished_run):
    _, results = finished_run
    assert 0 < results["attack"]["ours"]["ratio"] <= results["certificate"]["upper"]


@pytest.mark.parametrize("name", ["denoise", "inpaint", "mri"])
def test_the_other_experiments_run(tmp_path, name):
    experiment = find(name)
    settings = dataclasses.replace(experiment.presets["smoke"], steps=2, epochs=1, twin=False, certify_seconds=1.0)
    results = run_experiment(experiment, settings, "smoke", RunFolder(tmp_path), silent)
    certificate = Certificate.load(tmp_path / "certificate.safetensors")
    assert 0 < certificate.lower <= certificate.upper == results["certificate"]["upper"]
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    assert ("wiener" in results["tuned"]) == (name != "inpaint")


def test_a_single_budget_makes_the_network_of_the_run(tmp_path):
    experiment = find("deblur")
    settings = dataclasses.replace(
        experiment.presets["smoke"], steps=2, epochs=1, twin=False, certify_seconds=1.0, budget=(4.0,), images=1
    )
    results = run_experiment(experiment, settings, "smoke", RunFolder(tmp_path), silent)
    assert results["main"] == "budget-4" and results["certificate"]["upper"] <= 4
    network, _ = load_model(str(tmp_path))
    assert verify(tmp_path / "certificate.safetensors", network).upper <= 4


def test_control_c_and_resuming_give_the_same_network(tmp_path):
    experiment = find("deblur")
    settings = dataclasses.replace(
        experiment.presets["smoke"], steps=3, epochs=2, twin=False, certify_seconds=1.0, images=1
    )

    def interrupting(stage, event):
        if stage == "training" and event["step"] == 5:
            raise KeyboardInterrupt

    run_experiment(experiment, settings, "smoke", RunFolder(tmp_path / "whole"), silent)
    cut = RunFolder(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, settings, "smoke", cut, interrupting)
    assert len(cut.metrics("epoch")) == 1
    run_experiment(experiment, settings, "smoke", cut, silent)
    whole, again = (learned(load_model(str(tmp_path / n))[0]) for n in ("whole", "cut"))
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_every_preset_is_valid_and_every_operator_fits_its_network():
    for experiment in EXPERIMENTS:
        assert set(experiment.presets) == {"smoke", "default", "full"}
        if isinstance(experiment, Study):
            continue  # has no operator of its own; test_studies runs it
        settings = experiment.presets["smoke"]
        network = experiment.network(settings, 32, settings.cap)
        x = torch.rand(1, 1, 32, 32)
        y = experiment.measurement(settings, 32)(x, torch.Generator().manual_seed(0))
        assert network(y).shape == x.shape


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("deblur", {"blur_width": 0.0}),
        ("deblur", {"depth": 0}),
        ("deblur", {"cap": -1.0}),
        ("deblur", {"penalty": (0.1,)}),
        ("deblur", {"budget": (4.0, -1.0)}),
        ("inpaint", {"keep": 0.0}),
        ("mri", {"centre": 0.9}),
        ("denoise", {"size": 1024}),
    ],
)
def test_settings_out_of_range_are_refused(name, change):
    with pytest.raises(SettingsError):
        dataclasses.replace(find(name).presets["default"], **change)


def test_an_unknown_experiment_is_refused_with_the_nearest_name():
    with pytest.raises(SettingsError, match="did you mean deblur"):
        find("deblurr")
