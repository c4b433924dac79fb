"""The photographs inside the package, with a fixed split and checksums."""

from __future__ import annotations

import csv
import hashlib
import io
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from firmly.errors import DataError

Split = Literal["train", "validation", "test"]


class Photograph(NamedTuple):
    """One row of the table `images/index.csv`."""

    name: str
    split: str
    height: int
    width: int
    sha256: str
    licence: str
    author: str


def catalogue() -> list[Photograph]:
    """All photographs that ship with the package, in the order of the table."""
    with (_folder() / "index.csv").open(encoding="utf-8") as file:
        return [
            Photograph(r["name"], r["split"], int(r["height"]), int(r["width"]), r["sha256"], r["licence"], r["author"])
            for r in csv.DictReader(file)
        ]


def photographs(split: Split) -> list[Tensor]:
    """Gray photographs of one split, each of shape (1, height, width), float32 in [0, 1].

    The split is fixed in the table, by scene: no scene of the held-out "test" set occurs in "train" or "validation".
    Raises `DataError` if a file differs from its checksum.
    """
    if split not in get_args(Split):
        raise DataError(f"the splits are {', '.join(get_args(Split))}; given {split!r}")
    images = []
    for photograph in catalogue():
        if photograph.split == split:
            content = (_folder() / f"{photograph.name}.png").read_bytes()
            if hashlib.sha256(content).hexdigest() != photograph.sha256:
                raise DataError(f"{photograph.name}.png differs from its checksum: reinstall firmly")
            images.append(_decode(content))
    return images


def read_image(path: Path | str) -> Tensor:
    """An image file as a gray tensor (1, height, width), float32 in [0, 1]."""
    try:
        return _decode(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"cannot read the image {path}: {error}") from error


def _folder() -> Traversable:
    return files("firmly.data") / "images"


def _decode(content: bytes) -> Tensor:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        gray = image.convert("L")
    pixels = torch.frombuffer(bytearray(gray.tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, gray.height, gray.width).float() / 255
