"""Data of the study of optimisers: streams that drift, pictures that turn, chunks, classes that come in pairs."""

from __future__ import annotations

import pytest
import torch

from firmly.data import covtype
from firmly.lab.experiments.bregman_data import Samples, Split
from firmly.lab.experiments.optim import OptimSettings, read, tasks
from firmly.lab.experiments.optim_data import Chunks, Stream, chunked, electricity, forest, incremental, whole


def test_streams():
    pytest.importorskip("sklearn", reason="needs scikit-learn, the extra `sklearn`")
    settings = OptimSettings(length=600, parts=3, first=0.3, task=("stream", "permuted"))
    assert tasks(settings) == ["rotating", "permuted", "elec2", "covtype"]
    rotating, permuted = read("rotating", settings), read("permuted", settings)
    assert isinstance(rotating, Stream) and isinstance(permuted, Stream)
    assert permuted.drifts == (200, 400) and rotating.drifts == ()
    torch.testing.assert_close(rotating.labels, permuted.labels)
    torch.testing.assert_close(rotating.x[0], permuted.x[0], rtol=0, atol=1e-5)  # neither has changed yet
    original = read("permuted", OptimSettings(length=600, parts=2, first=0.5))
    assert isinstance(original, Stream)
    assert sorted(permuted.x[299].tolist()) == sorted(original.x[299].tolist())
    assert not torch.equal(permuted.x[299], original.x[299])


def test_turned_pictures():
    pytest.importorskip("sklearn", reason="needs scikit-learn, the extra `sklearn`")
    from firmly.lab.experiments.optim_data import _repeated, rotating

    _, x, _ = _repeated("digits", 301, 0)
    turned = rotating("digits", 301, 0).x.reshape(-1, 8, 8)
    torch.testing.assert_close(turned[0], x[0, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(turned[-1], x[-1, 0].flip(0, 1), rtol=0, atol=1e-5)
    quarter = x[150, 0]
    assert min(float((turned[150] - quarter.rot90(k)).abs().max()) for k in (1, 3)) < 1e-5


def test_spirals_need_nothing():
    data = read("spirals", OptimSettings(train=40, test=20))
    assert isinstance(data, Chunks) and data.samples == 40 and data.classes == 2 and len(data.chunks) == 1


def labelled(count: int, classes: int) -> Samples:
    labels = torch.arange(count) % classes
    return Samples(torch.arange(count).float()[:, None], labels)


def test_chunks():
    split = Split("x", labelled(23, 5), labelled(7, 5), labelled(11, 5), 5, None)
    found = chunked(split, 4)
    assert [c.x.flatten().tolist() for c in found.chunks] == [list(range(5 * k, 5 * k + 5)) for k in range(4)]
    assert found.samples == 20 and len(found.tests) == 4 and found.validation is split.validation
    alone = whole(split)
    assert alone.chunks == (split.train,) and alone.tests == (split.test,) and not alone.incremental


def test_classes_come_in_pairs():
    found = incremental(Split("x", labelled(26, 6), labelled(12, 6), labelled(18, 6), 6, None))
    assert [sorted(c.labels.unique().tolist()) for c in found.chunks] == [[0, 1], [2, 3], [4, 5]]
    assert {len(c.x) for c in found.chunks} == {8}
    assert [t.labels.unique().tolist() for t in found.tests] == [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert found.validation.labels.unique().tolist() == [0, 1] and found.incremental


def test_forests_are_scaled_by_their_first_part():
    stream = forest(1000, 0.2)
    torch.testing.assert_close(stream.x[:200, :10].mean(0), torch.zeros(10), rtol=0, atol=1e-4)
    assert sorted(stream.x[:, 10:].unique().tolist()) == [0, 1] and stream.classes == 7
    torch.testing.assert_close(stream.x[:, 10:], covtype().x[:1000, 10:])
    assert float(covtype().x[0, 0]) == 2596  # the data themselves are left alone
    assert (
        stream.no_change()
        != stream.no_change(0.5)
        == float((stream.labels[501:] == stream.labels[500:-1]).double().mean())
    )


def test_electricity_is_scaled_by_its_first_part():
    stream = electricity(1000, 0.1)
    torch.testing.assert_close(stream.x[:100, :3].mean(0), torch.zeros(3), rtol=0, atol=1e-4)
    again = electricity(2000, 0.05)
    torch.testing.assert_close(stream.x, again.x[:1000])
