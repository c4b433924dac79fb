"""Stepping over what cannot be bounded, so that a refusal names everything that stands in the way, not only the first.

After a refused operation the trace goes on with new values of the shapes that the operation would have given. Nothing
that is recorded from there on is ever used: a trace with an obstacle ends in `NotCertifiable`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from firmly.certificates.system import Input
from firmly.errors import NotCertifiable

if TYPE_CHECKING:
    from firmly.certificates.signal import Signal, Tracer

PREFIX = "no sound bound is known for "


def step_over(error: NotCertifiable, signal: Signal, function: Callable, args: Any, kwargs: Any) -> Any:
    """Note the refusal, and give what stands for the result; raises the refusal where its shape is unknown."""
    tracer = signal.tracer
    tracer.obstacles.append(str(error))
    try:
        result = function(*without_data(args), **without_data(kwargs))
    except Exception:
        raise error from None
    return stand_in(tracer, result, error)


def without_data(tree: Any) -> Any:
    """The same arguments with tensors that have shapes and no values."""
    from firmly.certificates.signal import Signal

    if isinstance(tree, (Signal, Tensor)):
        return torch.empty(tree.shape, dtype=tree.dtype, device="meta")
    if isinstance(tree, dict):
        return {key: without_data(value) for key, value in tree.items()}
    return type(tree)(without_data(value) for value in tree) if type(tree) in (tuple, list) else tree


def stand_in(tracer: Tracer, result: Any, error: NotCertifiable) -> Any:
    from firmly.certificates.signal import Signal

    if isinstance(result, (tuple, list)):
        parts = [stand_in(tracer, part, error) for part in result]
        return type(result)(parts)
    if not isinstance(result, Tensor) or result.dim() == 0 or result.shape[0] != 1:
        raise error from None
    return Signal(tracer, tracer.system.append(Input("unknown", tuple(result.shape[1:]))))


def refusal(obstacles: list[str], stopped: bool) -> NotCertifiable:
    """One error for all obstacles of a trace; `stopped`: the trace could not go on after the last one."""
    found = list(dict.fromkeys(obstacles))
    if len(found) == 1:
        return NotCertifiable(found[0])
    lines = [f"{PREFIX}{len(found)} operations of this network:", *(f"  - {o.removeprefix(PREFIX)}" for o in found)]
    if stopped:
        lines.append("  (the trace stops at the last one: there may be more behind it)")
    return NotCertifiable("\n".join(lines))


@contextmanager
def located(place: str, arguments: Any) -> Iterator[None]:
    """While it is open, refusals about the traced values among the arguments say that they were met in `place`.

    For modules that run a graph of their own, whose nodes are no submodules.
    """
    from firmly.certificates.signal import signals_in

    tracers = {id(signal.tracer): signal.tracer for signal in signals_in(arguments)}.values()
    for tracer in tracers:
        tracer.path.append(place)
    try:
        yield
    finally:
        for tracer in tracers:
            tracer.path.pop()
