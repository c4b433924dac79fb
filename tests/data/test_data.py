"""The shipped photographs, crops, measurements, atomic files and downloads."""

import errno
import hashlib
import os

import pytest
import torch

from firmly.data import (
    Crops,
    Measurement,
    catalogue,
    centre_crop,
    column_mask,
    download,
    photographs,
    pixel_mask,
    read_image,
)
from firmly.errors import DataError, StorageError
from firmly.storage import write_atomically


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_photograph_is_in_one_split_has_a_licence_and_matches_its_checksum():
    table = catalogue()
    assert len({p.name for p in table}) == len({p.sha256 for p in table}) == len(table)
    assert sum(p.split == "test" for p in table) == 8
    assert all(p.licence in ("CC0", "CC0 / PDDL", "public domain", "CC BY 2.0", "BSD-3-Clause") for p in table)
    for split in ("train", "validation", "test"):
        rows = [p for p in table if p.split == split]
        for row, image in zip(rows, photographs(split), strict=True):
            assert image.shape == (1, row.height, row.width) and image.dtype == torch.float32
            assert 0 <= image.min() and image.max() <= 1 and image.std() > 0.02


def test_held_out_photographs_are_not_near_duplicates_of_training_ones():
    def thumbnail(image):
        small = torch.nn.functional.adaptive_avg_pool2d(image[None], 32).flatten()
        small = small - small.mean()
        return small / small.norm()

    train = torch.stack([thumbnail(i) for i in photographs("train")])
    held_out = torch.stack([thumbnail(i) for i in photographs("test") + photographs("validation")])
    assert (held_out @ train.T).max() < 0.9


def test_unknown_split_is_refused():
    with pytest.raises(DataError, match="train, validation, test"):
        photographs("tests")


def test_the_licences_page_names_every_file():
    from importlib.resources import files

    page = (files("firmly.data") / "images" / "LICENCES.md").read_text()
    assert all(f"| {p.name}.png |" in page and p.author in page for p in catalogue())


def test_read_image(tmp_path):
    from PIL import Image

    Image.new("RGB", (5, 4), (255, 255, 255)).save(tmp_path / "white.png")
    assert torch.equal(read_image(tmp_path / "white.png"), torch.ones(1, 4, 5))
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="cannot read the image"):
        read_image(tmp_path / "broken.png")


def test_crops_are_seeded_and_cover_all_symmetries():
    image = torch.arange(12.0).reshape(1, 3, 4)
    crops = Crops([image], 3)
    assert torch.equal(crops.batch(5, generator()), crops.batch(5, generator()))
    distinct = {tuple(c.flatten().tolist()) for c in crops.batch(400, generator())}
    assert len(distinct) == 16  # two positions, eight symmetries


def test_crops_refuse_what_they_cannot_use():
    with pytest.raises(DataError, match="no crop of 8 x 8"):
        Crops([torch.zeros(1, 4, 4)], 8)
    with pytest.raises(DataError, match="not finite"):
        Crops([torch.full((1, 8, 8), torch.nan)], 8)
    with pytest.raises(DataError, match="no images"):
        Crops([], 8)
    with pytest.raises(DataError, match="no central crop"):
        centre_crop(torch.zeros(1, 4, 4), 8)


def test_centre_crop():
    assert centre_crop(torch.arange(20.0).reshape(1, 4, 5), 2).tolist() == [[[6, 7], [11, 12]]]


def test_measurement_has_the_stated_noise():
    x = torch.zeros(1, 1, 300, 300)
    y = Measurement(lambda x: x + 1, 0.1)(x, generator())
    assert abs(y.mean() - 1) < 1e-3 and abs(y.std() - 0.1) < 1e-3
    z = Measurement(lambda x: torch.complex(x, x), 0.1)(x, generator())
    assert abs(z.real.std() - 0.1 / 2**0.5) < 1e-3
    masked = Measurement(lambda x: x, 0.1, support=torch.tensor([1.0, 0.0]).repeat(150))(x, generator())
    assert masked[..., 1::2].abs().max() == 0 and masked[..., ::2].std() > 0.09


def test_measurement_refuses_bad_input():
    with pytest.raises(DataError, match="not finite"):
        Measurement(lambda x: x, 0.1)(torch.full((1, 1, 2, 2), torch.inf), generator())
    with pytest.raises(DataError, match="not negative"):
        Measurement(lambda x: x, -0.1)


def test_masks():
    assert abs(pixel_mask((200, 200), 0.4, generator()).mean() - 0.4) < 0.01
    mask = column_mask((8, 32), keep=0.5, centre=0.25, generator=generator())
    assert mask.shape == (1, 8, 32) and mask[0, 0].sum() == 16 and torch.equal(mask[0, 0], mask[0, 7])
    assert mask[0, 0, :4].all() and mask[0, 0, -3:].all()
    with pytest.raises(DataError):
        column_mask((8, 32), keep=0.1, centre=0.25, generator=generator())
    with pytest.raises(DataError):
        pixel_mask((8, 8), 0, generator())


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "file", "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_download_is_checked_and_cached(tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(b"some data")
    digest = hashlib.sha256(b"some data").hexdigest()
    target = download(source.as_uri(), digest, tmp_path / "cache")
    assert target.read_bytes() == b"some data"
    source.unlink()
    assert download(source.as_uri(), digest, tmp_path / "cache") == target
    target.write_bytes(b"damaged")
    with pytest.raises(DataError, match="cannot download"):
        download(source.as_uri(), digest, tmp_path / "cache")
    source.write_bytes(b"other data")
    with pytest.raises(DataError, match="was not kept"):
        download(source.as_uri(), digest, tmp_path / "cache")
    assert not target.exists() and not list(target.parent.glob("*"))
