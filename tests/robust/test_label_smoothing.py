"""Labels that are soft at contours: the published kernel by brute force, void, volumes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from firmly.errors import DataError, SettingsError
from firmly.robust import BoundaryJitter, smoothed_labels


@pytest.mark.parametrize("shape", [(2, 5, 6), (1, 4, 3, 5)])
def test_brute_force(shape):
    labels = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(0))
    found = smoothed_labels(labels, 3, sigma=0.8).double()
    axes, sizes = len(shape) - 1, shape[1:]
    for place in itertools.product(*(range(n) for n in shape)):
        weights = [0.0, 0.0, 0.0]
        for offset in itertools.product((-1, 0, 1), repeat=axes):
            if any(offset):
                inside = [min(max(x + o, 0), n - 1) for x, o, n in zip(place[1:], offset, sizes)]
                weights[int(labels[(place[0], *inside)])] += math.exp(-sum(o * o for o in offset) / (2 * 0.8**2))
        law = [w / sum(weights) / 2 for w in weights]
        law[int(labels[place])] += 0.5
        assert found[(place[0], slice(None), *place[1:])].tolist() == pytest.approx(law, abs=1e-6)


def test_one_class_stays_hard_and_void_is_nobody():
    labels = torch.zeros(1, 6, 6, dtype=torch.long)
    labels[:, :, 3:] = 1
    laws = smoothed_labels(labels, 2)
    assert bool((laws[:, 0, :, :2] == 1).all()) and bool((laws[:, 1, :, 4:] == 1).all())
    assert bool((laws[:, 0, :, 2] > 0.5).all()) and bool((laws[:, 1, :, 2] > 0).all())
    hidden = labels.clone()
    hidden[:, :, 3:] = 255
    laws = smoothed_labels(hidden, 2)
    assert bool((laws[:, 0, :, :3] == 1).all()) and bool((laws[:, :, :, 3:] == 0).all())
    alone = torch.full((1, 5, 5), 255)
    alone[0, 2, 2] = 1
    assert smoothed_labels(alone, 2)[0, :, 2, 2].tolist() == [0.0, 1.0]


def test_one_smoothed_map_is_nearer_to_many_people_than_a_hard_one():
    truth = torch.zeros(1, 40, 40, dtype=torch.long)
    truth[:, 10:30, 8:25], truth[:, 20:34, 20:36] = 1, 2
    people = torch.cat([BoundaryJitter(0.7)(truth, 3, seed=k).labels for k in range(60)])
    mean = torch.nn.functional.one_hot(people, 3).movedim(-1, 1).float().mean(0)
    hard = torch.nn.functional.one_hot(people, 3).movedim(-1, 1).float()
    soft = smoothed_labels(people, 3)
    assert (soft - mean).square().sum(1).mean() < 0.7 * (hard - mean).square().sum(1).mean()


def test_bad_input_is_refused():
    with pytest.raises(SettingsError, match="sigma"):
        smoothed_labels(torch.zeros(1, 4, 4, dtype=torch.long), 2, 0.0)
    with pytest.raises(DataError, match="between 0 and 1"):
        smoothed_labels(torch.full((1, 4, 4), 2), 2)
