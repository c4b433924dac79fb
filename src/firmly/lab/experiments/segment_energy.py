"""The energy of total variation after linear scores: its coupling, chosen by bilevel on clean slices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from firmly.lab.experiments.segment_models import SCALES, Labelled, Model, features, scores
from firmly.segment import EntropicTV, PixelFeatures
from firmly.segment.tuning import Labelled as Clean
from firmly.segment.tuning import Range, Search, overlap_loss, tune_energy

ACCURACY = 3e-2  # root mean square per pixel, of probabilities
COUPLING = Range(0.1, 0.01, 0.5)
TEMPERATURE = Range(1.0, 0.2, 5.0)
SOLVES = 6


class Energy(NamedTuple):
    """Coupling and temperature of an `EntropicTV`; softmax where the coupling is 0."""

    coupling: float
    temperature: float

    @torch.no_grad()
    def laws(self, model: Model, network: nn.Module, slices: Labelled) -> Tensor:
        """(n, class, height, width)"""
        found = scores(network, slices.inputs)
        if self.coupling == 0:
            return (found / self.temperature).softmax(1)
        return EntropicTV(self.coupling, self.temperature, accuracy=ACCURACY)(found)


def tuned_energy(model: Model, network: nn.Module, clean: Labelled) -> Energy:
    """The one with the best smooth intersection over union on these slices."""
    ranges = {"coupling": COUPLING} if model.probabilistic else {"coupling": COUPLING, "temperature": TEMPERATURE}
    found = tune_energy(
        scores(network, clean.inputs), Clean(clean.images, clean.labels), ranges, overlap_loss,
        Search(SOLVES, ACCURACY),
    )  # fmt: skip
    return Energy(found.energy.coupling, found.energy.temperature)


def whole(model: Model, network: nn.Module, energy: Energy) -> nn.Module:
    """Images -> scores, or, after an energy, probabilities, as one network that `certify` traces."""
    parts = [PixelFeatures(SCALES)] if model.seen is features else []
    head = [EntropicTV(energy.coupling, energy.temperature)] if energy.coupling > 0 else []
    return nn.Sequential(*parts, network, *head).eval()
