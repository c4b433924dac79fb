"""Train an unrolled network: python -m benchmarks.programs.train_unrolled NETWORK SIZE BATCH DEPTH STEPS.

Prints the loss before the first step, the median milliseconds of a step (forward, backward, Adam) by the clock and of
the processor, and the peak memory in MiB beyond imports and data. The networks of a family compute the same function
from the same start.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.runner.machine import peak_memory

WIDTH, WEIGHT, PENALTY, THRESHOLD, SIDE, FILTERS = 1.6, 0.01, 0.1, 0.05, 5, 16


def gaussian() -> Tensor:
    """The blur kernel of all networks, (size, size)."""
    radius = math.ceil(4 * WIDTH)
    line = torch.exp(-(torch.arange(-radius, radius + 1.0) ** 2) / (2 * WIDTH**2))
    line = line / line.sum()
    return line[:, None] * line


def start_filters() -> Tensor:
    return torch.randn(FILTERS, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) / SIDE**2


def transfer(size: int) -> Tensor:
    """The transform of the kernel on a half grid, its centre at the origin."""
    kernel = gaussian()
    image = torch.zeros(size, size)
    image[: len(kernel), : len(kernel)] = kernel
    return torch.fft.rfft2(image.roll((-(len(kernel) // 2),) * 2, (0, 1)))


# -- forward-backward with a soft threshold ------------------------------------------------------------------------


def firmly_pgd(size: int, depth: int) -> nn.Module:
    import firmly as fm

    A = fm.linear.Blur(gaussian(), (1, size, size))
    algorithm = fm.algorithms.ForwardBackward(A, fm.prox.L1(WEIGHT), step_size=1.0)
    return fm.unroll(algorithm, depth, learn=("step_size", "prior"))


def plain_pgd(size: int, depth: int) -> nn.Module:
    return PlainPgd(size, depth)


class PlainPgd(nn.Module):
    """x <- soft(x - t_n H*(H x - y), t_n w_n), written out."""

    def __init__(self, size: int, depth: int):
        super().__init__()
        self.steps = nn.Parameter(torch.ones(depth))
        self.weights = nn.Parameter(torch.full((depth,), WEIGHT))
        self.register_buffer("H", transfer(size))

    def forward(self, y: Tensor) -> Tensor:
        x = self.filtered(y, self.H.conj())
        for t, w in zip(self.steps, self.weights):
            z = x - t * self.filtered(self.filtered(x, self.H) - y, self.H.conj())
            x = z.sign() * torch.relu(z.abs() - t * w)
        return x

    @staticmethod
    def filtered(x: Tensor, H: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * H, s=x.shape[-2:])


class WithPhysics(nn.Module):
    """A reconstruction network of deepinv as a function of the data alone."""

    def __init__(self, model: nn.Module, physics: nn.Module):
        super().__init__()
        self.model, self.physics = model, physics

    def forward(self, y: Tensor) -> Tensor:
        return self.model(y, self.physics)


def deepinv_pgd(size: int, depth: int) -> nn.Module:
    dinv = import_deepinv()
    physics = dinv.physics.BlurFFT(img_size=(1, size, size), filter=gaussian()[None, None])
    model = dinv.optim.PGD(
        data_fidelity=dinv.optim.L2(),
        prior=dinv.optim.L1Prior(),
        stepsize=[1.0] * depth,
        lambda_reg=[WEIGHT] * depth,
        max_iter=depth,
        unfold=True,
        trainable_params=["stepsize", "lambda"],
    )
    return WithPhysics(model, physics)


def import_deepinv():
    """deepinv imports torchvision, whose compiled part does not load beside another build of torch, and is not used."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        try:
            library.define(f"{name}(Tensor x) -> Tensor")
        except RuntimeError:  # it is there
            break
    import deepinv

    return deepinv


# -- half-quadratic splitting with a ridge -------------------------------------------------------------------------


def firmly_hqs(size: int, depth: int, cap: float | None = None) -> nn.Module:
    import firmly as fm

    A = fm.linear.Blur(gaussian(), (1, size, size))
    ridge = fm.prox.Ridge(start_filters(), fm.prox.Clip(FILTERS, THRESHOLD), cap=cap)
    algorithm = fm.algorithms.Hqs(A, ridge=ridge, penalty=PENALTY)
    return fm.unroll(algorithm, depth, learn=("penalty", "ridge"), waive=("kappa",))


def firmly_hqs_capped(size: int, depth: int) -> nn.Module:
    return firmly_hqs(size, depth, cap=1.99)


def plain_hqs(size: int, depth: int) -> nn.Module:
    return PlainHqs(size, depth)


class PlainHqs(nn.Module):
    """x <- (H*H + r I)^-1 (H* y + r (x - sum_i K_i^T clip(K_i x))), written out with conv2d on a padded image."""

    def __init__(self, size: int, depth: int):
        super().__init__()
        self.penalty = nn.Parameter(torch.full((depth,), PENALTY))
        self.filters = nn.Parameter(start_filters().expand(depth, -1, -1, -1, -1).clone())
        self.threshold = nn.Parameter(torch.full((depth, 1, FILTERS, 1, 1), THRESHOLD))
        self.register_buffer("H", transfer(size))

    def forward(self, y: Tensor) -> Tensor:
        power, data, d = self.H.abs() ** 2, torch.fft.rfft2(y) * self.H.conj(), 0.0
        for k in range(len(self.penalty) + 1):
            r = self.penalty[max(k - 1, 0)]
            x = torch.fft.irfft2((data + r * d) / (power + r), s=y.shape[-2:])
            if k < len(self.penalty):
                d = torch.fft.rfft2(x - self.ridge(x, self.filters[k], self.threshold[k]))
        return x

    def ridge(self, x: Tensor, filters: Tensor, threshold: Tensor) -> Tensor:
        pad = (SIDE // 2,) * 4
        z = nn.functional.conv2d(nn.functional.pad(x, pad, mode="circular"), filters)
        z = threshold * nn.functional.hardtanh(z / threshold)
        turned = filters.flip(-1, -2).transpose(0, 1)
        return nn.functional.conv2d(nn.functional.pad(z, pad, mode="circular"), turned)


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    f.__name__: f for f in (firmly_pgd, plain_pgd, deepinv_pgd, firmly_hqs, firmly_hqs_capped, plain_hqs)
}


def main(name: str, size: int, batch: int, depth: int, steps: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(batch, 1, size, size, generator=generator)
    data = torch.fft.irfft2(torch.fft.rfft2(truth) * transfer(size), s=(size, size))
    network = NETWORKS[name](size, depth)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-4)
    before, losses, times, cpu = peak_memory(), [], [], []
    for _ in range(steps):
        started, used = time.perf_counter(), time.process_time()
        loss = (network(data) - truth).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        times.append(1e3 * (time.perf_counter() - started))
        cpu.append(1e3 * (time.process_time() - used))
        losses.append(float(loss.detach()))
    ms, cpu_ms = statistics.median(times[1:] or times), statistics.median(cpu[1:] or cpu)
    return {"loss": losses[0], "ms": ms, "cpu": cpu_ms, "MiB": peak_memory() - before}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:]))))
