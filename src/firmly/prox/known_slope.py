"""A function applied where its slopes are known to lie in a smaller interval than on the whole line."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from firmly.prox.prior import Slope


def with_slope(function: Callable[[Tensor], Tensor], slope: Slope, x: Tensor) -> Tensor:
    """function(x), entry by entry, for x that stays where the slopes of the function are in [low, high].

    That is a promise of the caller: a trace records a nonlinearity with these slopes and does not look at the function.
    """
    if has_torch_function((x,)):
        return handle_torch_function(with_slope, (x,), function, slope, x)
    return function(x)
