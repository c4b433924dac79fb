"""How far every pixel of a restored image can move: what is proved, and what attacks reach."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor, nn

from firmly.certificates import Certificate, attack, error_map
from firmly.errors import NotCertifiable
from firmly.lab.charts import Scale, at_most, number, svg, text
from firmly.lab.pictures import COLOURS, coloured
from firmly.lab.run_folder import RunFolder

DECADES = 3  # of the colour scale, below the largest change that is allowed
VISIBLE = 0.1  # of the range from black to white
AIMED_STEPS = 6


def map_errors(
    run: RunFolder, network: nn.Module, y: Tensor, worst: Tensor, radius: float, certificate: Certificate | None,
    budget_s: float,
) -> dict[str, Any]:  # fmt: skip
    """Bound the change of every pixel for all perturbations of y, (1, *shape), within the radius; write the pictures.

    Beside the bounds stands what two attacks do: `worst`, the perturbation found for the whole image, and one that aims
    at the pixel that moves most under it. Returns the numbers of the report, or the reason why there is no map.
    """
    try:
        found = error_map(network, y, radius, budget_s=budget_s)
    except NotCertifiable as reason:
        return {"reason": str(reason)}
    if certificate is not None:  # no pixel moves more than the image
        found = replace(found, gain=found.gain.clamp(max=certificate.upper))
    bound, top = found.bound, float(found.bound.max())
    if not 0 < top < math.inf:
        return {"reason": "no pixel can move at all" if top == 0 else "no finite bound is known for some of the pixels"}
    attacked = moved(network, y, worst)
    pixel = int(attacked.argmax())
    aimed = moved(network, y, attack(OnePixel(network, pixel), y, radius, AIMED_STEPS).perturbation)
    rounding = 1e-4 * top  # of the network in single precision
    if bool((torch.maximum(attacked, aimed) > bound + rounding).any()):
        return {"reason": "an attack moves a pixel further than its bound, which we would like to hear of"}
    for name, values in (("certified", bound), ("attacked", attacked), ("aimed", aimed)):
        run.write(f"pictures/error-{name}.png", coloured(1 + (values[0] / top).clamp(min=1e-9).log10() / DECADES))
    return {
        "smallest": float(bound.min()),
        "largest": top,
        "attacked": float(attacked.max()),
        "aimed": float(aimed.flatten()[pixel]),
        "pixel": list(divmod(pixel, attacked.shape[-1])),
        "tolerated": found.tolerated(VISIBLE),
        "everywhere": not found.decided,  # the bounds do not depend on y
    }


def moved(network: nn.Module, y: Tensor, perturbation: Tensor) -> Tensor:
    """The change of every pixel, (1, height, width)."""
    return (network(y + perturbation) - network(y))[0].abs().double().cpu()


class OnePixel(nn.Module):
    """One entry of the output of a network, (batch, 1)."""

    def __init__(self, network: nn.Module, index: int):
        super().__init__()
        self.network = network
        self.index = index

    def forward(self, y: Tensor) -> Tensor:
        return self.network(y).flatten(1)[:, self.index, None]


def scale_bar(largest: float, width: int) -> Markup:
    """The colours of the maps and the changes that they stand for."""
    scale = Scale(largest * 10.0**-DECADES, largest, 8, width - 8, log=True)
    step = (width - 16) / len(COLOURS)
    parts = [
        f'<rect x="{8 + i * step:.1f}" y="0" width="{step + 0.6:.1f}" height="12" fill="rgb{colour}"/>'
        for i, colour in enumerate(COLOURS)
    ]
    proved = at_most(largest) + " proved"
    for tick in (10.0**p for p in range(math.ceil(scale.low - 1e-9), math.floor(scale.high + 1e-9) + 1)):
        parts.append(f'<line class="grid" x1="{scale(tick):.1f}" y1="0" x2="{scale(tick):.1f}" y2="17"/>')
        if scale(tick) < width - 8 * (len(proved) + 4):
            parts.append(text(max(scale(tick), 3.5 * len(number(tick))), 30, number(tick), "muted"))
    parts.append(text(width - 8, 30, proved, "strong", "end"))
    return svg(parts, width, 36, f"Colours from {number(largest * 10.0**-DECADES)} to {proved}")
