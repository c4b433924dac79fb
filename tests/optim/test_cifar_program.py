"""The program for the authors' settings of E/PD on CIFAR-10, which needs a GPU in earnest: that it runs, and shifts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import pad

from firmly.data import ImageSet


@pytest.fixture(autouse=True)
def _with_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])


def test_pictures_are_shifted_and_mirrored():
    from benchmarks.programs.feedback_cifar import moved

    x = torch.arange(4 * 3 * 32 * 32).float().reshape(4, 3, 32, 32)
    drawn = torch.Generator().manual_seed(3)
    rows, columns = (torch.randint(7, (4,), generator=drawn) for _ in range(2))
    mirrored = (torch.rand(4, generator=drawn) < 0.5).tolist()
    assert sorted(set(mirrored)) == [False, True]
    wide = pad(x, (3,) * 4, mode="replicate")
    for k, found in enumerate(moved(x, torch.Generator().manual_seed(3))):
        expected = wide[k, :, rows[k] : rows[k] + 32, columns[k] : columns[k] + 32]
        assert torch.equal(found, expected.flip(2) if mirrored[k] else expected)


def test_the_program_runs():
    from benchmarks.programs.feedback_cifar import main

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 3, 32, 32), generator=generator, dtype=torch.uint8)
    data = ImageSet(images, torch.arange(20) % 10)
    found = main("feedback_events", 0.01, 0, 2, data, data)
    assert len(found["curve"]) == 10 and found["rates"][:2] == [0.01, 0.02]
    assert found["chunks"] == [k for k in range(5) for _ in range(2)]
