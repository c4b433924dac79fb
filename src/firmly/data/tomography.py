"""A measured sinogram inside the package, and what has to be known of one before it can be reconstructed."""

from __future__ import annotations

import hashlib
import io
from importlib.resources import files
from typing import NamedTuple

import torch
from torch import Tensor

from firmly.errors import DataError

TOOTH = "478b59b758f43407"  # the checksum begins so


class Sinogram(NamedTuple):
    """Line integrals (slices, angles, detectors) at `angles` (radians, over half a turn), float32.

    `centre` is the detector, counted from 0 and not rounded, in front of which the axis of rotation stands.
    """

    values: Tensor
    angles: Tensor
    centre: float


def tooth() -> Sinogram:
    """Two slices of a tooth, X-ray tomography at a synchrotron: 181 angles, 400 detectors around the axis.

    Minus the logarithm of the transmitted share, as in the source, cut to the detectors that see the tooth, in half
    precision (an error of at most 0.0005, a twentieth of the noise). Licence: `sinograms/LICENCES.md`. Raises
    `DataError` if the file differs from its checksum.
    """
    import numpy as np

    content = (files("firmly.data") / "sinograms" / "tooth.npz").read_bytes()
    if not hashlib.sha256(content).hexdigest().startswith(TOOTH):
        raise DataError("sinograms/tooth.npz differs from its checksum: reinstall firmly")
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        values = torch.from_numpy(stored["values"].astype("float32"))
        angles = torch.from_numpy(stored["degrees"].astype("float64")).deg2rad()
    return Sinogram(values, angles, centre_of_rotation(values, angles))


def centre_of_rotation(values: Tensor, angles: Tensor) -> float:
    """The detector in front of the axis, from the centres of mass of the projections, which are c + a cos + b sin.

    For sinograms (slices, angles, detectors) that see the whole object; the least-squares c of all slices. `DataError`
    if the total of the projections varies by more than a tenth: then they do not see the whole of it.
    """
    values = values.double()
    mass = values.sum(-1)
    if float((mass / mass.mean(-1, keepdim=True) - 1).abs().max()) > 0.1:
        raise DataError("the projections do not all see the whole object: their totals differ by more than a tenth")
    places = torch.arange(values.shape[-1], dtype=torch.float64)
    centres = (values * places).sum(-1) / mass
    model = torch.stack([torch.ones_like(angles), angles.cos(), angles.sin()], dim=1)
    return float(torch.linalg.lstsq(model, centres.mT).solution[0].mean())


def rebinned(sinogram: Sinogram, detectors: int, width: float) -> Tensor:
    """Means over `detectors` bins of `width` detectors each, placed around the axis: (slices, angles, detectors).

    Values between detectors are taken as constant over each; bins that reach past the end see 0.
    """
    values = sinogram.values
    total = torch.nn.functional.pad(values.double().cumsum(-1), (1, 0))  # the integral from the left edge
    edges = sinogram.centre + 0.5 + (torch.arange(detectors + 1, dtype=torch.float64) - detectors / 2) * width
    edges = edges.clamp(0, values.shape[-1])
    below = edges.floor().long().clamp(max=values.shape[-1] - 1)
    at_edges = total[..., below] + (edges - below) * values.double()[..., below]
    return (at_edges.diff(dim=-1) / width).to(values.dtype)
