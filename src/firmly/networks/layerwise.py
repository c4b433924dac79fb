"""Layer-wise training: every layer is learned on the code it makes, before the next one is added."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from firmly.errors import DataError, SettingsError
from firmly.networks.lista_layers import zeros
from firmly.networks.sparse_network import SparseNetwork

RATES = (1.0, 0.2, 0.02)  # of the new layer alone, and twice of all layers so far
DECAY = 0.3  # of a layer's rate whenever one is added after it

Sampler = Callable[[torch.Generator], tuple[Tensor, Tensor]]


def train_layerwise(
    net: SparseNetwork, sample: Sampler, steps: int = 200, rate: float = 5e-4,
    generator: torch.Generator | None = None, callback: Callable[[int, float], None] | None = None,
) -> list[float]:  # fmt: skip
    """Train `net` in place on |z_k - truth|^2, for k = 1 .. depth, by Adam in three stages of `steps` steps each.

    In stage one only layer k moves, at `rate`; in stages two and three layers 1..k do, at 0.2 and 0.02 of their rates,
    which fall by 0.3 whenever a layer is added. `sample(generator)` draws data and codes (batch, m), (batch, n).
    Returns the last loss of every layer; `callback` gets (layer, loss) after every layer. What the layers share (the
    weights of "ti", the matrices of "lista") moves with them, at the rate of the newest layer.
    Source: Liu, Chen, Wang and Yin, ALISTA, 2019, and the recipe of Chen et al. 2018.
    """
    if steps < 1 or not rate > 0:
        raise SettingsError(f"steps is at least 1 and the rate positive, given {steps} and {rate}")
    generator = generator or torch.Generator().manual_seed(0)
    common = list(net.shared.parameters())
    multiplier: list[float] = []
    losses = []
    for k in range(len(net.layers)):
        multiplier = [DECAY * m for m in multiplier] + [1.0]
        loss = 0.0
        for stage, share in enumerate(RATES):
            layers = range(k, k + 1) if stage == 0 else range(k + 1)
            groups = [{"params": list(net.layers[i].parameters()), "lr": rate * share * multiplier[i]} for i in layers]
            groups += [{"params": common, "lr": rate * share}]
            optimiser = torch.optim.Adam([g for g in groups if g["params"]])
            for _ in range(steps):
                y, truth = sample(generator)
                error = (code_after(net, y, k) - truth).square().sum() / truth.square().sum()
                optimiser.zero_grad(set_to_none=True)
                error.backward()
                optimiser.step()
                loss = float(error.detach())
        if not loss < float("inf"):
            raise DataError(f"training of layer {k} ended with the loss {loss}: lower the rate {rate}")
        losses.append(loss)
        if callback is not None:
            callback(k, loss)
    return losses


def code_after(net: SparseNetwork, y: Tensor, k: int) -> Tensor:
    """The code after layer k = 0, 1, ..."""
    state = net.layers[0].start(y, zeros(net.layers[0], y))
    for number, layer in enumerate(net.layers[: k + 1]):
        state = layer.step(state, y, number)
    return net.layers[k].read(state)
