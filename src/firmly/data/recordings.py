"""A recorded signal inside the package."""

from __future__ import annotations

import hashlib
import io
from importlib.resources import files

import torch
from torch import Tensor

from firmly.errors import DataError

ECG = "0976d0ec4877e85d"  # the checksum begins so
ECG_RATE = 360  # samples per second
UNITS_PER_MILLIVOLT = 200


def ecg() -> Tensor:
    """200 seconds of an electrocardiogram at 360 Hz in millivolts, (72000,) float32: MIT-BIH record 208.

    Licence and sources: `signals/LICENCES.md`. Raises `DataError` if the file differs from its checksum.
    """
    import numpy as np

    content = (files("firmly.data") / "signals" / "ecg.npz").read_bytes()
    if not hashlib.sha256(content).hexdigest().startswith(ECG):
        raise DataError("signals/ecg.npz differs from its checksum: reinstall firmly")
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        return torch.from_numpy(stored["values"].astype("float32")) / UNITS_PER_MILLIVOLT
