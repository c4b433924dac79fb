"""Linear prequential prediction of Elec2: recursive least squares, implicit and logistic steps; prints JSON."""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor

from firmly.data import elec2
from firmly.lab.experiments.optim_linear import logistic
from firmly.optim import AdaptationGain, ImplicitStep, RecursiveLeastSquares
from firmly.optim.gain_profiles import ConstantTrace, Decreasing, Forgetting

RATES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def standardised(x: Tensor) -> Tensor:
    """Every row by mean and deviation of the rows before it and its own."""
    x = x.double()
    count = torch.arange(1, len(x) + 1, dtype=x.dtype)[:, None]
    mean = x.cumsum(0) / count
    variance = (x.square().cumsum(0) / count - mean.square()).clamp(min=0)
    return (x - mean) / (variance.sqrt() + 1e-8)


def main(rows: int | None = None) -> list[dict]:
    data = elec2()
    x, y = standardised(data.x[:rows]), 2.0 * data.labels[:rows] - 1

    def score(predictions: Tensor) -> float:
        return 100 * float(((predictions > 0) == (y > 0)).double().mean())

    repeated = 100 * float((y[1:] == y[:-1]).double().mean())
    found = [{"method": "repeat the last label", "setting": "", "accuracy": repeated}]
    profiles = [("decreasing", Decreasing()), ("constant trace", ConstantTrace())]
    profiles += [(f"forgetting {factor}", Forgetting(factor)) for factor in (0.999, 0.99, 0.95, 0.9)]
    for name, profile in profiles:
        model = RecursiveLeastSquares(profile)
        found.append({"method": "RecursiveLeastSquares", "setting": name, "accuracy": score(model.learn(x, y))})
    rows_ = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    rates = torch.tensor(RATES, dtype=torch.float64)[:, None, None] * torch.eye(7, dtype=torch.float64)
    for name, gain in (("integral", AdaptationGain()), ("Tustin 0.9", AdaptationGain((0.9,)))):
        step = ImplicitStep(torch.zeros(len(RATES), 7, dtype=torch.float64), gain)
        predictions = torch.empty(len(y), len(RATES), dtype=torch.float64)
        for t, row in enumerate(rows_):
            phi = row.expand(len(RATES), 7)
            predictions[t] = step.predict(phi)
            step.update(phi, y[t], rates)
        for rate, made in zip(RATES, predictions.T, strict=True):
            found.append({"method": f"ImplicitStep, {name}", "setting": f"rate {rate:g}", "accuracy": score(made)})
    signs = data.labels[:rows] * 2 - 1
    for rate, accuracy in zip(*logistic(rows_, signs, RATES[:4]), strict=True):
        found.append({"method": "logistic SGD", "setting": f"rate {rate:g}", "accuracy": 100 * accuracy})
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(*map(int, sys.argv[1:]))))
