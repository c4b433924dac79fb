"""One small run that several tests look at."""

import dataclasses

import pytest
import torch

from firmly.lab.experiments import find
from firmly.lab.pipeline import run_experiment
from firmly.lab.run_folder import RunFolder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A deblurring run with two budgets, its folder and its results."""
    torch.set_num_threads(1)
    experiment = find("deblur")
    settings = dataclasses.replace(
        experiment.presets["smoke"], steps=3, epochs=2, budget=(4.0, 5.0), certify_seconds=2.0, images=2
    )
    run = RunFolder(tmp_path_factory.mktemp("runs") / "deblur-small")
    results = run_experiment(experiment, settings, "smoke", run, lambda stage, event: None)
    return run, results
