"""Denoising: y = x + noise."""

from __future__ import annotations

from dataclasses import dataclass

from firmly.lab.experiments.presets import presets
from firmly.lab.reconstruction import Experiment, ReconstructionSettings
from firmly.linear import Identity, LinearMap


@dataclass(frozen=True)
class DenoiseSettings(ReconstructionSettings):
    """Nothing but noise."""

    noise: float = 0.1
    depth: int = 6
    penalty: tuple[float, ...] = (1.0, 1.0)
    threshold: tuple[float, ...] = (0.1, 0.05)
    tv_weights: tuple[float, ...] = (0.04, 0.06, 0.08, 0.1)
    wiener_weights: tuple[float, ...] = (0.3, 0.6, 1.0, 1.5)


def operator(settings: DenoiseSettings, size: int) -> LinearMap:
    return Identity((1, size, size))


def told(settings: DenoiseSettings) -> str:
    return f"covered by white noise of standard deviation {settings.noise:g}"


EXPERIMENT = Experiment("denoise", "Denoising", "Noisy", presets(DenoiseSettings()), operator, told)
