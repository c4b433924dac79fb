"""MNIST, Fashion-MNIST and the CIFARs, read from small files in their official formats; no network."""

import gzip
import hashlib
import io
import struct
import tarfile

import pytest
import torch

from firmly.data import cifar10, cifar100, fashion_mnist, image_sets, mnist
from firmly.errors import DataError, SettingsError


def pixels(count, *shape, seed=0):
    return torch.randint(256, (count, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def idx(values):
    header = bytes((0, 0, 8, values.dim())) + struct.pack(f">{values.dim()}I", *values.shape)
    return header + values.numpy().tobytes()


def records(*columns):
    return torch.cat([c.reshape(len(c), -1) for c in columns], 1).numpy().tobytes()


def write(folder, name, content):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_bytes(content)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refused(url, timeout):
        raise OSError("no network in tests")

    monkeypatch.setattr(image_sets, "urlopen", refused)


def served(monkeypatch, files):
    def response(url, timeout):
        return io.BytesIO(files[url])

    monkeypatch.setattr(image_sets, "urlopen", response)


@pytest.mark.parametrize("load, name", [(mnist, "mnist"), (fashion_mnist, "fashion-mnist")])
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files(tmp_path, monkeypatch, load, name, zipped):
    images, labels = pixels(5, 28, 28), torch.tensor([3, 0, 9, 1, 2], dtype=torch.uint8)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            content = gzip.compress(idx(values)) if zipped else idx(values)
            write(tmp_path / name, f"{prefix}-{kind}-ubyte" + ".gz" * zipped, content)
        found = load(split, tmp_path)
        assert torch.equal(found.images, images[:, None]) and found.images.dtype == torch.uint8
        assert torch.equal(found.labels, labels.long()) and found.labels.dtype == torch.int64
    monkeypatch.setenv("FIRMLY_DATA", str(tmp_path))
    assert torch.equal(load("test").images, images[:, None])


def test_wrong_idx_files_are_refused(tmp_path):
    images, labels = idx(pixels(4, 28, 28)), idx(torch.tensor([0, 1, 2, 3], dtype=torch.uint8))
    folder = tmp_path / "mnist"

    def refused(images, labels, match):
        write(folder, "train-images-idx3-ubyte", images)
        write(folder, "train-labels-idx1-ubyte", labels)
        with pytest.raises(DataError, match=match):
            mnist("train", tmp_path)

    refused(images[:-1], labels, "has 3151 bytes; its header announces 16 \\+ 3136")
    refused(images + b"\0", labels, "has 3153 bytes")
    refused(labels, labels, "begins with '00 00 08 01'")
    refused(b"", labels, "begins with ''")
    refused(images[:10], labels, "its header announces")
    refused(images, idx(torch.zeros(3, dtype=torch.uint8)), "4 images and 3 labels")
    refused(images, idx(torch.full((4,), 10, dtype=torch.uint8)), "found 10")
    refused(idx(pixels(0, 28, 28)), labels, "announces 16 \\+ 0")
    (folder / "train-images-idx3-ubyte").unlink()
    write(folder, "train-images-idx3-ubyte.gz", gzip.compress(images)[:-20])
    with pytest.raises(DataError, match="not a complete gzip file"):
        mnist("train", tmp_path)
    with pytest.raises(DataError, match="'train' or 'test', given 'validation'"):
        mnist("validation", tmp_path)  # pyright: ignore[reportArgumentType]


def test_cifar_records(tmp_path):
    images, labels = pixels(10, 3, 32, 32), torch.arange(10, dtype=torch.uint8)
    for i in range(5):
        write(
            tmp_path / "cifar-10-batches-bin",
            f"data_batch_{i + 1}.bin",
            records(labels[2 * i :][:2], images[2 * i :][:2]),
        )
    write(tmp_path / "cifar-10-batches-bin", "test_batch.bin", records(labels[:3], images[:3]))
    train, test = cifar10("train", tmp_path), cifar10("test", tmp_path)
    assert torch.equal(train.images, images) and torch.equal(train.labels, labels.long())
    assert torch.equal(test.images, images[:3]) and test.images.dtype == torch.uint8

    coarse, fine = labels, labels + 90
    write(tmp_path / "cifar-100-binary", "train.bin", records(coarse, fine, images))
    assert torch.equal(cifar100("train", tmp_path).labels, fine.long())
    found = cifar100("train", tmp_path, labels="coarse")
    assert torch.equal(found.labels, coarse.long()) and torch.equal(found.images, images)
    with pytest.raises(SettingsError, match="'fine' or 'coarse', given 'Fine'"):
        cifar100("train", tmp_path, labels="Fine")  # pyright: ignore[reportArgumentType]


def test_wrong_cifar_files_are_refused(tmp_path):
    images, folder = pixels(2, 3, 32, 32), tmp_path / "cifar-10-batches-bin"
    good = records(torch.tensor([1, 2], dtype=torch.uint8), images)
    for content, match in (
        (good[:-1], "6145 bytes; it holds records of 3073"),
        (b"", "0 bytes"),
        (records(torch.tensor([1, 10], dtype=torch.uint8), images), "found 10"),
    ):
        write(folder, "test_batch.bin", content)
        with pytest.raises(DataError, match=match):
            cifar10("test", tmp_path)


def test_downloads_are_checked_and_kept(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no network in tests; put the official files into a folder"):
        mnist("test", tmp_path)
    images, labels = idx(pixels(2, 28, 28)), idx(torch.tensor([4, 2], dtype=torch.uint8))
    urls = {
        f"{image_sets.MNIST}/t10k-{kind}-ubyte.gz": gzip.compress(content)
        for kind, content in (("images-idx3", images), ("labels-idx1", labels))
    }
    served(monkeypatch, urls)
    with pytest.raises(DataError, match=r"expected 0fa7898d.*it was not kept"):
        mnist("test", tmp_path)
    assert not list(tmp_path.rglob("*ubyte*"))
    for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
        digest = hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(image_sets.CHECKSUMS, f"mnist/t10k-{kind}-ubyte", digest)
    first = mnist("test", tmp_path)
    served(monkeypatch, {})
    assert torch.equal(mnist("test", tmp_path).images, first.images) and first.labels.tolist() == [4, 2]
    served(monkeypatch, {url: b"<html>" for url in urls})
    with pytest.raises(DataError, match="not a complete gzip file"):
        mnist("test", tmp_path / "other")


def archive(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("cifar/train.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return stream.getvalue()


def test_archives_are_checked_and_stay_in_their_folder(tmp_path, monkeypatch):
    content = records(torch.tensor([7], dtype=torch.uint8), torch.tensor([70], dtype=torch.uint8), pixels(1, 3, 32, 32))
    tar = archive({"../../outside.bin": b"x", "/absolute/test.bin": content})
    served(monkeypatch, {image_sets.CIFAR100: tar})
    with pytest.raises(DataError, match=r"has MD5 .*expected 03b5dce0"):
        cifar100("test", tmp_path / "in")
    monkeypatch.setattr(image_sets, "CIFAR100_MD5", hashlib.md5(tar).hexdigest())
    assert cifar100("test", tmp_path / "in").labels.tolist() == [70]
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["test.bin"]
    with pytest.raises(DataError, match="does not hold train"):
        cifar100("train", tmp_path / "in")

    ten = records(torch.tensor([7], dtype=torch.uint8), pixels(1, 3, 32, 32))
    served(monkeypatch, {image_sets.CIFAR10: archive({"cifar-10-batches-bin/test_batch.bin": ten})})
    with pytest.raises(DataError, match="expected 8e2eb146"):
        cifar10("test", tmp_path / "in")
    monkeypatch.setitem(image_sets.CHECKSUMS, "cifar-10-batches-bin/test_batch.bin", hashlib.sha256(ten).hexdigest())
    assert cifar10("test", tmp_path / "in").labels.tolist() == [7]
    served(monkeypatch, {image_sets.CIFAR10: gzip.compress(b"no archive" * 100)})
    with pytest.raises(DataError, match="not a readable archive"):
        cifar10("train", tmp_path / "in")
