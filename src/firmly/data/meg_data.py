"""Magnetoencephalography: a leadfield of real sensors, and evoked data of a real recording."""

from __future__ import annotations

from importlib.resources import files
from typing import Any, NamedTuple

import torch
from torch import Tensor

from firmly.errors import DataError


class Leadfield(NamedTuple):
    """Fields of dipoles of 1 nAm in two tangential directions at every source.

    In a spherical head a radial dipole has no magnetic field, so that two directions are all there are.
    """

    gain: Tensor  # (sensors, sources, 2), float64
    positions: Tensor  # (sources, 3), metres, head coordinates: x to the right ear, y to the nose, z up


class Recording(NamedTuple):
    """Evoked responses with their noise: what source localisation starts from. Units: fT/cm of gradiometers, fT."""

    leadfield: Leadfield
    evoked: Tensor  # (conditions, time, sensors), float64
    times: Tensor  # (time,), seconds after the stimulus
    conditions: tuple[str, ...]
    averages: Tensor  # (conditions,), how many trials each is the mean of
    covariance: Tensor  # (sensors, sensors), of the noise of one trial
    sensors: Tensor  # (sensors, 3), metres
    gradiometer: Tensor  # (sensors,), which sensors are gradiometers


def vectorview() -> Leadfield:
    """306 real sensor positions and 609 sources on a cortex-like surface, whitened: noise has unit variance per trial.

    Columns are as coherent as real ones are: 0.997. Source: coil geometry and surface of mne 1.13.2.
    """
    return _leadfield(_load("vectorview"))


def meg_sample() -> Recording:
    """Four evoked responses, -0.1 to 0.4 s at 200 Hz, of the MNE sample data, with 451 sources. See LICENCES.md."""
    table = _load("sample")
    count = table["gain"].shape[0]
    covariance = torch.zeros(count, count, dtype=torch.float64)
    rows, columns = torch.tril_indices(count, count)
    covariance[rows, columns] = torch.from_numpy(table["covariance"]).double()
    covariance[columns, rows] = covariance[rows, columns]
    scale = torch.from_numpy(table["evoked_scale"]).double()
    evoked = torch.from_numpy(table["evoked"]).double() * scale[:, None]
    return Recording(
        _leadfield(table),
        evoked.mT.contiguous(),
        torch.from_numpy(table["times"]).double(),
        tuple(str(name) for name in table["conditions"]),
        torch.from_numpy(table["averages"]),
        covariance,
        torch.from_numpy(table["sensors"]).double(),
        torch.from_numpy(table["gradiometer"]),
    )


def leadfield_from_mne(forward: Any, unit: float = 1e-9) -> Leadfield:
    """The leadfield of a forward solution of MNE-Python (`mne.Forward`), for currents in `unit` Am (1 nAm).

    Free orientation gives three directions for every source, fixed orientation one. Whiten it before use. Raises
    `DataError` if the matrix does not fit the sources.
    """
    field = torch.as_tensor(forward["sol"]["data"]).double()
    positions = torch.as_tensor(forward["source_rr"]).double()
    positions = positions.reshape(forward["nsource"], -1, 3)[:, 0]
    if field.dim() != 2 or field.shape[1] not in (len(positions), 3 * len(positions)):
        raise DataError(
            f"a forward solution of {len(positions)} sources has as many columns, or three times as many; "
            f"given a matrix {tuple(field.shape)}"
        )
    return Leadfield(field.unflatten(1, (len(positions), -1)) * unit, positions)


def _leadfield(table: dict[str, Any]) -> Leadfield:
    gain = torch.from_numpy(table["gain"]).double() * torch.from_numpy(table["scale"]).double()[:, None]
    return Leadfield(gain, torch.from_numpy(table["positions"]).double())


def _load(name: str) -> dict[str, Any]:
    import numpy as np

    with (files("firmly.data") / "meg" / f"{name}.npz").open("rb") as file, np.load(file, allow_pickle=False) as table:
        return {key: table[key] for key in table.files}
