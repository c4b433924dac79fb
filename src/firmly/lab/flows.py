"""Training normalising flows by exact likelihood, and invertible Bregman layers beside an i-ResNet of equal size."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from firmly.lab.flow_data import Density, Table, table_split
from firmly.lab.run_folder import RunFolder
from firmly.lab.settings import require
from firmly.lab.training import Outcome, Plan, train
from firmly.networks.bregman_flow import BregmanFlow, LayerCondition

CONDITIONS: tuple[LayerCondition, LayerCondition] = ("one-sided", "contraction")
STUDENT = (0.0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5% quantiles by degrees of freedom


@dataclass(frozen=True)
class FlowSettings:
    """`depth` layers of `width` activations with slopes bounded away from folding by `margin`; `steps` batches of
    `batch` points; `seeds` trainings of each flow, whose test likelihood is taken on `test` points. On tables the
    weight decay is the one of `decays` that is best on the validation rows."""

    depth: int = 4
    width: int = 32
    margin: float = 0.1
    steps: int = 1500
    batch: int = 256
    learning_rate: float = 5e-3
    test: int = 20_000
    seeds: int = 3
    decays: tuple[float, ...] = (0.01, 1.0, 5.0)

    def __post_init__(self) -> None:
        require(min(self.depth, self.width, self.seeds) >= 1, "depth, width and seeds are at least 1")
        require(0 < self.margin < 1, f"margin lies in (0, 1); given {self.margin}")
        require(self.steps >= 10 and self.batch >= 2, "at least 10 steps of batches of 2")
        require(len(self.decays) >= 1 and min(self.decays) >= 0, f"decays are at least 0; given {self.decays}")
        require(1 <= self.seeds <= len(STUDENT), f"seeds is at most {len(STUDENT)}; given {self.seeds}")


class Likelihood(nn.Module):
    """x -> log p(x) of a flow, as the network that is trained."""

    def __init__(self, flow: BregmanFlow):
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)


class Trained(NamedTuple):
    """A trained flow with its mean log-likelihood on the test points, in nats, and how the training ended."""

    flow: BregmanFlow
    test: float
    outcome: Outcome


def flow_of(features: int, condition: LayerCondition, settings: FlowSettings, seed: int) -> BregmanFlow:
    """A flow of the given condition; the contraction has wider layers in the place of P = A'A + B - B', so that it has
    at least as many parameters."""
    width = settings.width
    if condition == "contraction":
        width += math.ceil(2 * features**2 / (2 * features + 2))
    generator = torch.Generator().manual_seed(seed)
    return BregmanFlow(features, settings.depth, width, "tanh", condition, settings.margin, generator)


def fit_flow(
    flow: BregmanFlow,
    sample: Callable[[torch.Generator], Tensor],
    plan: Plan,
    run_folder: RunFolder,
    name: str,
    validation: Tensor | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Outcome:
    """Maximise the mean of log p over batches from `sample`, resuming from the run folder; every proof is made at the
    end, so that what is returned is invertible.

    With `validation` points the weights of the epoch with the best likelihood on them are kept.
    """
    device = next(flow.parameters()).device
    flow.start_at(sample(torch.Generator().manual_seed(plan.seed)).to(device, flow.layers[0].t.dtype))
    validate = None if validation is None else (lambda network: likelihood(network.flow, validation))
    outcome = train(
        Likelihood(flow),
        lambda generator: (lambda x: (x, x))(sample(generator)),
        plan,
        run_folder,
        name,
        loss=lambda log_prob, _: -log_prob.mean(),
        validate=validate,
        callback=callback,
    )
    flow.proofs()
    return outcome


@torch.no_grad()
def likelihood(flow: BregmanFlow, x: Tensor) -> float:
    """The mean of log p(x) over points, in nats."""
    parameter = next(flow.parameters())
    parts = [flow.log_prob(part.to(parameter)).double().sum() for part in x.split(8192)]
    return float(torch.stack(parts).sum()) / len(x)


def fit_density(
    density: Density, condition: LayerCondition, settings: FlowSettings, seed: int, run_folder: RunFolder,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Trained:  # fmt: skip
    """A flow on fresh points of a density of the plane; the test points are the same for every flow and seed."""
    flow = flow_of(2, condition, settings, seed)
    epochs = 5
    plan = Plan(epochs, max(1, settings.steps // epochs), settings.learning_rate, averaging=0.99, seed=seed)
    name = f"{density.name}-{condition}-{seed}".replace(" ", "-")
    outcome = fit_flow(
        flow, lambda g: density.sample(settings.batch, g).float(), plan, run_folder, name, callback=callback
    )
    return Trained(flow, likelihood(flow, points_for_test(density, settings)), outcome)


def fit_table(
    table: Table, condition: LayerCondition, settings: FlowSettings, seed: int, run_folder: RunFolder,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Trained:  # fmt: skip
    """A flow on the training rows of a split of its own; the validation rows choose the epoch and the weight decay."""
    split = table_split(table, seed)
    rows = split.train.float()
    epochs = 20

    def sample(generator: torch.Generator) -> Tensor:
        return rows[torch.randint(0, len(rows), (min(settings.batch, len(rows)),), generator=generator)]

    best, best_score = None, -math.inf
    for decay in settings.decays:
        flow = flow_of(rows.shape[1], condition, settings, seed)
        plan = Plan(epochs, max(1, settings.steps // epochs), settings.learning_rate, weight_decay=decay, seed=seed)
        name = f"{table}-{condition}-{decay:g}-{seed}"
        outcome = fit_flow(flow, sample, plan, run_folder, name, split.validation, callback)
        score = likelihood(flow, split.validation)
        if best is None or score > best_score:
            best, best_score = Trained(flow, likelihood(flow, split.test), outcome), score
    assert best is not None
    return best


def gaussian_likelihood(table: Table, seed: int) -> float:
    """The test likelihood of the normal density fitted to the training rows, its covariance shrunk towards the
    diagonal as much as is best on the validation rows."""
    split = table_split(table, seed)
    covariance, mean = split.train.mT.cov(), split.train.mean(0)
    spread = torch.diag(covariance.diagonal())

    def normal(weight: float) -> torch.distributions.MultivariateNormal:
        return torch.distributions.MultivariateNormal(mean, (1 - weight) * covariance + weight * spread)

    weights = [0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0]
    best = max(weights, key=lambda w: float(normal(w).log_prob(split.validation).mean()))
    return float(normal(best).log_prob(split.test).mean())


class Interval(NamedTuple):
    """A mean over seeds with its 95% confidence interval (Student); half is infinite for one seed."""

    mean: float
    half: float


def interval(values: list[float]) -> Interval:
    if len(values) < 2:
        return Interval(values[0], math.inf)
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(statistics.fmean(values), half)


class Comparison(NamedTuple):
    """Test log-likelihoods in nats, means over seeds, of both conditions and of a reference: the true density, or for
    tables a normal density. `flows` are the trained flows of the first seed, ours first."""

    name: str
    ours: Interval
    twin: Interval
    gain: Interval  # ours less twin, seed by seed
    reference: Interval
    flows: tuple[BregmanFlow, BregmanFlow]


def compare(
    data: Density | Table, settings: FlowSettings, run_folder: RunFolder,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Comparison:  # fmt: skip
    """Flows of both conditions, `settings.seeds` of each, on a density of the plane or splits of a table."""
    trained: list[list[Trained]] = []
    references = []
    for seed in range(settings.seeds):
        if isinstance(data, str):
            trained.append([fit_table(data, c, settings, seed, run_folder, callback) for c in CONDITIONS])
            references.append(gaussian_likelihood(data, seed))
        else:
            trained.append([fit_density(data, c, settings, seed, run_folder, callback) for c in CONDITIONS])
    if not isinstance(data, str):
        test = points_for_test(data, settings)
        references = [float(torch.cat([data.log_prob(part) for part in test.split(4096)]).mean())] * settings.seeds
    ours, twin = ([pair[k].test for pair in trained] for k in (0, 1))
    gains = [a - b for a, b in zip(ours, twin)]
    name = data if isinstance(data, str) else data.name
    flows = (trained[0][0].flow, trained[0][1].flow)
    return Comparison(name, interval(ours), interval(twin), interval(gains), interval(references), flows)


def points_for_test(density: Density, settings: FlowSettings) -> Tensor:
    """The points on which every flow of a density is tested."""
    return density.sample(settings.test, torch.Generator().manual_seed(10_000))
