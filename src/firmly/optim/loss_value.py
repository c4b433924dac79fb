"""The loss as a number."""

from __future__ import annotations

import math

from torch import Tensor

from firmly.errors import DataError


def loss_value(loss: float | Tensor) -> float:
    """`loss` as a float; `DataError` unless it is finite."""
    value = float(loss.detach() if isinstance(loss, Tensor) else loss)
    if not math.isfinite(value):
        raise DataError(f"the loss is {value}: training diverged; go back to a checkpoint and lower the rate")
    return value
