"""Wrong labels found: formulas, brute force, void, and errors that were put there."""

from __future__ import annotations

import pytest
import torch

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.robust import ClassConfusion, image_quality, label_errors, pixel_quality


def example(seed=0, classes=4):
    generator = torch.Generator().manual_seed(seed)
    probabilities = (2 * torch.randn(3, classes, 6, 5, generator=generator, dtype=torch.float64)).softmax(1)
    labels = torch.randint(0, classes, (3, 6, 5), generator=generator)
    labels[:, 0] = 255
    return probabilities, labels


def test_scores_are_their_formulas():
    p, y = example()
    own, margin, entropy = (pixel_quality(p, y, score) for score in ("self-confidence", "margin", "entropy-weighted"))
    ratios = torch.zeros(3, 6, 5, dtype=torch.float64)
    for b in range(3):
        for i in range(6):
            for j in range(5):
                if y[b, i, j] == 255:
                    assert own[b, i, j].isnan() and margin[b, i, j].isnan() and entropy[b, i, j].isnan()
                    continue
                law, label = p[b, :, i, j], int(y[b, i, j])
                others = max(float(law[k]) for k in range(4) if k != label)
                assert float(own[b, i, j]) == float(law[label])
                assert float(margin[b, i, j]) == pytest.approx((float(law[label]) - others + 1) / 2, abs=1e-15)
                ratios[b, i, j] = law[label] / -(law * law.log()).sum()
    valid = y != 255
    torch.testing.assert_close(entropy[valid], (ratios / ratios.max())[valid])


def test_images_are_ranked_by_their_worst_pixels():
    quality = torch.tensor([[0.9, 0.2, torch.nan], [0.6, 0.5, 0.7], [torch.nan] * 3], dtype=torch.float64)
    soft = image_quality(quality)
    for image, known in ((0, [0.9, 0.2]), (1, [0.6, 0.5, 0.7])):
        weights = [2.718281828459045 ** ((1 - s) / 0.1) for s in known]
        expected = sum(s * w for s, w in zip(known, weights)) / sum(weights)
        assert float(soft[image]) == pytest.approx(expected, abs=1e-12)
    assert soft[2].isnan() and soft[0] < soft[1]
    assert image_quality(quality, 0.0)[:2].tolist() == [0.2, 0.5]
    assert float(image_quality(quality, 1e9)[1]) == pytest.approx(0.6, abs=1e-8)
    assert image_quality(quality[:, None]).shape == (3,)


@pytest.mark.parametrize("prune", ["class", "noise-rate", "both", "rank", "confusion"])
def test_label_errors_are_those_of_a_loop(prune):
    p, y = example(3)
    found = label_errors(p, y, prune)
    pixels = [(b, i, j) for b in range(3) for i in range(6) for j in range(5) if y[b, i, j] != 255]
    law = {q: p[q[0], :, q[1], q[2]].tolist() for q in pixels}
    given = {q: int(y[q]) for q in pixels}
    of_class = [[q for q in pixels if given[q] == k] for k in range(4)]
    t = [sum(law[q][k] for q in of_class[k]) / len(of_class[k]) for k in range(4)]
    assert found.thresholds.tolist() == pytest.approx(t, abs=1e-12)
    best = {q: max(range(4), key=lambda k: law[q][k]) for q in pixels}
    sure = {q for q in pixels if law[q][best[q]] >= t[best[q]]}
    C = [[sum(given[q] == j and best[q] == k for q in sure) for k in range(4)] for j in range(4)]
    J = [[C[j][k] / sum(C[j]) * len(of_class[j]) for k in range(4)] for j in range(4)]
    assert (found.joint * len(pixels)).tolist() == [pytest.approx(row, abs=1e-12) for row in J]

    def first(some, score, count):
        return set(sorted(some, key=score)[:count])

    others = [[k for k in range(4) if k != j] for j in range(4)]
    by_class, by_rate = set(), set()
    for j in range(4):
        by_class |= first(of_class[j], lambda q, j=j: law[q][j], round(sum(J[j][k] for k in others[j])))
        for k in others[j]:
            by_rate |= first(of_class[j], lambda q, j=j, k=k: law[q][j] - law[q][k], round(J[j][k]))
    total = sum(C[j][k] for j in range(4) for k in others[j])
    by_rank = first(pixels, lambda q: law[q][given[q]], total)
    chosen = {"class": by_class, "noise-rate": by_rate, "both": by_class & by_rate, "rank": by_rank, "confusion": sure}
    expected = {q for q in chosen[prune] if best[q] != given[q]}
    assert {tuple(q) for q in found.wrong.nonzero().tolist()} == expected
    assert all(int(found.believed[q]) == (best[q] if q in expected else given[q]) for q in pixels)
    assert not found.wrong[:, 0].any() and (found.believed[:, 0] == 255).all()


def test_errors_that_were_put_there_are_found():
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(4, 3, 8, 8, generator=generator).argmax(1).repeat_interleave(4, 1).repeat_interleave(4, 2)
    p = (
        3.0 * torch.nn.functional.one_hot(truth, 3).movedim(-1, 1) + torch.randn(4, 3, 32, 32, generator=generator)
    ).softmax(1)
    noisy = ClassConfusion(0.2, smoothness=0.0)(truth, 3)
    found = label_errors(p, noisy.labels)
    hit = (found.wrong & noisy.changed).sum() / noisy.changed.sum()
    precision = (found.wrong & noisy.changed).sum() / found.wrong.sum()
    assert hit > 0.8 and precision > 0.8
    law = found.joint / found.joint.sum(1, keepdim=True)
    assert float((1 - law.diagonal())[1:].mean()) == pytest.approx(0.2, abs=0.06)
    quality = pixel_quality(p, noisy.labels)
    assert quality[noisy.changed].mean() < 0.3 < 0.7 < quality[~noisy.changed].mean()
    half = noisy.labels.clone()
    half[:2] = truth[:2]
    assert set(image_quality(pixel_quality(p, half)).argsort()[:2].tolist()) == {2, 3}


def test_refusals():
    p, y = example()
    with pytest.raises(DataError, match="softmax"):
        pixel_quality(p + 0.5, y)
    with pytest.raises(ShapeError, match="do not fit"):
        pixel_quality(p, y[:2])
    with pytest.raises(SettingsError, match="score is one of"):
        pixel_quality(p, y, "best")
    with pytest.raises(DataError, match="void"):
        label_errors(p, torch.full_like(y, 255))
    with pytest.raises(SettingsError, match="prune is one of"):
        label_errors(p, y, "all")
    with pytest.raises(SettingsError, match="temperature"):
        image_quality(p[:, 0], -1.0)
