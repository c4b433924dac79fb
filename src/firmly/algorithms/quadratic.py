"""The proximal map of the data term 1/2 |A x - y|^2."""

from __future__ import annotations

from torch import Tensor

from firmly.algorithms.algorithm import Scalar
from firmly.linear.map import LinearMap
from firmly.linear.resolvent import Resolvent


def data_prox(A: LinearMap, y: Tensor, z: Tensor | None, weight: Scalar) -> Tensor:
    """argmin_x 1/2 |A x - y|^2 + weight / 2 |x - z|^2 = (A*A + weight I)^-1 (A* y + weight z); z = None is zero."""
    back = A.T(y)
    return Resolvent(A, weight)(back if z is None else back + weight * z)
