"""Calls of modules with other tensors in the place of theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def call_with(module: nn.Module, tensors: dict[str, Tensor], args: tuple[Any, ...]) -> Any:
    """module(*args) with these tensors in the place of its parameters and buffers of these names, wherever they stand.

    As `torch.func.functional_call`, also for modules that contain one module twice, as A.T beside A: there the function
    of torch puts back its own tensors instead of the parameters, which get no gradients from then on.
    """
    places: dict[Tensor, list[str]] = {}  # tensors are compared as objects
    owned: dict[str, Tensor] = {}
    for prefix, owner in module.named_modules():  # every module once
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            path = f"{prefix}.{name}" if prefix else name
            owned[path] = tensor
            places.setdefault(tensor, []).append(path)
    everywhere = {path: value for name, value in tensors.items() for path in places[owned[name]]}
    return torch.func.functional_call(module, everywhere, args, tie_weights=False)
