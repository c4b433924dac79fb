"""Label data inside the package: what `brain_slices` and `organ_slices` have in common."""

from __future__ import annotations

import hashlib
import io
from importlib.resources import files
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from firmly.errors import DataError

Split = Literal["train", "validation", "test"]


class LabelledSlices(NamedTuple):
    """Slices of one body with their label maps.

    `images` (n, 1, height, width) are float32 in [0, 1], `labels` (n, height, width) int64 class numbers into
    `classes`, `probabilities` (n, classes, height, width) float32: one-hot where the source has labels only.
    `position` (n,) is the place of a slice in its stack, in the unit that the function tells.
    """

    images: Tensor
    labels: Tensor
    probabilities: Tensor
    position: Tensor
    classes: tuple[str, ...]


def stored_slices(name: str, checksum: str, classes: tuple[str, ...], split: Split | None) -> LabelledSlices:
    """The slices of a file of `labels/`, of one split or all; `DataError` if it differs from its checksum."""
    import numpy as np

    if split is not None and split not in get_args(Split):
        raise DataError(f"split is one of {get_args(Split)}, or None for all slices, given {split!r}")
    content = (files("firmly.data") / "labels" / f"{name}.npz").read_bytes()
    if not hashlib.sha256(content).hexdigest().startswith(checksum):
        raise DataError(f"labels/{name}.npz differs from its checksum: reinstall firmly")
    with np.load(io.BytesIO(content), allow_pickle=False) as table:
        arrays: dict[str, Any] = {key: torch.from_numpy(table[key]) for key in table.files}
    if split is not None:
        kept = arrays["split"] == get_args(Split).index(split)
        arrays = {key: value[kept] for key, value in arrays.items()}
    if "probabilities" in arrays:  # of all classes but the first, in steps of 1 / 255
        steps = arrays["probabilities"].long()
        probabilities = torch.cat([255 - steps.sum(1, keepdim=True), steps], 1).float() / 255
        labels = probabilities.argmax(1)
    else:
        labels = arrays["labels"].long()
        probabilities = torch.nn.functional.one_hot(labels, len(classes)).movedim(-1, 1).float()
    return LabelledSlices(
        arrays["images"][:, None].float() / 255, labels, probabilities, arrays["position"].long(), classes
    )
