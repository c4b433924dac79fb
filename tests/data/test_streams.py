"""Labelled streams: those that ship with the package, and the official file of Covertype."""

from __future__ import annotations

import gzip

import pytest
import torch

from firmly.data import covtype, elec2, streams
from firmly.errors import DataError


def no_change(labels):
    return float((labels[1:] == labels[:-1]).double().mean())


def test_elec2():
    x, labels = elec2()
    assert x.shape == (45312, 6) and x.dtype == torch.float32 and 0 <= float(x.min()) <= float(x.max()) <= 1
    assert labels.dtype == torch.int64 and sorted(labels.unique().tolist()) == [0, 1]
    assert no_change(labels) == pytest.approx(0.8533, abs=5e-5)
    torch.testing.assert_close(x[:48, 0], torch.arange(48) / 47, rtol=0, atol=1e-5)  # the time of day


FIRST = [2596, 51, 3, 258, 0, 510, 221, 232, 148, 6279]  # as printed on many pages about this file


def test_covtype():
    x, labels = covtype()
    assert x.shape == (50000, 54) and x.dtype == torch.float32
    assert x[0, :10].tolist() == FIRST and x[0].nonzero().flatten().tolist()[-2:] == [10, 42] and labels[0] == 4
    assert bool((x[:, 10:14].sum(1) == 1).all() and (x[:, 14:].sum(1) == 1).all())
    # the file begins with 11,340 + 3,780 rows in which all kinds are equally frequent
    assert labels[:15120].bincount().tolist() == [2160] * 7
    assert no_change(labels) == pytest.approx(0.8441, abs=5e-5)


def row(numbers, area=0, soil=28, label=5):
    ones = [int(k == area) for k in range(4)] + [int(k == soil) for k in range(40)]
    return ",".join(map(str, [*numbers, *ones, label]))


@pytest.mark.parametrize("name", ["covtype.data.gz", "covtype.data"])
def test_the_official_file(tmp_path, monkeypatch, name):
    monkeypatch.setenv("FIRMLY_DATA", str(tmp_path))
    content = "\n".join([row(FIRST), row(FIRST[::-1], 3, 0, 7)]).encode()
    (tmp_path / "covtype").mkdir()
    (tmp_path / "covtype" / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    x, labels = covtype(full=True)
    assert torch.equal(x[0], covtype().x[0]) and labels.tolist() == [4, 6]
    assert x[1, :10].tolist() == FIRST[::-1] and x[1, 10:].nonzero().flatten().tolist() == [3, 4]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not hold"), (b"no gzip", "is not the official file"),
        (gzip.compress(b"1,2,x"), "is not the official file"), (gzip.compress(b"1,2,3"), "rows of 3 numbers"),
        (gzip.compress(row(FIRST, soil=40).encode()), "one soil"),
        (gzip.compress(row(FIRST, label=8).encode()), "labels"),
        (gzip.compress(row(FIRST).encode())[:-9], "is not the official file"),
    ],
)  # fmt: skip
def test_files_that_are_not_covertype(tmp_path, content, said):
    (tmp_path / "covtype").mkdir()
    if content is not None:
        (tmp_path / "covtype" / "covtype.data.gz").write_bytes(content)
    with pytest.raises(DataError, match=said):
        covtype(full=True, folder=tmp_path)


@pytest.mark.parametrize(("read", "name"), [(elec2, "electricity/elec2.npz"), (covtype, "covertype/covtype.npz")])
def test_a_damaged_file_is_refused(monkeypatch, read, name):
    monkeypatch.setitem(streams.CHECKSUMS, name, "0" * 16)
    with pytest.raises(DataError, match="reinstall"):
        read()
