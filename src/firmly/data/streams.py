"""Labelled streams: rows in the order in which they came."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from firmly.data.download import cache_folder
from firmly.errors import DataError

CHECKSUMS = {"electricity/elec2.npz": "ac5ee28ae2b2dbac", "covertype/covtype.npz": "9bab646a5ac395be"}  # they begin so
AREAS, SOILS, TREES = 4, 40, 7
NUMBERS = 10  # columns of Covertype before those that are 0 or 1


class LabelledStream(NamedTuple):
    """Rows in the order of time."""

    x: Tensor  # (time, features), float32
    labels: Tensor  # (time,), int64


def elec2() -> LabelledStream:
    """Will the price of electricity be above its mean of the last day? 45,312 half hours, 6 features in [0, 1].

    Labels depend on each other: repeating the last one is right 85.33% of the time. Licence and sources:
    `electricity/LICENCES.md`. Raises `DataError` if the file differs from its checksum.
    """
    stored = _shipped("electricity/elec2.npz")
    return LabelledStream(torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"].astype("int64")))


def covtype(full: bool = False, folder: Path | str | None = None) -> LabelledStream:
    """Which of 7 kinds of trees covers this cell of forest? 54 features: 10 in metres, degrees or shades, 44 of 0 or 1.

    The first 50,000 rows ship with the package; repeating the last label is right 84.41% of the time. With `full` all
    rows of the official file `covtype.data.gz` (or `covtype.data`), 581,012 of them, from `folder`/covtype; `folder` is
    by default the environment's `FIRMLY_DATA`, else the download cache. It is not downloaded. Raises `DataError` for a
    file that is missing, or not what it should be. Licence and sources: `covertype/LICENCES.md`.
    """
    if full:
        return _official(Path(folder or os.environ.get("FIRMLY_DATA") or cache_folder()) / "covtype")
    stored = _shipped("covertype/covtype.npz")
    one = [torch.eye(n)[torch.from_numpy(stored[name]).long()] for name, n in (("area", AREAS), ("soil", SOILS))]
    numbers = torch.from_numpy(stored["numbers"]).float().mT
    return LabelledStream(torch.cat([numbers, *one], 1), torch.from_numpy(stored["y"].astype("int64")))


def _official(folder: Path) -> LabelledStream:
    import numpy as np

    paths = [path for name in ("covtype.data.gz", "covtype.data") if (path := folder / name).exists()]
    if not paths:
        raise DataError(
            f"{folder} does not hold covtype.data.gz, the official file of Covertype: put it there, or take covtype(), "
            "the 50,000 rows of the package"
        )
    try:
        content = gzip.decompress(paths[0].read_bytes()) if paths[0].suffix == ".gz" else paths[0].read_bytes()
        rows = torch.from_numpy(np.loadtxt(io.BytesIO(content), dtype="int32", delimiter=",", ndmin=2))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{paths[0]} is not the official file of Covertype: {error}") from error
    x, labels = rows[:, :-1], rows[:, -1].long() - 1
    columns = NUMBERS + AREAS + SOILS
    if x.shape[1] != columns:
        raise DataError(f"{paths[0]} has rows of {rows.shape[1]} numbers, expected {columns + 1}")
    areas, soils = x[:, NUMBERS : NUMBERS + AREAS], x[:, NUMBERS + AREAS :]
    if any(bool((part.amin(1) != 0).any() or (part.sum(1) != 1).any()) for part in (areas, soils)):
        raise DataError(f"{paths[0]} has rows without one area and one soil")
    if not bool(((labels >= 0) & (labels < TREES)).all()):
        raise DataError(f"{paths[0]} has labels other than 1 to {TREES}")
    return LabelledStream(x.float(), labels)


def _shipped(name: str) -> dict[str, Any]:
    import numpy as np

    content = files("firmly.data").joinpath(*name.split("/")).read_bytes()
    if not hashlib.sha256(content).hexdigest().startswith(CHECKSUMS[name]):
        raise DataError(f"{name} differs from its checksum: reinstall firmly")
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        return dict(stored)
