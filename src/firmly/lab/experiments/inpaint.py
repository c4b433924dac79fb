"""Inpainting: y = mask (x + noise), with pixels missing at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from firmly.data import pixel_mask
from firmly.lab.experiments.presets import presets
from firmly.lab.reconstruction import Experiment, ReconstructionSettings
from firmly.lab.settings import require
from firmly.linear import LinearMap
from firmly.linear.mask import Mask


@dataclass(frozen=True)
class InpaintSettings(ReconstructionSettings):
    """`keep` is the fraction of pixels that are measured; which ones is drawn from `seed`."""

    keep: float = 0.5
    depth: int = 10
    penalty: tuple[float, ...] = (0.1, 0.05)
    threshold: tuple[float, ...] = (1.0, 0.01)
    tv_weights: tuple[float, ...] = (0.005, 0.01, 0.02, 0.03)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.keep <= 1, f"keep lies in (0, 1]; given {self.keep}")


def operator(settings: InpaintSettings, size: int) -> LinearMap:
    return Mask(pixel_mask((size, size), settings.keep, torch.Generator().manual_seed(settings.seed)))


def told(settings: InpaintSettings) -> str:
    return (
        f"with {1 - settings.keep:.0%} of the pixels missing at random, and white noise of standard deviation "
        f"{settings.noise:g} on the others"
    )


EXPERIMENT = Experiment(
    "inpaint", "Inpainting", "Measured", presets(InpaintSettings()), operator, told, support=lambda A: A.weight
)
