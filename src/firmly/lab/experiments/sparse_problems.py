"""Random sparse coding problems, and how networks are trained on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from firmly.networks.sparse_network import SparseNetwork


def dictionary(rows: int, atoms: int, seed: int) -> Tensor:
    """A Gaussian matrix with unit columns."""
    import numpy as np

    D = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, atoms)))
    return D / D.norm(dim=0)


def draw(batch: int, atoms: int, density: float, generator: torch.Generator) -> Tensor:
    """Bernoulli-Gaussian codes (batch, atoms)."""
    on = torch.rand(batch, atoms, generator=generator, dtype=torch.float64) < density
    return torch.randn(batch, atoms, generator=generator, dtype=torch.float64) * on


def noisy(y: Tensor, snr: float, generator: torch.Generator) -> Tensor:
    """White noise of standard deviation std(y) 10^(-snr / 20), sample by sample."""
    return y + y.std(1, keepdim=True) * 10 ** (-snr / 20) * torch.randn(y.shape, generator=generator, dtype=y.dtype)


class AllCodes(nn.Module):
    """The codes after every layer, for losses that see them all."""

    def __init__(self, network: SparseNetwork):
        super().__init__()
        self.network = network

    def forward(self, y: Tensor) -> list[Tensor]:
        return self.network.codes(y)


def optimise_fully(network: nn.Module, loss: Callable[[], Tensor], iterations: int = 60) -> None:
    """L-BFGS with a line search on the full batch, which ends with the best parameters it has seen.

    Learned steps are exponentials, and a line search may try one that is not finite: the search then starts again from
    the best parameters, without its memory, as long as that helps.
    """
    parameters = list(network.parameters())
    best, kept = float("inf"), [p.detach().clone() for p in parameters]
    while True:
        start = best
        optimiser = torch.optim.LBFGS(
            parameters, lr=0.5, max_iter=iterations, line_search_fn="strong_wolfe", tolerance_grad=0,
            tolerance_change=0,
        )  # fmt: skip

        def closure(optimiser: torch.optim.Optimizer = optimiser) -> Tensor:
            nonlocal best, kept
            optimiser.zero_grad()
            value = loss()
            value.backward()
            if float(value.detach()) < best:
                best, kept = float(value.detach()), [p.detach().clone() for p in parameters]
            return value

        optimiser.step(closure)
        finite = all(bool(torch.isfinite(p).all()) for p in parameters)
        with torch.no_grad():
            for parameter, value in zip(parameters, kept):
                parameter.copy_(value)
        if finite or not best < start:
            break
