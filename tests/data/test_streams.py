"""The labelled stream that ships with the package."""

from __future__ import annotations

import pytest
import torch

from firmly.data import elec2, streams
from firmly.errors import DataError


def test_elec2():
    x, labels = elec2()
    assert x.shape == (45312, 6) and x.dtype == torch.float32 and 0 <= float(x.min()) <= float(x.max()) <= 1
    assert labels.dtype == torch.int64 and sorted(labels.unique().tolist()) == [0, 1]
    assert float((labels[1:] == labels[:-1]).double().mean()) == pytest.approx(0.8533, abs=5e-5)
    torch.testing.assert_close(x[:48, 0], torch.arange(48) / 47, rtol=0, atol=1e-5)  # the time of day


def test_a_damaged_file_is_refused(monkeypatch):
    monkeypatch.setattr(streams, "ELEC2", "0" * 16)
    with pytest.raises(DataError, match="reinstall"):
        elec2()
