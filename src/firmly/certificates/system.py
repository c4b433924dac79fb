"""A traced network: linear maps in interconnection with slope-restricted nonlinearities.

`v_i = R_i(z_i)`, where every `z_i` and the output are linear in earlier `v_j` and in the inputs, and `z_i` in v_i
itself where there is a loop. The interconnection is kept as a graph of its linear maps and not multiplied out, so that
a basis can turn it into small blocks later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from firmly.linear.map import LinearMap, Shape
from firmly.prox.prior import Slope, Structure

Coefficient = float | Tensor


@dataclass(frozen=True)
class Input:
    """An input of the network that is perturbed."""

    name: str
    shape: Shape
    is_complex: bool = False


@dataclass(frozen=True)
class Linear:
    """map(parent)."""

    map: LinearMap
    parent: int
    shape: Shape


@dataclass(frozen=True)
class Sum:
    """sum of coefficient * parent."""

    terms: tuple[tuple[Coefficient, int], ...]
    shape: Shape


@dataclass(frozen=True)
class Call:
    """function(*args, **kwargs) that a nonlinearity was recorded from, and its input (1, *shape) at a known point."""

    function: Callable
    args: tuple
    kwargs: dict
    at: Tensor


@dataclass(frozen=True)
class Loop:
    """The one v with v = R(map(v) + w), slopes of R in [0, high], as a function of w."""

    map: LinearMap
    slope: Slope
    structure: Structure


@dataclass(frozen=True)
class Nonlinear:
    """R(parent), slopes of R in [low, high]; `where` is the module it was found in.

    A linear map of norm at most c that is left out of the linear part is also such a block, with slopes [-c, c]. `call`
    is known if the network was traced around a point. With a `loop`, R is the solution of that loop as a function of
    parent = w: slope and structure are what is known of it from outside, and a bound may use either view
    (docs/theory/loops).
    """

    parent: int
    slope: Slope
    structure: Structure
    where: str
    shape: Shape
    call: Call | None = None
    loop: Loop | None = None


Node = Input | Linear | Sum | Nonlinear


@dataclass
class System:
    """The graph of a traced network. Nodes only refer to earlier nodes, so their order is an order of evaluation."""

    nodes: list[Node] = field(default_factory=list)
    output: int = -1
    is_complex: bool = False
    assumptions: list[str] = field(default_factory=list)

    def append(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    @property
    def inputs(self) -> list[Input]:
        return [node for node in self.nodes if isinstance(node, Input)]

    @property
    def maps(self) -> list[LinearMap]:
        """The distinct linear maps of the graph, those of loops too, in order of appearance."""
        closed = (n.loop if isinstance(n, Nonlinear) else n for n in self.nodes)
        return list({id(n.map): n.map for n in closed if isinstance(n, (Linear, Loop))}.values())

    def pruned(self) -> System:
        """The same system without the nodes that do not reach the output."""
        needed = self.ancestors(self.output)
        needed.update(i for i, node in enumerate(self.nodes) if isinstance(node, Input))
        return self.restricted(sorted(needed))

    def held_fixed(self, names: Sequence[str]) -> System | None:
        """The same system with these inputs held fixed: what depends on nothing else does not move, and leaves the
        sums.

        None if the output does not move.
        """
        still: set[int] = set()
        moving = System(list(self.nodes), self.output, self.is_complex, self.assumptions)
        for index, node in enumerate(self.nodes):
            fixed = [i in still for i in parents(node)]
            if node.name in names if isinstance(node, Input) else all(fixed):
                still.add(index)
            elif isinstance(node, Sum) and any(fixed):
                moving.nodes[index] = Sum(tuple(t for t in node.terms if t[1] not in still), node.shape)
        if self.output in still:
            return None
        needed = moving.ancestors(self.output)
        needed.update(i for i, node in enumerate(self.nodes) if isinstance(node, Input) and i not in still)
        return moving.restricted(sorted(needed))

    def ancestors(self, last: int) -> set[int]:
        """All nodes that a node depends on, itself included."""
        needed = {last}
        for index in range(last, -1, -1):
            if index in needed:
                needed.update(parents(self.nodes[index]))
        return needed

    def restricted(self, kept: Sequence[int]) -> System:
        """The nodes at these places alone, renumbered."""
        new = {old: position for position, old in enumerate(kept)}
        nodes = [renumbered(self.nodes[i], new) for i in kept]
        return System(nodes, new[self.output], self.is_complex, self.assumptions)

    def fingerprint(self) -> str:
        """SHA-256 of everything that the bounds depend on: graph, coefficients, slopes, weights of the maps."""
        digest = hashlib.sha256()
        for node in self.nodes:
            digest.update(type(node).__name__.encode() + repr((node.shape, parents(node))).encode())
            if isinstance(node, Linear):
                digest.update(map_fingerprint(node.map))
            elif isinstance(node, Sum):
                digest.update(repr([float(c) for c, _ in node.terms]).encode())
            elif isinstance(node, Nonlinear):
                digest.update(repr((float(node.slope.low), float(node.slope.high), node.structure)).encode())
                if node.loop is not None:
                    loop = node.loop
                    digest.update(map_fingerprint(loop.map) + repr((float(loop.slope.high), loop.structure)).encode())
        digest.update(repr((self.output, self.is_complex)).encode())
        return digest.hexdigest()


def parents(node: Node) -> tuple[int, ...]:
    if isinstance(node, Input):
        return ()
    if isinstance(node, Sum):
        return tuple(index for _, index in node.terms)
    return (node.parent,)


def renumbered(node: Node, new: dict[int, int]) -> Node:
    if isinstance(node, Input):
        return node
    if isinstance(node, Sum):
        return Sum(tuple((c, new[i]) for c, i in node.terms), node.shape)
    if isinstance(node, Linear):
        return Linear(node.map, new[node.parent], node.shape)
    return replace(node, parent=new[node.parent])


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of the parameters and buffers of a module, cast to double precision."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + repr(tuple(tensor.shape)).encode() + tensor_bytes(tensor))
    return digest.hexdigest()


def map_fingerprint(linear_map: LinearMap) -> bytes:
    """Class, shapes and every number of a map and of the maps inside it, also numbers that are no parameters."""
    digest = hashlib.sha256()
    for name, module in linear_map.named_modules():
        digest.update(f"{name}:{type(module).__name__}".encode())
        for key, value in sorted(vars(module).items()):
            if isinstance(value, Tensor):
                digest.update(key.encode() + tensor_bytes(value))
            elif isinstance(value, (int, float, str, tuple)) and not key.startswith("_") and key != "training":
                digest.update(f"{key}={value!r}".encode())
        for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            digest.update(key.encode() + tensor_bytes(value))
    return digest.digest()


def tensor_bytes(tensor: Tensor) -> bytes:
    tensor = tensor.detach().cpu()
    tensor = tensor.to(torch.complex128) if tensor.is_complex() else tensor.to(torch.float64)
    return tensor.contiguous().numpy().tobytes()
