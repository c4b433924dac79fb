"""Connected regions of grids whose edges are open or closed, and means over them."""

from __future__ import annotations

import torch
from torch import Tensor


def regions(flat: Tensor, axes: int) -> tuple[Tensor, int]:
    """Labels 0 ... count - 1 of the regions that open edges connect, and their number; on any device, without a loop.

    `flat` (*groups, axes, *spatial) tells for every edge from i to i + e_a whether it connects, on a grid of so many
    axes; the last row of each has no neighbour. The groups (batch, class) are apart from each other. Labels are
    (*groups, *spatial).
    Every round hooks the root of a region to the smallest root beside it and halves all paths, about log n rounds.
    """
    first = flat.select(-1 - axes, 0)
    number = torch.arange(first.numel(), device=flat.device).reshape(first.shape)
    ends = []
    for axis in range(axes):
        dim, length = axis - axes, first.shape[axis - axes]
        open_ = flat.select(-1 - axes, axis).narrow(dim, 0, length - 1)
        ends.append(torch.stack([number.narrow(dim, 0, length - 1)[open_], number.narrow(dim, 1, length - 1)[open_]]))
    left, right = torch.cat(ends, 1)
    root = number.flatten()
    while True:
        a, b = root[left], root[right]
        smaller = torch.minimum(a, b)
        hooked = root.scatter_reduce(0, torch.cat([a, b]), torch.cat([smaller, smaller]), "amin")
        while not torch.equal(hooked, shorter := hooked[hooked]):
            hooked = shorter
        if torch.equal(hooked, root):
            break
        root = hooked
    _, label = root.unique(return_inverse=True)
    return label.reshape(first.shape), int(label.max()) + 1


def region_means(values: Tensor, label: Tensor, count: int) -> Tensor:
    """The mean of the values over the region of every entry."""
    places = label.flatten()
    total = values.new_zeros(count).index_add(0, places, values.flatten())
    size = torch.bincount(places, minlength=count)
    return (total / size)[places].reshape(values.shape)
