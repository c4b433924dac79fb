"""Networks whose layers are steps of sparse coding: data in, a code out, and the code after every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from firmly.algorithms.algorithm import Algorithm, Condition, number
from firmly.networks.lista_layers import zeros
from firmly.networks.positive import MARGIN
from firmly.networks.unroll import Unrolled


class SparseNetwork(Unrolled):
    """z_0 = 0 and z_k = T_k(z_{k-1}, y) for k = 1..depth: `net(y)` is the code z_depth of y, (batch, *code).

    Made by `lista`. `layers[k - 1]` is T_k, an `Algorithm` of its own that `fm.solve` can iterate; what all layers use
    is registered once, under `shared`, the dictionary as `shared.D`.
    """

    def __init__(self, layers: Sequence[Algorithm], shared: nn.Module, variant: str):
        super().__init__(layers, shared, checkpoint=0)
        self.variant = variant
        for layer in layers:
            for name, module in list(layer._modules.items()):
                if any(module is common for common in shared.children()):
                    layer.__dict__[name] = layer._modules.pop(name)  # registered once, under `shared`

    def forward(self, y: Tensor, start: Tensor | None = None) -> Tensor:
        """The code (batch, *code) for data y (batch, *data), from the code `start` if given, else from zero."""
        return super().forward(y, zeros(self.layers[0], y) if start is None else start)

    def codes(self, y: Tensor, start: Tensor | None = None) -> list[Tensor]:
        """The codes after every layer, each (batch, *code); the last is `net(y)`."""
        first = self.layers[0]
        state, codes = first.start(y, zeros(first, y) if start is None else start), []
        for k, layer in enumerate(self.layers):
            state = layer(state, y, k)
            codes.append(layer.read(state))
        return codes

    def conditions(self) -> list[list[Condition]]:
        """The rules of every layer with their margins: a list for each layer, empty where none is known."""
        return [layer.conditions() for layer in self.layers]

    @torch.no_grad()
    def project(self) -> list[int]:
        """Put every step that has left its rule (too long to be certified) back to the end of its interval.

        Returns the numbers of the layers that were changed, from 0.
        """
        changed = []
        for k, layer in enumerate(self.layers):
            broken = [c.name for c in layer.conditions() if not c.holds and c.name in layer.scalars()]
            for name in broken:
                learned = parametrize.is_parametrized(layer, name)
                value = layer.parametrizations[name].original if learned else getattr(layer, name)
                end = number(layer.rule(name).high) * (1 - MARGIN)
                setattr(layer, name, torch.full_like(value, end) if isinstance(value, Tensor) else end)
            changed += [k] if broken else []
        return changed
