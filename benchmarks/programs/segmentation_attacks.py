"""Attacks on a small U-Net: python -m benchmarks.programs.segmentation_attacks IMAGES TRAINING; prints JSON."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from firmly.data import brain_slices
from firmly.robust import (
    DAG,
    AlmaProx,
    MinimalPGD,
    SegmentationAttack,
    logit_lead,
    margin_loss,
    mean_iou,
    plain_loss,
    segpgd_loss,
)
from firmly.segment import UNet

OURS = "ALMA-prox"
LARGEST = 160 / 255  # of the bisections
MIDDLE = (slice(24, 72), slice(20, 60))  # 48 x 40, nearly all brain
STEP = 3e-3  # of ALMA-prox, chosen with its constraint on the validation slices


def main(images: int, training: int, steps: int = 500, bisections: int = 13) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, test = trained(training), brain_slices(split="test")
    every = max(1, len(test.images) // images)
    x, labels = test.images[::every, :, *MIDDLE], test.labels[::every, *MIDDLE]
    with torch.no_grad():
        clean = model(x).argmax(1)
    attacks: dict[str, SegmentationAttack] = {
        OURS: AlmaProx(step=STEP, constraint=logit_lead, steps=steps),
        "ALMA-prox, published settings": AlmaProx(steps=steps, least_multiplier=1e-12),
        **{
            name: MinimalPGD(radius=LARGEST, steps=20, loss=loss, bisections=bisections)
            for name, loss in LOSSES.items()
        },
        "DAG": DAG(steps=min(steps, 200)),
        "DAG, step 2/255": DAG(step=2 / 255, steps=steps),
    }
    found = [line(name, attack, model, x, labels) for name, attack in attacks.items()]
    accuracy = float((clean == labels).double().mean())
    return {"attacks": found, "accuracy": accuracy, "miou": mean_iou(clean, labels, 4), "images": len(x)}


LOSSES = {
    "minimal PGD, cross-entropy": plain_loss,
    "minimal PGD, margin": margin_loss,
    "minimal SegPGD": segpgd_loss,
}


def line(name: str, attack: SegmentationAttack, model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Any]:
    """Successes and norms of one attack."""
    counted = Counted(model)
    started = time.process_time()
    found = attack(counted, x, labels)
    seconds = time.process_time() - started
    successes = int(found.success.sum())
    return {
        "attack": name,
        "successes": f"{successes} of {len(x)}",
        "mean APSR": float(found.apsr.mean()),
        "median norm": 255 * found.median_norm if found.median_norm < 1 else None,
        "runs of the network": counted.calls,
        "seconds": seconds,
    }


class Counted(nn.Module):
    """A network that counts its calls."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.model(x)


def trained(steps: int) -> UNet:
    """A U-Net trained on the training slices, the last weights."""
    torch.manual_seed(0)
    train = brain_slices(split="train")
    model = UNet(1, len(train.classes), width=8, levels=3)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for k in range(steps):
        chosen = torch.randint(len(train.images), (4,), generator=generator)
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - k / steps)
        loss = nn.functional.cross_entropy(model(train.images[chosen]), train.labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))
