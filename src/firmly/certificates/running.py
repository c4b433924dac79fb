"""Which submodule of a network is running."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

from torch import nn


@contextmanager
def module_paths(module: nn.Module, path: list[str]):
    """While it is open, the last entry of `path` names the submodule that is running."""

    def enter(name: str) -> Callable:
        return lambda *_: path.append(name)

    hooks = []
    for name, child in module.named_modules():
        if name:
            hooks.append(child.register_forward_pre_hook(enter(f"'{name}' ({type(child).__name__})")))
            hooks.append(child.register_forward_hook(lambda *_: path.pop() and None))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
