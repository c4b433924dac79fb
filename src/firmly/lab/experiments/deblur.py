"""Deblurring: y = (Gaussian blur, periodic) x + noise."""

from __future__ import annotations

from dataclasses import dataclass

from firmly.lab.experiments.presets import presets
from firmly.lab.reconstruction import Experiment, ReconstructionSettings
from firmly.lab.settings import require
from firmly.linear import LinearMap
from firmly.linear.blur import Blur


@dataclass(frozen=True)
class DeblurSettings(ReconstructionSettings):
    """`blur_width` is the standard deviation of the blur in pixels."""

    blur_width: float = 1.6

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.blur_width > 0, f"blur_width is positive; given {self.blur_width}")


def operator(settings: DeblurSettings, size: int) -> LinearMap:
    return Blur.gaussian(settings.blur_width, (1, size, size), padding="circular")


def told(settings: DeblurSettings) -> str:
    return (
        f"blurred by a Gaussian of standard deviation {settings.blur_width:g} pixels, with white noise of standard "
        f"deviation {settings.noise:g} on top"
    )


EXPERIMENT = Experiment("deblur", "Deblurring", "Blurred", presets(DeblurSettings()), operator, told)
