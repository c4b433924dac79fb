"""Image sets of the classification literature in their official formats: MNIST, Fashion-MNIST, CIFAR-10, CIFAR-100."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import tarfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.request import urlopen

import torch
from torch import Tensor

from firmly.data.download import cache_folder
from firmly.errors import DataError, SettingsError
from firmly.storage import write_atomically

Split = Literal["train", "test"]

MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"
FASHION_MNIST = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR100 = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"

# SHA-256 of the files as they are read, that is decompressed
CHECKSUMS = {
    "mnist/train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "mnist/train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "mnist/t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "mnist/t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    "fashion-mnist/train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "fashion-mnist/train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "fashion-mnist/t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "fashion-mnist/t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "cifar-10-batches-bin/data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "cifar-10-batches-bin/data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "cifar-10-batches-bin/data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "cifar-10-batches-bin/data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "cifar-10-batches-bin/data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "cifar-10-batches-bin/test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
CIFAR10_NAME, CIFAR100_NAME = "cifar-10-batches-bin", "cifar-100-binary"
CIFAR100_MD5 = "03b5dce01913d631647c71ecec9e9cb8"  # of the archive; nothing stronger is published

IMAGE_BYTES = 3 * 32 * 32


class ImageSet(NamedTuple):
    images: Tensor  # (count, channel, height, width), uint8
    labels: Tensor  # (count,), int64


def mnist(split: Split, folder: Path | str | None = None) -> ImageSet:
    """Handwritten digits, 28 x 28, 1 channel, 10 classes: 60,000 for training, 10,000 for the test.

    Read from `folder`/mnist, the four idx files with or without .gz; `folder` is by default the environment's
    `FIRMLY_DATA`, else the download cache. What is not there is downloaded to it and checked. Raises `DataError` for a
    file that is not what it should be, and where a download fails.
    Source: Y. LeCun, C. Cortes, C. Burges, The MNIST database of handwritten digits.
    """
    return _idx_set("mnist", MNIST, split, folder)


def fashion_mnist(split: Split, folder: Path | str | None = None) -> ImageSet:
    """Pictures of clothes in the sizes and the format of `mnist`, from `folder`/fashion-mnist.

    Source: H. Xiao, K. Rasul, R. Vollgraf, arXiv:1708.07747, 2017.
    """
    return _idx_set("fashion-mnist", FASHION_MNIST, split, folder)


def cifar10(split: Split, folder: Path | str | None = None) -> ImageSet:
    """Colour pictures, 32 x 32, 3 channels, 10 classes: 50,000 for training, 10,000 for the test.

    Read from `folder`/cifar-10-batches-bin, the binary version; `folder` and errors as in `mnist`.
    Source: A. Krizhevsky, Learning multiple layers of features from tiny images, 2009.
    """
    parts = [f"data_batch_{i}.bin" for i in range(1, 6)] if _known(split) == "train" else ["test_batch.bin"]
    sets = [_records(path, 1, 0, 10) for path in _members(CIFAR10_NAME, CIFAR10, parts, folder)]
    return ImageSet(torch.cat([s.images for s in sets]), torch.cat([s.labels for s in sets]))


def cifar100(split: Split, folder: Path | str | None = None, labels: Literal["fine", "coarse"] = "fine") -> ImageSet:
    """Colour pictures like those of `cifar10` in 100 classes (`fine`), or in their 20 groups (`coarse`).

    Read from `folder`/cifar-100-binary. Of the download only the MD5 of the archive is published, and it is checked.
    Source: A. Krizhevsky, Learning multiple layers of features from tiny images, 2009.
    """
    if labels not in ("fine", "coarse"):
        raise SettingsError(f"the labels of CIFAR-100 are 'fine' or 'coarse', given {labels!r}")
    (path,) = _members(CIFAR100_NAME, CIFAR100, [f"{_known(split)}.bin"], folder)
    coarse, fine = (_records(path, 2, i, classes) for i, classes in ((0, 20), (1, 100)))
    return coarse if labels == "coarse" else fine


def _known(split: str) -> str:
    if split not in ("train", "test"):
        raise DataError(f"the split is 'train' or 'test', given {split!r}")
    return split


def _root(folder: Path | str | None) -> Path:
    return Path(folder or os.environ.get("FIRMLY_DATA") or cache_folder())


def _idx_set(name: str, host: str, split: str, folder: Path | str | None) -> ImageSet:
    prefix = "train" if _known(split) == "train" else "t10k"
    images, labels = (
        _idx(_idx_file(_root(folder) / name, f"{prefix}-{kind}-ubyte", host), dimensions)
        for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1))
    )
    if len(images) != len(labels):
        raise DataError(f"{name}, {split}: {len(images)} images and {len(labels)} labels; each image has one label")
    if labels.max() > 9:
        raise DataError(f"{name}, {split}: labels are 0 to 9, found {int(labels.max())}")
    return ImageSet(images[:, None], labels.long())


def _idx_file(folder: Path, name: str, host: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    url = f"{host}/{name}.gz"
    return write_atomically(folder / name, _checked(f"{folder.name}/{name}", _unzipped(_fetched(url), url), url))


def _idx(path: Path, dimensions: int) -> Tensor:
    """The unsigned bytes of an idx file: magic 0, 0, 8, number of dimensions; sizes, big-endian; the entries."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = _unzipped(content, str(path))
    start = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(
            f"{path} begins with {content[:4].hex(' ')!r}; an idx file of bytes with {dimensions} "
            f"dimensions begins with '00 00 08 0{dimensions}'"
        )
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    entries = math.prod(sizes)
    if not entries or len(content) != start + entries:
        raise DataError(f"{path} has {len(content)} bytes; its header announces {start} + {entries} {tuple(sizes)}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start, count=entries).reshape(sizes)


def _records(path: Path, label_bytes: int, label: int, classes: int) -> ImageSet:
    """CIFAR's records: the labels, one byte each, then 3 x 32 x 32 bytes of the image."""
    content, size = path.read_bytes(), label_bytes + IMAGE_BYTES
    if not content or len(content) % size:
        raise DataError(f"{path} has {len(content)} bytes; it holds records of {size} bytes, and at least one")
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(-1, size)
    labels = records[:, label].long()
    if labels.max() >= classes:
        raise DataError(f"{path}: labels are 0 to {classes - 1}, found {int(labels.max())}")
    return ImageSet(records[:, label_bytes:].reshape(-1, 3, 32, 32).contiguous(), labels)


def _members(name: str, url: str, files: list[str], folder: Path | str | None) -> list[Path]:
    """The paths of `files`; where one is missing, the archive at `url` is fetched and its missing files written."""
    target = _root(folder) / name
    paths = [target / file for file in files]
    missing = {path.name for path in paths if not path.exists()}
    if not missing:
        return paths
    archive = _fetched(url)
    if name == CIFAR100_NAME and (found := hashlib.md5(archive, usedforsecurity=False).hexdigest()) != CIFAR100_MD5:
        raise DataError(f"{url} has MD5 {found}, expected {CIFAR100_MD5}: it was not kept")
    try:
        with tarfile.open(fileobj=io.BytesIO(_unzipped(archive, url)), mode="r:") as tar:
            for member in tar:  # only contents are taken: no path, link or permission of the archive is used
                file = Path(member.name).name
                if file in missing and member.isfile():
                    stream = tar.extractfile(member)
                    assert stream is not None
                    write_atomically(target / file, _checked(f"{name}/{file}", stream.read(), url))
                    missing.remove(file)
    except tarfile.TarError as error:
        raise DataError(f"{url} is not a readable archive: {error}") from error
    if missing:
        raise DataError(f"{url} does not hold {', '.join(sorted(missing))}")
    return paths


def _fetched(url: str) -> bytes:
    try:
        with urlopen(url, timeout=60) as response:
            return response.read()
    except (OSError, HTTPException) as error:
        raise DataError(
            f"cannot download {url}: {getattr(error, 'reason', error)}; put the official files into a folder and name "
            "it, or set FIRMLY_DATA to it"
        ) from error


def _unzipped(content: bytes, source: str) -> bytes:
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{source} is not a complete gzip file: {error}") from error


def _checked(file: str, content: bytes, url: str) -> bytes:
    """The content, compared with its checksum if one is known: CIFAR-100 is checked as an archive."""
    found, expected = hashlib.sha256(content).hexdigest(), CHECKSUMS.get(file)
    if expected is not None and found != expected:
        raise DataError(f"{file} from {url} has checksum {found}, expected {expected}: it was not kept")
    return content
