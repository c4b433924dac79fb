"""A recorded operation once more, on tensors: for its shapes, and for its values around a point."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from firmly.certificates.signal import Signal


def at_point(result: Any, signals: list[Signal], function: Callable, args: tuple, kwargs: dict) -> Any:
    """The result of a recorded operation, with its value if the values of all traced arguments are known."""
    parts = result if isinstance(result, tuple) else (result,)
    if any(signal.value is None for signal in signals):
        for part in parts:
            part.value = None
        return result

    def valued(tree: Any) -> Any:
        if is_traced(tree):
            assert tree.value is not None
            return tree.value.clone()  # the operation may be in place
        if type(tree) in (tuple, list):
            return type(tree)(valued(item) for item in tree)
        return {key: valued(item) for key, item in tree.items()} if isinstance(tree, dict) else tree

    values = function(*valued(args), **valued(kwargs))
    for part, value in zip(parts, values if isinstance(result, tuple) else (values,), strict=True):
        part.value = value
    return result


def on_tensors(function: Callable, args: Any, kwargs: Any, dtype: torch.dtype) -> Any:
    """What the function gives for tensors of these shapes, without computing it where torch can tell the shape."""

    def replaced(tree: Any, device: str) -> Any:
        if is_traced(tree):
            return torch.zeros(tree.shape, dtype=dtype, device=device)
        if isinstance(tree, Tensor):
            return tree.detach().to(device)
        if type(tree) in (tuple, list):
            return type(tree)(replaced(item, device) for item in tree)
        if isinstance(tree, dict):
            return {key: replaced(item, device) for key, item in tree.items()}
        return tree

    with torch.no_grad():
        try:
            return function(*replaced(args, "meta"), **replaced(kwargs, "meta"))
        except (RuntimeError, NotImplementedError):  # selections by a mask have no shape without their values
            return function(*replaced(args, "cpu"), **replaced(kwargs, "cpu"))


def shapes_of(result: Any) -> list[tuple[int, ...] | None]:
    """The shapes of a value or of several; None for what has none."""
    parts = result if isinstance(result, (tuple, list)) else (result,)
    return [tuple(part.shape) if is_traced(part) or isinstance(part, Tensor) else None for part in parts]


def is_traced(value: Any) -> bool:
    from firmly.certificates.signal import Signal

    return isinstance(value, Signal)
