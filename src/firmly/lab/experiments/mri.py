"""Magnetic resonance imaging in small: y = mask (F x + noise), with whole columns of the Fourier plane missing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from firmly.data import column_mask
from firmly.lab.experiments.presets import presets
from firmly.lab.reconstruction import Experiment, ReconstructionSettings
from firmly.lab.settings import require
from firmly.linear import LinearMap
from firmly.linear.fourier_sampling import FourierSampling


@dataclass(frozen=True)
class MriSettings(ReconstructionSettings):
    """`keep` is the fraction of columns measured, `centre` that of the low frequencies all of which are."""

    keep: float = 0.4
    centre: float = 0.1
    penalty: tuple[float, ...] = (0.1, 0.1)
    threshold: tuple[float, ...] = (0.05, 0.01)
    tv_weights: tuple[float, ...] = (0.003, 0.006, 0.01, 0.02)
    wiener_weights: tuple[float, ...] = (0.001, 0.003, 0.01)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.centre <= self.keep <= 1, f"0 < centre <= keep <= 1; given {self.centre}, {self.keep}")


def operator(settings: MriSettings, size: int) -> LinearMap:
    generator = torch.Generator().manual_seed(settings.seed)
    return FourierSampling(column_mask((size, size), settings.keep, settings.centre, generator)[0])


def told(settings: MriSettings) -> str:
    return (
        f"known only by {settings.keep:.0%} of the columns of their Fourier transform, with complex white noise of "
        f"standard deviation {settings.noise:g}"
    )


EXPERIMENT = Experiment(
    "mri", "Magnetic resonance imaging", "Zero-filled", presets(MriSettings()), operator, told,
    shown=lambda A, y: A.T(y).real, support=lambda A: A.mask,
)  # fmt: skip
