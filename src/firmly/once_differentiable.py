"""Functions with a first derivative and no second, which is refused however it is asked for."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from firmly.errors import NotDifferentiable

F = TypeVar("F", bound=type[torch.autograd.Function])


def once_differentiable(function: F) -> F:
    """A class decorator: a second derivative through `backward` raises `NotDifferentiable`.

    PyTorch's decorator of that name does so only where the incoming gradient itself wants one: under a linear loss, or
    beside other terms, it leaves out the missing part without a word. Here gradients stay attached to every input that
    wants a derivative, by a step that refuses.
    """
    forward, backward = function.forward, function.backward

    def remembering(ctx: Any, *inputs: Any) -> Any:
        ctx.attached_to = tuple(x for x in inputs if isinstance(x, Tensor) and x.requires_grad)
        return forward(ctx, *inputs)

    def refusing(ctx: Any, *cotangents: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *cotangents)
        if not torch.is_grad_enabled():
            return found
        ends = (*ctx.attached_to, *(c for c in cotangents if isinstance(c, Tensor) and c.requires_grad))
        gradients = found if isinstance(found, tuple) else (found,)
        return tuple(_End.apply(function.__name__, g, *ends) if isinstance(g, Tensor) else g for g in gradients)

    function.forward, function.backward = staticmethod(remembering), staticmethod(refusing)  # type: ignore[method-assign]
    return function


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *ends: Tensor) -> Tensor:
        ctx.name = name
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise NotDifferentiable(
            f"{ctx.name} is differentiated once: its derivative holds fixed what a second one would have to follow. "
            "Take the first without create_graph"
        )
