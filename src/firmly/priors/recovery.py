"""How much of a true dictionary was found."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.errors import ShapeError


def recovery(dictionary: Tensor, truth: Tensor) -> float:
    """The mean of |cos| between the atoms of two dictionaries (m, n), under the best one-to-one assignment.

    1 means equal up to order, sign and scale. Needs scipy.
    """
    from scipy.optimize import linear_sum_assignment

    if dictionary.dim() != 2 or dictionary.shape != truth.shape:
        raise ShapeError(f"both dictionaries are matrices of one shape, given {tuple(dictionary.shape)} and "
                         f"{tuple(truth.shape)}")  # fmt: skip
    unit = [torch.nn.functional.normalize(d.detach().double().cpu(), dim=0) for d in (dictionary, truth)]
    cosines = (unit[0].mT @ unit[1]).abs()
    rows, columns = linear_sum_assignment(-cosines.numpy())
    return float(cosines[rows, columns].mean())
