"""Slices of abdomens with their organs."""

from __future__ import annotations

from typing import Literal

from firmly.data.label_maps import LabelledSlices, Split, stored_slices
from firmly.errors import DataError

ORGANS = ("background", "spleen", "kidneys", "liver", "stomach")
CHECKSUMS = {"ct": "99aca3410fd64b79", "mr": "8df553e5099c07ef"}


def organ_slices(modality: Literal["ct", "mr"] = "ct", split: Split | None = None) -> LabelledSlices:
    """Axial slices, 3 mm apart, of one examination of the abdomen, with the classes `ORGANS`.

    "ct": 27 slices (101 x 122), -160 to 240 HU mapped to [0, 1]; "mr": 17 slices (91 x 117). Labels are the output of a
    network that was trained on many people (TotalSegmentator), and are not free of errors; slices of one person are
    correlated. `position` is the number of the slice, and one slice at least is left out between the slabs of `split`:
    "train", "validation", "test", or None for all. Licence: `labels/LICENCES.md`.
    """
    if modality not in CHECKSUMS:
        raise DataError(f"the modality is one of {list(CHECKSUMS)}, given {modality!r}")
    return stored_slices(modality, CHECKSUMS[modality], ORGANS, split)
