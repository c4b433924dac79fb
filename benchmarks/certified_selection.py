"""The price of a certificate for ALISTA.

Codes of 500 entries, a tenth of them non-zero (Gaussian), seen through a Gaussian dictionary with 250 rows and unit
columns, without noise; sixteen layers of ALISTA with analytic weights. Step and threshold of every layer are found by
`calibrate` (Nelder-Mead with 40 evaluations per layer on 1000 codes, no backpropagation); the error is that of 1000
other codes. 'none' is no support selection, 'published' selects the largest entries and has no Lipschitz constant,
'ramp' is the continuous selection. With certified steps the layers without selection are nonexpansive in the metric of
ALISTA. Bounds are Lipschitz constants from whitened data to codes in that metric; 'lower' is attained by a pair of
inputs, 'Euclidean' is the bound from data to codes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import firmly as fm
from benchmarks.runner.results import Cell, Result, Table, Target
from firmly.networks import Selection, calibrate, in_metric, lista, nmse_db

ROWS: list[tuple[str, Selection | None, bool]] = [
    ("published", Selection(), False),
    ("published", Selection(), True),
    ("none", None, False),
    ("none", None, True),
    *((f"ramp {ramp:g}", Selection(ramp=ramp), certified) for ramp in (0.25, 1.0) for certified in (False, True)),
    *((f"ramp {ramp:g}", Selection(ramp=ramp), True) for ramp in (2.0, 4.0, 8.0)),
]


@torch.no_grad()
def measure(quick: bool) -> Result:
    m, n, depth, count = (20, 40, 3, 50) if quick else (250, 500, 16, 1000)
    D = torch.tensor(np.random.default_rng(0).standard_normal((m, n)), dtype=torch.float32)
    D = D / D.norm(dim=0)
    generator = torch.Generator().manual_seed(1)
    fitted, unseen = (codes(count, n, generator) for _ in range(2))
    rows: list[dict[str, Cell]] = []
    for name, selection, certified in ROWS[:: 3 if quick else 1]:
        net = lista(D, depth, "alista", selection=selection, certified=certified)
        calibrate(net, fitted @ D.T, fitted, evaluations=5 if quick else 40)
        error = round(nmse_db(net(unseen @ D.T), unseen), 2)
        row: dict[str, Cell] = {"selection": name, "steps": "certified" if certified else "free", "NMSE dB": error}
        row |= {"lower": None, "upper": None, "Euclidean": None}
        if name != "published":
            view = in_metric(net)
            certificate = fm.certify(view.network, budget_s=2 if quick else 60)
            row |= {"lower": certificate.lower, "upper": certificate.upper}
            row |= {"Euclidean": view.euclidean(certificate.upper)}
        rows.append(row)
    note = "The bounds of published selection are missing because there are none: it is discontinuous."
    return Result([Table(f"{m} x {n}, {depth} layers", rows, note)], [] if quick else [target(rows)])


def target(rows: list[dict[str, Cell]]) -> Target:
    """What has to be given up for a bound."""
    published = min(float(row["NMSE dB"] or 0) for row in rows if row["selection"] == "published")
    bounded = min(float(row["NMSE dB"] or 0) for row in rows if row["upper"] is not None and float(row["upper"]) < 100)
    text = f"{bounded:.1f} dB, published selection {published:.1f} dB"
    return Target("a bound below 100 costs at most 8 dB", text, bounded <= published + 8)


def codes(number: int, n: int, generator: torch.Generator) -> Tensor:
    return (torch.rand(number, n, generator=generator) < 0.1) * torch.randn(number, n, generator=generator)
