"""One pass over Fashion-MNIST whose labels are permuted anew four times: METHOD RATE SEED; prints JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import SGD, Adam

from benchmarks.programs.feedback_runs import prepared
from firmly.data import ImageSet, fashion_mnist
from firmly.optim import Feedback, LossEvent, PageHinkley, StreamLearner

PARTS, BATCH, WINDOW = 5, 16, 50


def learner(method: str, rate: float) -> StreamLearner:
    net = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    loss = nn.functional.cross_entropy
    if method.startswith("hybrid"):
        return StreamLearner.hybrid(net, loss, rate, threshold=0.5 if method.endswith("events") else 0.0)
    optimizer = Adam(net.parameters(), rate) if method == "adam" else SGD(net.parameters(), rate)
    feedback = Feedback(optimizer, ceiling=1.0) if "feedback" in method else None
    change = PageHinkley() if method.endswith("alarms") else None
    event = LossEvent(0.5) if method.endswith("events") else None
    return StreamLearner(net, loss, optimizer, feedback, event, change, WINDOW)


def main(method: str, rate: float, seed: int, data: ImageSet | None = None) -> dict:
    data, generator = data or fashion_mnist("train"), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.labels), generator=generator)
    names = [torch.randperm(10, generator=generator) for _ in range(PARTS)]
    torch.manual_seed(seed)
    stream, x, right = learner(method, rate), prepared(data.images), []
    batches = order.split(BATCH)
    part = len(batches) // PARTS
    started = time.process_time()
    for t, rows in enumerate(batches[: part * PARTS]):
        labels = names[t // part][data.labels[rows]]
        outputs = stream.learn(x[rows], labels).outputs
        right.append(float((outputs.argmax(1) == labels).double().mean()))
    return {
        "method": method, "rate": rate, "seed": seed, "prequential": 100 * sum(right) / len(right),
        "recovery": recovery(right, part, lambda k: right[k * part - 200 : k * part]), "alarms": stream.changes,
        "skipped": stream.skipped / stream.batches, "seconds": time.process_time() - started,
    }  # fmt: skip


def recovery(right: list[float], part: int, before: Callable[[int], list[float]]) -> list[int]:
    """Batches after each drift until a mean over 20 is 95 % of that over the 200 before it (at most the whole part)."""
    found = []
    for k in range(1, PARTS):
        level = 0.95 * sum(before(k)) / len(before(k))
        after = right[k * part : (k + 1) * part]
        times = (t for t in range(20, part + 1) if sum(after[t - 20 : t]) / 20 >= level)
        found.append(next(times, part))
    return found


if __name__ == "__main__":
    method, rate, seed = sys.argv[1:]
    torch.set_num_threads(1)
    print(json.dumps(main(method, float(rate), int(seed))))
