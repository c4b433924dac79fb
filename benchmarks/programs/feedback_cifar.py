"""E/PD on CIFAR-10 as its authors ran it, on a GPU if there is one: METHOD RATE SEED [PASSES]; prints JSON.

Five chunks of 10,000 pictures in their order, PASSES over each (60), batches of 128, shifts by up to a tenth and
mirrored pictures, the mean subtracted. Methods: sgd, feedback, feedback_hold, and with _events at the end the passes
that the loss still gains from: at most PASSES in a visit, 5 PASSES in all, chunks 2 to 5 in turn.

Source: Zhao, Cerf, Robu, Marchand, L-CSS 4(4), 2020; network and settings from their released code.
"""

from __future__ import annotations

import itertools
import json
import sys
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from firmly.data import ImageSet, cifar10
from firmly.optim import EventPasses, Feedback

CHUNKS, BATCH, SHIFT = 5, 128, 3


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, width in ((3, 64), (64, 128), (128, 196)):
        for inputs in (before, width):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(196 * 16, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 10)
    )


def moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every picture shifted by up to `SHIFT` pixels, half of them mirrored."""
    rows, columns = (torch.randint(2 * SHIFT + 1, (len(x),), generator=generator) for _ in range(2))
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    at = torch.arange(32)
    across = torch.where(mirrored[:, None], 31 - at, at)
    picture, down = torch.arange(len(x))[:, None, None], (rows[:, None] + at)[:, :, None]
    wide = pad(x, (SHIFT,) * 4, mode="replicate").permute(0, 2, 3, 1)
    found = wide[tuple(i.to(x.device) for i in (picture, down, (columns[:, None] + across)[:, None, :]))]
    return found.permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    net.eval()
    right = sum(int((net(a).argmax(1) == b).sum()) for a, b in zip(x.split(1000), y.split(1000), strict=True))
    return 100 * right / len(y)


def main(
    method: str, rate: float, seed: int, passes: int = 60, train: ImageSet | None = None, test: ImageSet | None = None
) -> dict:  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, test = train or cifar10("train"), test or cifar10("test")
    mean = train.images.float().mean(0)
    x, x_test = (((images - mean) / 255).to(device) for images in (train.images, test.images))
    y, y_test = train.labels.to(device), test.labels.to(device)
    net, generator = network(seed).to(device), torch.Generator().manual_seed(seed)
    dense = next(layer for layer in net if isinstance(layer, nn.Linear)).weight
    rest = [p for p in net.parameters() if p is not dense]
    # an l2 penalty of 0.01 |W|^2 on one layer
    optimizer = torch.optim.SGD([{"params": rest}, {"params": [dense], "weight_decay": 0.02}], lr=rate)
    feedback = Feedback(optimizer, hold="hold" in method) if method.startswith("feedback") else None
    events = EventPasses(passes * CHUNKS) if method.endswith("events") else None
    size, curve, rates, visits, started = len(x) // CHUNKS, [], [], [], time.perf_counter()
    for chunk in itertools.chain(range(CHUNKS), itertools.cycle(range(1, CHUNKS)) if events else ()):
        if len(curve) == passes * CHUNKS:
            break
        if feedback and curve:
            feedback.restart()
        if events:
            events.restart()
        for _ in range(min(passes, passes * CHUNKS - len(curve))):
            net.train()
            total = torch.zeros((), device=device)
            for rows in (chunk * size + torch.randperm(size, generator=generator)).split(BATCH):
                here = rows.to(device)
                loss = cross_entropy(net(moved(x[here], generator)), y[here])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(rows)
            rates.append(optimizer.param_groups[0]["lr"])
            visits.append(chunk)
            curve.append(accuracy(net, x_test, y_test))
            if feedback:
                feedback.update(float(total) / size)
            if events and events.done(float(total) / size):
                break
    return {
        "method": method, "rate": rate, "seed": seed, "final": curve[-1], "curve": curve, "rates": rates,
        "chunks": visits, "device": device, "seconds": time.perf_counter() - started,
    }  # fmt: skip


if __name__ == "__main__":
    method, rate, seed, *passes = sys.argv[1:]
    print(json.dumps(main(method, float(rate), int(seed), *map(int, passes))))
