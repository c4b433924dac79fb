"""The two problems of `firmly run tv`: random jumps seen through a random matrix, and a coarsely sampled heartbeat."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from firmly.algorithms import Fista
from firmly.algorithms.algorithm import Algorithm
from firmly.data import ecg
from firmly.linear import Dense
from firmly.linear.map import LinearMap
from firmly.networks.learned_tv import largest_tv_weight, tv_objective
from firmly.prox import TV1D


class Jumps(NamedTuple):
    """Data (count, m) for training and test, and the smallest objective of each."""

    A: Dense
    train: Tensor
    test: Tensor
    best_train: Tensor
    best_test: Tensor


def jumps(n: int, m: int, count: int, weight: float, seed: int) -> Jumps:
    """Signals of one random jump, noise of the same power, scaled so that weight 1 makes the best signal constant.

    Source of the setting: Cherkaoui, Sulam and Moreau, Learning to solve TV regularised problems with unrolled
    algorithms, 2020, section 4.
    """
    import numpy as np

    random = np.random.RandomState(seed)
    rows = random.randn(n, m)
    A = Dense(torch.from_numpy(rows.T / np.linalg.norm(rows, axis=1)).contiguous())
    z = np.zeros((2 * count, n))
    z[np.arange(2 * count), random.randint(n, size=2 * count)] = random.randn(2 * count)
    y = A(torch.from_numpy(z).cumsum(-1))
    noise = torch.from_numpy(random.randn(*y.shape))
    y = y + noise * y.norm() / noise.norm()
    y = y / largest_tv_weight(A, y)[:, None]
    train, test = y[:count], y[count:]
    return Jumps(A, train, test, smallest(A, weight, train), smallest(A, weight, test))


@torch.no_grad()
def smallest(A: LinearMap, weight: float, y: Tensor, iterations: int = 300) -> Tensor:
    """min_u of the objective by FISTA with restarts, each signal's best value on the way: (batch,)."""
    return tv_objective(A, weight, iterated(Fista(A, TV1D(weight), restart=50), y, iterations)[-1], y)


@torch.no_grad()
def iterated(algorithm: Algorithm, y: Tensor, iterations: int, start: Tensor | None = None) -> list[Tensor]:
    """What the algorithm reads after 1, 2, ... iterations."""
    state, found = algorithm.start(y, start), []
    for k in range(iterations):
        state = algorithm.step(state, y, k)
        found.append(algorithm.read(state))
    return found


class Heartbeat(NamedTuple):
    """Windows of an electrocardiogram in millivolts (count, n), and what a coarse sensor sees of them (count, m)."""

    A: Dense
    truth: Tensor
    data: Tensor
    test_truth: Tensor
    test_data: Tensor


def heartbeat(n: int, count: int, noise: float, seed: int) -> Heartbeat:
    """Windows of n samples at 180 Hz; the sensor averages four samples, reports every second time, and adds noise.

    Training windows lie in the first three quarters of the record; as many test windows at most follow one another
    after them.
    """
    signal = ecg().double().reshape(-1, 2).mean(1)
    split = 3 * len(signal) // 4
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(split - n, (count,), generator=generator)
    truth = torch.stack([signal[s : s + n] for s in starts.tolist()])
    test_truth = signal[split : split + len(signal[split:]) // n * n].reshape(-1, n)[:count]
    matrix = torch.zeros(n // 2 - 1, n, dtype=torch.float64)
    for row in range(len(matrix)):
        matrix[row, 2 * row : 2 * row + 4] = 0.25
    A = Dense(matrix)
    seen = [A(x) for x in (truth, test_truth)]
    seen = [y + noise * torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in seen]
    return Heartbeat(A, truth, seen[0], test_truth, seen[1])
