"""Training inside a stability budget: a penalty on the differentiable bound, and a repair that ends below it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from firmly.certificates import Certificate, bound, certify, solved_multipliers
from firmly.errors import NotCertifiable


class BudgetPenalty:
    """weight * max(0, log(bound / (share * budget))): zero inside the budget, with a gradient to the weights outside.

    It is taken at every third step, with three times the weight. The multipliers of the bound are solved for every
    `refresh` steps and kept fixed in between, which leaves it an upper bound (and its gradient nearly that of the best
    one); at the first step of each epoch they are found without memory, so that a resumed training repeats them.
    """

    every = 3

    def __init__(self, budget: float, epoch: int = 100, weight: float = 0.02, share: float = 0.97, refresh: int = 30):
        self.target, self.weight, self.refresh, self.epoch = share * budget, weight, refresh, epoch
        self.multipliers: Tensor | None = None

    def __call__(self, network: nn.Module, step: int) -> Tensor:
        step %= self.epoch
        if step == 0:
            self.multipliers = None
        if step % self.every:
            return torch.zeros(())
        value = self.bound(network, fresh=step % self.refresh == 0)
        if not value.isfinite():
            value = self.bound(network, fresh=True)
        return self.every * self.weight * torch.relu(torch.log(value / self.target)).float()

    def bound(self, network: nn.Module, fresh: bool) -> Tensor:
        if fresh or self.multipliers is None:
            self.multipliers = solved_multipliers(network, start=self.multipliers)
        return bound(network, multipliers=self.multipliers)


def repair(
    network: nn.Module,
    budget: float,
    callback: Callable[[float], None] | None = None,
    max_steps: int = 400,
) -> Certificate:
    """Descend on the logarithm of the bound until `certify` proves that it is within the budget; returns that proof.

    Weights move only as far as the budget asks, the scalars of the layers (penalties, thresholds) ahead of the filters.
    Raises `NotCertifiable` if `max_steps` steps do not get there.
    """
    penalty = BudgetPenalty(budget)
    parameters = list(network.parameters())
    rates = [{"params": [p], "lr": 1e-2 if p.dim() <= 1 else 5e-4} for p in parameters]
    optimiser = torch.optim.Adam(rates)
    share = 0.9995
    for _ in range(max_steps):
        value = penalty.bound(network, fresh=False)
        if not value.isfinite() or value <= share * budget:
            value = penalty.bound(network, fresh=True)
        if callback is not None:
            callback(float(value.detach()))
        if value <= share * budget:
            certificate = certify(network)
            if certificate.upper <= budget:
                return certificate
            share *= 0.999
            continue
        optimiser.zero_grad(set_to_none=True)
        torch.log(value).backward()
        optimiser.step()
    raise NotCertifiable(
        f"{max_steps} steps did not bring the bound below the budget of {budget:g} (it is {value.item():.4g}): "
        "raise budget_epochs or the budget"
    )
