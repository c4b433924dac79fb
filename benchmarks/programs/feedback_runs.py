"""One run over a chunked stream of Fashion-MNIST: METHOD RATE SEED [PASSES per chunk] [IMAGES per chunk]."""

from __future__ import annotations

import itertools
import json
import math
import sys
import time

import torch
from torch import Tensor, nn

from firmly.data import ImageSet, fashion_mnist
from firmly.optim import EventPasses, Feedback

CHUNKS, BATCH = 5, 128


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(784, 256), nn.BatchNorm1d(256), nn.ReLU(),
        nn.Linear(256, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def prepared(images: Tensor) -> Tensor:
    return (images.flatten(1).float() / 255 - 0.286) / 0.353


def one_pass(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, order: Tensor) -> float:
    """Mean training loss of the pass; batches of one image are left out, as batch normalisation cannot take them."""
    net.train()
    total = torch.zeros(())
    for rows in order.split(BATCH):
        loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(rows)
    return float(total) / len(order)


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    net.eval()
    return 100 * float((net(x).argmax(1) == y).double().mean())


def noise(count: int) -> ImageSet:
    """Images that show nothing, to see that a program runs where the data set is not."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.randint(10, (count,), generator=generator))


def main(
    method: str, rate: float, seed: int, passes: int = 10, size: int = 12_000,
    train: ImageSet | None = None, test: ImageSet | None = None,
) -> dict:  # fmt: skip
    train, test = train or fashion_mnist("train"), test or fashion_mnist("test")
    x, y, x_test, y_test = prepared(train.images), train.labels, prepared(test.images), test.labels
    generator, net = torch.Generator().manual_seed(seed), network(seed)
    optimizer = (torch.optim.Adam if "adam" in method else torch.optim.SGD)(net.parameters(), lr=rate)
    feedback = Feedback(optimizer, hold="hold" in method) if method.startswith("feedback") else None
    events = EventPasses(passes * CHUNKS) if method.endswith("events") else None
    curve, rates, flags, visits = [], [], [], []
    started = time.process_time()
    # with events, chunks after the first are visited again in turn until all passes are used
    chunks = itertools.chain(range(CHUNKS), itertools.cycle(range(1, CHUNKS)) if events else ())
    for chunk in chunks:
        if len(curve) >= passes * CHUNKS:
            break
        rows = torch.arange(chunk * size, (chunk + 1) * size)
        if feedback and curve:
            feedback.restart()
        if events:
            events.restart()
        for k in range(min(passes, passes * CHUNKS - len(curve)) if events is None else passes * CHUNKS - len(curve)):
            if "cosine" in method:
                optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * k / passes)) / 2
            rates.append(optimizer.param_groups[0]["lr"])
            loss = one_pass(net, optimizer, x, y, rows[torch.randperm(size, generator=generator)])
            curve.append(accuracy(net, x_test, y_test))
            visits.append(chunk)
            if feedback:
                feedback.update(loss)
                state = feedback.stability()
                flags.append(None if state is None else state.stable)
            if events and events.done(loss):
                break
    return {
        "method": method, "rate": rate, "seed": seed, "final": curve[-1], "mean": sum(curve) / len(curve),
        "curve": curve, "rates": rates, "flags": flags, "chunks": visits, "seconds": time.process_time() - started,
    }  # fmt: skip


if __name__ == "__main__":
    method, rate, seed, *sizes = sys.argv[1:]
    torch.set_num_threads(1)
    print(json.dumps(main(method, float(rate), int(seed), *map(int, sizes))))
