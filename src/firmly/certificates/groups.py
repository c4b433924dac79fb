"""A network as a function of groups of its inputs, each on its own scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from firmly.certificates.certify import Shapes, input_shapes
from firmly.certificates.signal import arguments
from firmly.certificates.torch_maps import Rearrange
from firmly.errors import ShapeError
from firmly.linear.map import Shape

Selection = str | tuple[str, Tensor | slice]
Groups = Sequence[str] | Mapping[str, Selection]


class Grouped(nn.Module):
    """net with its inputs split into groups: `forward(first, second=..., ...)`, `inputs` gives their shapes.

    `groups`: names of inputs, or a dict from names of groups to an input, or to (input, part) with part a Boolean mask
    that broadcasts to the shape of the input, or a slice of its first dimension. Whole channels stay (channels,
    *spatial), so that a Fourier basis sees them; any other part is a vector. What no group contains is an input of its
    own, that `certify(grouped, wrt=grouped.groups)` holds fixed. `scales` multiply the groups on their way in.
    Overlapping, empty or unknown parts raise `ShapeError`.
    """

    def __init__(
        self, net: nn.Module, groups: Groups, shape: Shapes | None = None, scales: Mapping[str, float] | None = None
    ):
        super().__init__()
        shapes = input_shapes(net, shape)
        selections = dict(groups) if isinstance(groups, Mapping) else {name: name for name in groups}
        self.net = net
        self.groups = tuple(selections)
        self.scales = {} if scales is None else dict(scales)
        self.sources: dict[str, str] = {}  # group -> input of net
        self.embeddings = nn.ModuleDict()
        self.inputs: dict[str, Shape] = {}
        free = {name: torch.ones(s, dtype=torch.bool) for name, s in shapes.items()}
        for name, selection in selections.items():
            source, part = (selection, None) if isinstance(selection, str) else selection
            if source not in shapes:
                raise ShapeError(f"group '{name}' is a part of '{source}', but the inputs are {list(shapes)}")
            mask = chosen(part, shapes[source], name)
            if not bool((mask <= free[source]).all()):
                raise ShapeError(f"group '{name}' overlaps another group of '{source}'; groups are disjoint")
            free[source] &= ~mask
            self._add(name, source, mask)
        self.order = arguments(net, shapes, list(self.sources.values()))
        for source in self.order:
            if bool(free[source].any()):
                self._add(f"{source}, the rest", source, free[source])

    def _add(self, name: str, source: str, mask: Tensor) -> None:
        self.sources[name] = source
        shape = tuple(mask.shape)
        if not bool(mask.all()):
            channels = mask.flatten(1).any(1) if mask.dim() > 1 else mask
            whole = mask.dim() > 1 and bool((mask.flatten(1).all(1) == channels).all())
            index = torch.full((mask.numel(),), -1)
            index[mask.flatten()] = torch.arange(int(mask.sum()))
            shape = (int(channels.sum()), *shape[1:]) if whole else (int(mask.sum()),)
            self.embeddings[str(len(self.inputs))] = Rearrange(shape, index.reshape(mask.shape))
        self.inputs[name] = shape

    def forward(self, *first: Any, **others: Any) -> Any:
        given = {**dict(zip(self.inputs, first)), **others}
        parts: dict[str, list[Any]] = {source: [] for source in self.order}
        for position, (name, source) in enumerate(self.sources.items()):
            value = given[name]
            if name in self.scales:
                value = self.scales[name] * value
            key = str(position)
            parts[source].append(self.embeddings[key](value) if key in self.embeddings else value)
        joined = {source: reduce(add, terms) for source, terms in parts.items()}
        return self.net(joined.pop(self.order[0]), **joined)


def chosen(part: Tensor | slice | None, shape: Shape, name: str) -> Tensor:
    """The part of an input as a mask of its shape."""
    mask = torch.zeros(shape, dtype=torch.bool)
    if part is None:
        return ~mask
    if isinstance(part, slice):
        mask[part] = True
    elif part.dtype != torch.bool or not broadcasts(part.shape, shape):
        raise ShapeError(
            f"the mask of group '{name}' is Boolean and broadcasts to {shape}, given {part.dtype} {tuple(part.shape)}"
        )
    else:
        mask |= part.cpu()
    if not bool(mask.any()):
        raise ShapeError(f"group '{name}' is empty")
    return mask


def broadcasts(part: Shape, shape: Shape) -> bool:
    return len(part) <= len(shape) and all(a in (1, b) for a, b in zip(reversed(part), reversed(shape)))
