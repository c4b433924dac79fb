"""Zero padding as a crop from a larger torus, so that zero-padded convolutions are diagonal in Fourier.

Every value of the network is put on a torus as many pixels wider than the image as the kernels reach, with zeros
around it. A zero-padded convolution is then the circular one followed by a crop P to the image. The crop is left to
the next nonlinearity: v = R(P z) has slopes of R inside and v = 0 outside, so that its slopes lie in the hull of those
of R and 0; for a ReLU this loses nothing. Sums of cropped values are cropped, the output may be left uncropped, since
|P o| <= |o|, and a convolution of a value that is not yet cropped meets an explicit crop, with slopes [0, 1]. Derived
in docs/bring_your_own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from firmly.certificates.system import Input, Linear, Nonlinear, Sum, System
from firmly.certificates.torch_maps import AxisMaps, Rearrange, TorchConvolution
from firmly.linear.algebra import Identity, Scale
from firmly.linear.convolution import Convolution
from firmly.linear.map import Adjoint, LinearMap, Shape
from firmly.linear.mask import Diagonal
from firmly.prox.prior import Slope

EMBEDDED = "zero padding taken as a crop from the torus"
LARGEST = 2**27  # frequencies times the square of all channels together: beyond it the blocks are too many to search


def torus_of(system: System) -> Shape | None:
    """The torus that this network is embedded in, or None if it has no zero padding or something does not fit."""
    shapes = [node.shape for node in system.nodes]
    spatial = shapes[0][1:]
    if not spatial or any(len(shape) != len(spatial) + 1 or shape[1:] != spatial for shape in shapes):
        return None
    reaches = [reach(m) for m in system.maps]
    if any(on_torus(m, spatial) is None for m in system.maps) or not any(reaches):
        return None
    margin = [max(r[axis] for r in reaches if r) for axis in range(len(spatial))]
    torus = tuple(n + m for n, m in zip(spatial, margin))
    channels = sum(node.shape[0] for node in system.nodes if isinstance(node, (Input, Nonlinear)))
    return torus if math.prod(torus) * channels**2 <= LARGEST else None


def reach(linear_map: LinearMap) -> tuple[int, ...]:
    """How far a zero-padded convolution looks beyond a pixel along each axis; empty for maps of single pixels."""
    if isinstance(linear_map, (Adjoint, Scale)):
        return reach(linear_map.of)
    if isinstance(linear_map, TorchConvolution):
        return linear_map.padding if any(linear_map.padding) else ()
    if isinstance(linear_map, Convolution) and linear_map.padding == "zero":
        return linear_map.centre  # size // 2, at least what lies on the other side
    return ()


def on_torus(linear_map: LinearMap, torus: Shape) -> LinearMap | None:
    """The map of values on the torus that this one is a crop of, or None if there is none that Fourier diagonalises."""
    if isinstance(linear_map, Adjoint):
        wide = on_torus(linear_map.of, torus)
        return None if wide is None else wide.T
    shape = (linear_map.domain[0], *torus)
    if isinstance(linear_map, TorchConvolution):
        same = linear_map.domain[1:] == linear_map.codomain[1:] and all(s == 1 for s in linear_map.stride)
        return Convolution(linear_map.full_kernel(), shape, "circular") if same else None
    if isinstance(linear_map, Convolution):
        return Convolution(linear_map.kernel, shape, "circular") if linear_map.padding == "zero" else None
    if isinstance(linear_map, Diagonal):
        weight = linear_map.weight
        flat = weight.dim() == len(shape) and weight[0].numel() == 1
        return Diagonal(weight, shape) if flat or weight.numel() == 1 else None
    if isinstance(linear_map, Identity):
        return Identity(shape)
    if isinstance(linear_map, Scale):
        wide = on_torus(linear_map.of, torus)
        return None if wide is None else Scale(linear_map.factor, wide)
    if isinstance(linear_map, AxisMaps) and linear_map.axes == (0,):
        return AxisMaps(shape, [linear_map.matrix0, *[None] * len(torus)])
    channels = linear_map.channels() if isinstance(linear_map, Rearrange) else None
    return None if channels is None else Rearrange(shape, channel_index(channels, torus))


def channel_index(channels: Tensor, torus: Shape) -> Tensor:
    """Whole channels of the torus, -1 for channels of zeros."""
    pixels = torch.arange(math.prod(torus))
    index = torch.where(channels[:, None] < 0, -1, channels[:, None] * len(pixels) + pixels)
    return index.reshape(-1, *torus)


def embedded(system: System, torus: Shape) -> System:
    """The system on the torus; its output cropped to the image is that of `system`."""
    wide = System(is_complex=system.is_complex, assumptions=list(system.assumptions))
    new: dict[int, int] = {}
    cropped: set[int] = set()  # nodes of `wide` that vanish outside the image
    crops: dict[int, int] = {}
    maps: dict[int, LinearMap] = {}

    def crop(index: int) -> int:
        if index in cropped:
            return index
        if index not in crops:
            shape = wide.nodes[index].shape
            crops[index] = wide.append(Nonlinear(index, Slope(0.0, 1.0), "separable", "crop to the image", shape))
            cropped.add(crops[index])
        return crops[index]

    for i, node in enumerate(system.nodes):
        shape = (node.shape[0], *torus)
        if isinstance(node, Input):
            made, is_cropped = Input(node.name, shape, node.is_complex), True
        elif isinstance(node, Linear):
            parent, local = new[node.parent], not reach(node.map)
            parent = parent if local else crop(parent)
            mapping = maps.setdefault(id(node.map), on_torus(node.map, torus))  # type: ignore[arg-type]
            made, is_cropped = Linear(mapping, parent, shape), local and parent in cropped
        elif isinstance(node, Sum):
            made = Sum(tuple((c, new[k]) for c, k in node.terms), shape)
            is_cropped = all(new[k] in cropped for _, k in node.terms)
        else:
            parent, slope = new[node.parent], Slope(float(node.slope.low), float(node.slope.high))
            if parent not in cropped:
                slope = Slope(min(slope.low, 0.0), max(slope.high, 0.0))
            made, is_cropped = Nonlinear(parent, slope, node.structure, node.where, shape), True
        new[i] = wide.append(made)
        if is_cropped:
            cropped.add(new[i])
    wide.output = new[system.output]
    return wide
