"""Linear maps that autograd cannot see into: their derivative is themselves, their gradient the adjoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Action = Callable[[Tensor], Tensor]  # on batches: (batch, *shape) -> (batch, *shape)


class LinearFunction(torch.autograd.Function):
    """forward(x), with gradient adjoint(g) and directional derivative forward(t); also under `torch.func`."""

    @staticmethod
    def forward(x: Tensor, forward: Action, adjoint: Action) -> Tensor:
        return forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Action, Action], output: Tensor) -> None:
        x, ctx.action, ctx.adjoint = inputs
        ctx.real = not x.is_complex()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        result = LinearFunction.apply(gradients[0], ctx.adjoint, ctx.action)
        return (result.real if ctx.real and result.is_complex() else result), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return LinearFunction.apply(tangents[0], ctx.action, ctx.adjoint)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None, None], x: Tensor, forward: Action, adjoint: Action) -> Any:
        if in_dims[0] is None:
            return LinearFunction.apply(x, forward, adjoint), None
        stacked = x.movedim(in_dims[0], 0)
        result = LinearFunction.apply(stacked.flatten(0, 1), forward, adjoint)
        return result.unflatten(0, stacked.shape[:2]), 0


def apply_linear(x: Tensor, forward: Action, adjoint: Action) -> Tensor:
    """forward(x) for a linear `forward` whose adjoint is `adjoint`."""
    return LinearFunction.apply(x, forward, adjoint)  # type: ignore[return-value]
