"""Several annotators, each with errors of a kind and a bias: what they say of the same images, or of their share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from firmly.errors import SettingsError
from firmly.robust.losses import VOID
from firmly.robust.noise_models import BoundaryJitter, BoundaryShift, Corrupted, InTurn, LabelNoise, MissingObjects


@dataclass(frozen=True)
class Annotators(LabelNoise):
    """A data set that several people share: every image is labelled by one of `people`, drawn at random.

    Each is a model of errors, `amount` times as strong as it says.
    """

    people: tuple[LabelNoise, ...] = ()

    def of_image(self, image: Tensor, known: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        if not self.people:
            raise SettingsError("there is nobody to label: give people=(BoundaryJitter(1.0), ...)")
        person = self.people[int(torch.randint(len(self.people), (), generator=generator))]
        one = replace(person, amount=person.amount * self.amount)
        return one.of_image(image, known, classes, generator)


def annotated(
    people: Sequence[LabelNoise], labels: Tensor, classes: int, seed: int = 0, void: int = VOID
) -> tuple[Tensor, list[Corrupted]]:
    """What all people say of all images, (batch, annotator, *spatial), for `staple` or `AnnotatorConfusion`; and the
    errors of each. Their random numbers differ.
    """
    if not people:
        raise SettingsError("there is nobody to label: give people=(BoundaryJitter(1.0), ...)")
    found = [person(labels, classes, 7919 * seed + r, void) for r, person in enumerate(people)]
    return torch.stack([one.labels for one in found], 1), found


def biased_annotators(count: int, seed: int = 0, bias: float = 1.0, tremble: float = 1.0) -> tuple[LabelNoise, ...]:
    """People who draw objects too large or too small, by a habit of their own (normal, standard deviation `bias`

    pixels), with a trembling hand (`tremble` pixels), and who forget up to one small object in five.
    """
    if count < 1 or not (bias >= 0 and tremble >= 0):
        raise SettingsError(f"at least one annotator, bias and tremble of at least 0; given {count}, {bias}, {tremble}")
    generator = torch.Generator().manual_seed(seed)
    shifts = (bias * torch.randn(count, generator=generator)).tolist()
    forgets = (0.2 * torch.rand(count, generator=generator)).tolist()
    return tuple(
        InTurn(1.0, (MissingObjects(forget, largest=64), BoundaryShift(shift), BoundaryJitter(tremble)))
        for shift, forget in zip(shifts, forgets, strict=True)
    )
