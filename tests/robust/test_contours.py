"""Contours moved by offsets, and offsets found back."""

from __future__ import annotations

import pytest
import torch

from firmly.errors import DataError, SettingsError, ShapeError
from firmly.robust import contour_offsets, move_contours


def discs(size=48):
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    radius = ((rows - 23.5).square() + (columns - 20.5).square()).sqrt()
    inner = torch.where(radius < 8, 2, torch.where(radius < 16, 1, 0))
    return torch.stack([inner, inner.roll(5, 1)])


def test_a_line_moves_by_the_difference_of_offsets():
    labels = torch.zeros(1, 30, 30, dtype=torch.long)
    labels[:, 10:20], labels[:, 20:] = 1, 2
    found = move_contours(labels, torch.tensor([0.0, 1.0, -2.0]))[0, :, 0]
    assert torch.equal(found, torch.tensor([0] * 9 + [1] * 14 + [2] * 7))
    assert torch.equal(move_contours(labels, torch.zeros(3)), labels)
    assert torch.equal(move_contours(labels, torch.full((3,), 5.0)), labels)


def test_void_and_absent_classes_stay():
    labels = discs()
    labels[:, :, :12] = 255
    found = move_contours(labels, torch.tensor([0.0, 2.0, 1.0, 9.0]))
    assert torch.equal(found == 255, labels == 255) and not (found == 3).any()


def test_contours_do_not_see_void():
    labels = torch.zeros(1, 20, 20, dtype=torch.long)
    labels[:, :, 10:] = 1
    moved = move_contours(labels, torch.tensor([0.0, 2.0]))
    labels[:, 8:12, 6:9] = 255
    beside = move_contours(labels, torch.tensor([0.0, 2.0]))
    assert torch.equal(beside[labels != 255], moved[labels != 255])


@pytest.mark.parametrize("offsets", [(0.0, 2.0, 0.0), (0.0, -1.0, 2.0), (0.0, 0.0, -2.0)])
def test_habits_are_found_and_undone(offsets):
    right = discs()
    wrong = move_contours(right, torch.tensor(offsets))
    back = contour_offsets(wrong, right, 3)
    assert back[0] == 0
    left = (move_contours(wrong, back) != right).sum() / (wrong != right).sum()
    assert left < 0.02
    assert torch.equal(contour_offsets(right, right, 3), torch.zeros(3, dtype=torch.float64))


def test_refusals():
    right = discs()
    with pytest.raises(ShapeError, match="differ"):
        contour_offsets(right, right[:1], 3)
    with pytest.raises(SettingsError, match="step"):
        contour_offsets(right, right, 3, largest=0.1)
    with pytest.raises(DataError, match="void"):
        contour_offsets(right, torch.full_like(right, 255), 3)
    with pytest.raises(DataError, match="between 0 and 1"):
        move_contours(right, torch.zeros(2))
    with pytest.raises(ShapeError, match="one for each class"):
        move_contours(right, torch.zeros(2, 3))
