"""T1 slices of brains with their tissues."""

from __future__ import annotations

from typing import Literal

from firmly.data.label_maps import LabelledSlices, Split, stored_slices
from firmly.errors import DataError

TISSUES = ("background", "cerebrospinal fluid", "grey matter", "white matter")


def brain_slices(who: Literal["template", "subject"] = "template", split: Split | None = None) -> LabelledSlices:
    """T1-weighted magnetic resonance images with the classes `TISSUES`.

    "template": 48 axial slices (96 x 80) of the ICBM152 template, the brain alone, with probability maps; `position` is
    z in millimetres. Neighbours 2 mm apart are nearly equal and the template is smooth, an average of 152 people: the
    slices are strongly correlated, and numbers measured on them have fewer degrees of freedom than slices. The test
    slab (z = 2 to 24) is 8 mm from all others.
    "subject": 39 coronal slices (96 x 96) of one real head, with tissue labels that an algorithm found; `position` is
    the number of the slice. A test on another person and another scanner than the template.

    `split` gives the slices of "train", "validation" or "test", None all of them. Licences: `labels/LICENCES.md`.
    """
    if who == "template":
        return stored_slices("template", "56727c82817048be", TISSUES, split)
    if who == "subject":
        return stored_slices("subject", "5b8c5d2c2ff4ff5f", TISSUES, split)
    raise DataError(f"who is 'template' or 'subject', given {who!r}")
