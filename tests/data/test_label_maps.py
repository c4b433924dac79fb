"""Label data of the package: shapes, classes, splits that do not touch."""

import pytest
import torch

from firmly.data import ORGANS, TISSUES, brain_slices, organ_slices
from firmly.errors import DataError

KINDS = {
    "template": (brain_slices, TISSUES, (48, 96, 80), 8),
    "subject": (brain_slices, TISSUES, (39, 96, 96), 3),
    "ct": (organ_slices, ORGANS, (27, 101, 122), 2),
    "mr": (organ_slices, ORGANS, (17, 91, 117), 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_complete(kind):
    load, classes, (count, height, width), apart = KINDS[kind]
    everything = load(kind)
    assert everything.images.shape == (count, 1, height, width)
    assert everything.labels.shape == (count, height, width)
    assert everything.probabilities.shape == (count, len(classes), height, width)
    assert everything.classes == classes
    assert 0 <= float(everything.images.min()) < float(everything.images.max()) <= 1
    assert (everything.probabilities.sum(1) - 1).abs().max() < 1e-5
    assert float(everything.probabilities.min()) >= 0
    assert bool((everything.probabilities.argmax(1) == everything.labels).all())
    parts = [load(kind, split) for split in ("train", "validation", "test")]
    assert sum(len(part.labels) for part in parts) == count
    for part in parts:
        assert len(part.labels.unique()) == len(classes), "every class is in every split"
    for i, a in enumerate(parts):
        for b in parts[i + 1 :]:
            assert int((a.position[:, None] - b.position[None]).abs().min()) >= apart


def test_bad_names_are_refused():
    with pytest.raises(DataError, match="template"):
        brain_slices("mouse")
    with pytest.raises(DataError, match="modality"):
        organ_slices("pet")
    with pytest.raises(DataError, match="split"):
        organ_slices("ct", "holdout")
    assert brain_slices().images.dtype == torch.float32
