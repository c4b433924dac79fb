"""Train a monotone network of about 84,000 parameters on MNIST, and certify how far its digits can be trusted.

    python examples/monotone_mnist.py                                         # a few steps on random images
    python examples/monotone_mnist.py data=mnist network=dense epochs=20      # 87 units, fully connected
    python examples/monotone_mnist.py data=mnist network=convolution epochs=6

The data come from FIRMLY_DATA, else they are downloaded. Everything goes to `folder`; a run that was stopped goes on
from there. Adam, batches of 128, learning rate 1e-3 falling as a cosine, no augmentation; the last weights are
reported.
"""

import json
import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import firmly as fm
from firmly.data import ImageSet, fashion_mnist, mnist
from firmly.lab.run_folder import RunFolder
from firmly.lab.training import Plan, train

BATCH, ROUNDS = 128, 4  # a checkpoint after every quarter of an epoch
MEAN, DEVIATION = 0.1307, 0.3081  # of the pixels of MNIST


@dataclass(frozen=True)
class Settings:
    data: str = "noise"
    network: str = "dense"
    epochs: int = 1
    seed: int = 0
    tol: float = 1e-2  # of the equilibria and of their gradients in training
    folder: str = ""


class Digits(nn.Module):
    """Images (batch, 1, 28, 28) in [0, 1] to 10 scores: standardised, an equilibrium, a linear head.

    `dense` has 87 features on the pixels; `convolution` 36 on the 14 x 14 grid of 2 x 2 pixels, with 5 x 5 kernels, of
    which the head sees the means over 2 x 2 again.
    """

    def __init__(self, network: str):
        super().__init__()
        if network == "dense":
            self.layer = fm.networks.MonotoneLayer(784, 87, margin=1.0)
            self.head = nn.Linear(87, 10)
        elif network == "convolution":
            self.layer = fm.networks.MonotoneLayer(4, 36, margin=1.0, spatial=(14, 14), kernel_size=5)
            self.head = nn.Linear(36 * 7 * 7, 10)
        else:
            raise SystemExit(f"network=dense or network=convolution, given {network}")

    def features(self, images: Tensor) -> Tensor:
        x = (images - MEAN) / DEVIATION
        return self.layer(F.pixel_unshuffle(x, 2) if self.layer.loop.domain[1:] else x.flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        z = self.features(images)
        return self.head((F.avg_pool2d(z, 2) if z.dim() == 4 else z).flatten(1))

    @torch.no_grad()
    def separations(self) -> Tensor:
        """|w_i - w_j| for the rows w of the head as functions of the equilibrium: (10, 10)."""
        rows = self.head.weight.double()
        if self.layer.loop.domain[1:]:
            rows = rows * 0.5  # a mean over four entries has norm 1 / 2, and its windows do not overlap
        return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


def load(name: str, seed: int) -> tuple[ImageSet, ImageSet]:
    if name == "noise":
        g = torch.Generator().manual_seed(seed)
        labels = torch.randint(10, (256,), generator=g)
        images = torch.randint(256, (256, 1, 28, 28), generator=g, dtype=torch.uint8)
        return ImageSet(images, labels), ImageSet(images, labels)
    source = {"mnist": mnist, "fashion-mnist": fashion_mnist}[name]
    return source("train"), source("test")


@torch.no_grad()
def judge(net: Digits, test: ImageSet, radii: tuple[float, ...], constant: float) -> dict[str, float]:
    """The accuracy, and the part of the test set that no change of the image up to each radius can misclassify.

    Classes i and j keep their order under changes up to (s_i - s_j) / (|w_i - w_j| constant), with `constant` a bound
    for the equilibrium from images in [0, 1]. The scores are computed in single precision, which is not covered.
    """
    net.layer.tol = net.layer.step_size = None  # as finely as the precision allows
    separations, right, safe = net.separations() * constant, 0, torch.zeros(len(radii))
    for images, labels in zip(test.images.split(250), test.labels.split(250)):
        scores = net(images / 255).double()
        lead = scores.gather(1, labels[:, None]) - scores
        reach = lead / separations[labels].clamp(min=torch.finfo(torch.float64).tiny)
        reach = reach.scatter(1, labels[:, None], math.inf).amin(1)
        right += int((reach > 0).sum())
        safe += torch.tensor([float((reach > r).sum()) for r in radii])
    count = len(test.labels)
    return {"accuracy": right / count, **{f"certified at {r}": float(s) / count for r, s in zip(radii, safe)}}


def main(settings: Settings) -> None:
    torch.manual_seed(settings.seed)
    net, (training, test) = Digits(settings.network), load(settings.data, settings.seed)
    with torch.no_grad():  # the usual start of convolutions
        for weight in (*net.layer.loop.parameters(), *net.layer.input_map.parameters()):
            weight.div_(math.sqrt(3))
    net.layer.tol, net.layer.step_size = settings.tol, 0.5  # any step converges: this one takes 5 to 8 iterations
    print(f"{sum(p.numel() for p in net.parameters())} parameters, {len(training.labels)} images")

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(training.labels), (BATCH,), generator=generator)
        return training.images[chosen] / 255, training.labels[chosen]

    run = RunFolder(settings.folder or f"runs/monotone-{settings.data}-{settings.network}-{settings.seed}")
    plan = Plan(settings.epochs * ROUNDS, math.ceil(len(training.labels) / BATCH / ROUNDS), seed=settings.seed)

    def told(event: dict) -> None:
        if event["step"] % plan.steps == 0:
            print(f"epoch {event['step'] / plan.steps / ROUNDS:.2f}  loss {event['loss']:.4f}", flush=True)

    outcome = train(net, batch, plan, run, settings.network, loss=F.cross_entropy, callback=told)
    if outcome.status == "interrupted":
        raise SystemExit("interrupted: the same command goes on from the last checkpoint")

    published = net.layer.lipschitz_bound() / DEVIATION
    certificate = fm.certify(net.layer)
    proved = certificate.upper / DEVIATION * (1 + 1e-15)
    certificate.save(run / "certificate.safetensors")
    results = {"|U| / m": published, "certified constant": proved, **judge(net, test, (0.1, 0.25, 0.5, 1.0), proved)}
    results |= {"parameters": sum(p.numel() for p in net.parameters()), "seconds": outcome.seconds}
    run.write("results.json", json.dumps(results, indent=2) + "\n")
    for name, value in results.items():
        print(f"{name:20} {value:.6g}")


if __name__ == "__main__":
    pairs = [argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")]
    types = {name: type(value) for name, value in vars(Settings()).items()}
    main(Settings(**{name: types[name](value) for name, value in pairs if name in types}))
