"""Mass that moves for a reward, at a cost, within a budget: the linear program behind Wasserstein sets on labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from firmly.errors import NotConverged

MAX_ITERATIONS = 500


class Plans(NamedTuple):
    """Two plans (atoms,), the target of every atom, that are both optimal at the price; their mix spends the budget.

    `rich` costs at least the budget and `poor` at most; per owner, `slack` says that the budget is not binding: then
    `rich` is the plan.
    """

    rich: Tensor
    poor: Tensor
    rich_cost: Tensor
    poor_cost: Tensor
    price: Tensor
    slack: Tensor

    def share(self, budget: float | Tensor) -> Tensor:
        """The share (owners,) of the rich plan in the mix, differentiable in the budget."""
        apart = torch.where(self.slack, 1, self.rich_cost - self.poor_cost)
        return torch.where(self.slack, 1, (budget - self.poor_cost) / apart)


def transport(reward: Tensor, cost: Tensor, mass: Tensor, owner: Tensor, owners: int, budget: float) -> Plans:
    """For every owner o, max over targets of sum_a mass_a reward_{a, k(a)} with sum_a mass_a cost_{a, k(a)} <= budget.

    The sums go over the atoms a of o, atoms may be split between targets. `reward` and `cost` are (atoms, targets), a
    cost of infinity forbids a target, and every atom has one of cost 0. The dual

        min over price >= 0 of price budget + sum_a mass_a max_k (reward_ak - price cost_ak)

    is convex and piecewise linear. Two of its tangents, one of either slope, are cut by a third at their intersection
    until the dual touches them there: then that price is exact, and the two plans behind the tangents are optimal.
    Atoms with the same target in both plans keep it, so that the work of a step shrinks with the bracket.
    """

    def total(values: Tensor, of: Tensor) -> Tensor:
        return reward.new_zeros(owners).index_add(0, of, values)

    allowed = cost.isfinite()
    cost = torch.where(allowed, cost, 0)
    reward = torch.where(allowed, reward, -torch.inf)
    best = reward.amax(1, keepdim=True)
    rich = torch.where(reward == best, cost, torch.inf).argmin(1)
    free = torch.where(allowed, cost, torch.inf).amin(1, keepdim=True)
    poor = torch.where(allowed & (cost == free), reward, -torch.inf).argmax(1)

    rich_reward, rich_cost = (total(mass * at(table, rich), owner) for table in (reward, cost))
    poor_reward, poor_cost = (total(mass * at(table, poor), owner) for table in (reward, cost))
    slack = rich_cost <= budget
    price = torch.zeros_like(rich_cost)
    binding = ~slack
    open_atoms = torch.arange(len(mass), device=mass.device)
    for _ in range(MAX_ITERATIONS):
        if not bool(binding.any()):
            return Plans(rich, poor, rich_cost, poor_cost, price, slack)
        price = torch.where(binding, (rich_reward - poor_reward) / (rich_cost - poor_cost).clamp(min=1e-300), price)
        open_atoms = open_atoms[(rich[open_atoms] != poor[open_atoms]) & binding[owner[open_atoms]]]
        of, weight = owner[open_atoms], mass[open_atoms]
        gains, costs, old = reward[open_atoms], cost[open_atoms], rich[open_atoms]
        new = (gains - price[of].unsqueeze(1) * costs).argmax(1)
        new_reward = rich_reward + total(weight * (at(gains, new) - at(gains, old)), of)
        new_cost = rich_cost + total(weight * (at(costs, new) - at(costs, old)), of)
        above = (new_reward - rich_reward) - price * (new_cost - rich_cost)  # the dual above its tangents
        rounding = 1e-14 * total(weight * (at(gains, new) - at(gains, old)).abs(), of) + 4e-16 * rich_reward.abs()
        binding = binding & (above > rounding)
        to_rich, to_poor = binding & (new_cost > budget), binding & (new_cost <= budget)
        rich_reward = torch.where(to_rich, new_reward, rich_reward)
        rich_cost = torch.where(to_rich, new_cost, rich_cost)
        poor_reward = torch.where(to_poor, new_reward, poor_reward)
        poor_cost = torch.where(to_poor, new_cost, poor_cost)
        rich[open_atoms] = torch.where(to_rich[of], new, rich[open_atoms])
        poor[open_atoms] = torch.where(to_poor[of], new, poor[open_atoms])
    raise NotConverged(f"the price of a Wasserstein budget of {budget:g} was not found in {MAX_ITERATIONS} steps")


def at(table: Tensor, target: Tensor) -> Tensor:
    return table.gather(1, target.unsqueeze(1)).squeeze(1)
