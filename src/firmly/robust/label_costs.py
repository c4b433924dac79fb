"""Costs of changing one class into another: ordinal, by a tree of classes, by the distance from a boundary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from firmly.errors import SettingsError


def ordinal_cost(classes: int) -> Tensor:
    """C_jk = |j - k| / (classes - 1), for classes that are ordered: (classes, classes)."""
    if classes < 2:
        raise SettingsError(f"a cost is between two classes at least, given {classes}")
    index = torch.arange(classes, dtype=torch.float64)
    return (index[:, None] - index).abs() / (classes - 1)


def tree_cost(parents: Sequence[int], classes: int) -> Tensor:
    """C_jk = steps from j to k in a tree of classes, divided by the largest: (classes, classes).

    `parents[i]` is the parent of node i, -1 for the root; the first `classes` nodes are the classes.
    """
    if not 2 <= classes <= len(parents) or any(not -1 <= p < len(parents) for p in parents):
        raise SettingsError(f"a tree has {classes} classes (at least 2) among its nodes, parents are nodes or -1")
    lines = []
    for node in range(classes):
        line = [node]
        while parents[line[-1]] != -1:
            line.append(parents[line[-1]])
            if len(line) > len(parents):
                raise SettingsError(f"node {node} does not lead to a root: the parents have a cycle")
        lines.append(line)
    if len({line[-1] for line in lines}) > 1:
        raise SettingsError("the classes hang on different roots: give the tree one node of parent -1")
    steps = [
        [a.index(common) + b.index(common) for b in lines for common in [next(n for n in a if n in b)]] for a in lines
    ]
    cost = torch.tensor(steps, dtype=torch.float64)
    return cost / cost.max()


def boundary_distance(labels: Tensor, unit: float = 1.0) -> Tensor:
    """The Euclidean distance (batch, *spatial) from every pixel to the nearest of another label, in units of `unit`.

    As a factor of the cost, changes near contours are cheap; void counts as a label of its own. Images of one label
    have the diagonal of the image everywhere. By exact distance transforms of SciPy on the CPU, one for each class of
    an image: compute it once.
    """
    from scipy.ndimage import distance_transform_edt

    if labels.is_floating_point() or labels.dim() < 2 or not unit > 0:
        raise SettingsError(f"labels are integers (batch, *spatial), the unit positive; given {labels.dtype}, {unit}")
    out = torch.zeros(labels.shape, dtype=torch.float64)
    for image, distances in zip(labels.cpu(), out, strict=True):
        for label in (present := image.unique()):
            here = image == label
            whole = len(present) == 1
            far = sum(side**2 for side in image.shape) ** 0.5
            distances[here] = far if whole else torch.from_numpy(distance_transform_edt(here.numpy()))[here]
    return (out / unit).to(labels.device)
