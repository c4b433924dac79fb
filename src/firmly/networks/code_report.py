"""What a sparse coding network does layer by layer: errors, gaps, supports; and the losses it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from firmly.errors import SettingsError
from firmly.linear.map import LinearMap
from firmly.networks.beyond_depth import beyond_depth
from firmly.networks.calibration import nmse_db
from firmly.networks.sparse_network import SparseNetwork
from firmly.priors.duality import duality_gap


class LayerReport(NamedTuple):
    """Means over a batch after one layer.

    `nmse` is in dB, against the given codes; `support_error` the share of these codes' entries that are wrongly zero or
    not; `gap` the duality gap of the Lasso, an upper bound of F(z) - min F; `to_fixed_point` the distance to where the
    last layer goes when it is iterated, relative to it (None if it does not converge).
    """

    nmse: float
    support_error: float
    gap: float
    to_fixed_point: float | None


@torch.no_grad()
def layer_reports(net: SparseNetwork, y: Tensor, truth: Tensor, weight: float) -> list[LayerReport]:
    """One report for every layer, on data y (batch, m) whose codes are `truth` (batch, n), for the Lasso `weight`."""
    found = beyond_depth(net, y)
    limit = found.limit if found.status.name == "CONVERGED" else None
    reports = []
    for code in net.codes(y):
        away = None if limit is None else float((code - limit).norm() / limit.norm().clamp(min=1e-300))
        gap = float(duality_gap(net.shared.D, y, weight, code).gap.mean())
        reports.append(LayerReport(nmse_db(code, truth), support_error(code, truth), gap, away))
    return reports


def support_error(code: Tensor, truth: Tensor) -> float:
    """Entries that are zero in one and not in the other, as a share of those that are not zero in `truth`."""
    return float(((code != 0) != (truth != 0)).sum()) / max(int((truth != 0).sum()), 1)


def lasso_loss(D: LinearMap, y: Tensor, code: Tensor, weight: float) -> Tensor:
    """The mean over the batch of 1/2 |D z - y|^2 + weight |z|_1: trains without any codes, for its own minimum."""
    residual = (D(code) - y).flatten(1)
    return 0.5 * residual.square().sum(1).mean() + weight * code.flatten(1).abs().sum(1).mean()


def log_error(codes: Sequence[Tensor], truth: Tensor, layers: int) -> Tensor:
    """The mean of log NMSE over the last `layers` codes: late layers count as much as early ones, however small."""
    if not 1 <= layers <= len(codes):
        raise SettingsError(f"layers lies in 1 .. {len(codes)}, the depth; given {layers}")
    size = truth.square().sum()
    return torch.stack([((code - truth).square().sum() / size).log() for code in codes[-layers:]]).mean()
