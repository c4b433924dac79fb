"""Unroll an algorithm into a network whose layers are its iterations."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint as recompute

from firmly.algorithms.algorithm import Algorithm, check
from firmly.errors import SettingsError, ShapeError
from firmly.networks.positive import Positive, Within


class Unrolled(nn.Module):
    """depth iterations of an algorithm as layers: `net(y)` reads the image after the last; made by `unroll`.

    `layers` holds one copy of the algorithm per iteration. What is learned is the layer's own; everything else, the
    operator above all, is one object that all layers use and that is registered once, under `shared`.
    In the last layer of a primal-dual method the image read may not depend on all parameters (the last dual step): they
    get no gradient.
    `inputs` names the arguments of `forward` and their shapes without the batch, for certificates.
    """

    def __init__(self, layers: Sequence[Algorithm], shared: nn.Module, checkpoint: int):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.shared = shared
        self.checkpoint = checkpoint
        self.data_shape = tuple(layers[0].data_shape)
        self.image_shape = tuple(layers[0].image_shape)
        self.inputs = {"data": self.data_shape, "start": self.image_shape}

    def forward(self, y: Tensor, start: Tensor | None = None) -> Tensor:
        """The image (batch, *image_shape) for data y (batch, *data_shape), from the image `start` if given."""
        for name, tensor, shape in (("data", y, self.data_shape), ("start", start, self.image_shape)):
            if tensor is not None and tuple(tensor.shape[1:]) != shape:
                expected = ", ".join(map(str, ("batch", *shape)))
                raise ShapeError(f"the {name} has shape {tuple(tensor.shape)}, this network takes ({expected})")
        depth = len(self.layers)
        state = self.layers[0].start(y, start)
        traced = not all(isinstance(part, Tensor) for part in (y, *state))
        recomputed = self.checkpoint > 0 and torch.is_grad_enabled() and not traced
        for first in range(0, depth, self.checkpoint or depth):
            last = min(first + (self.checkpoint or depth), depth)
            if recomputed:
                state = recompute(self._run, state, y, first, last, use_reentrant=False)
            else:
                state = self._run(state, y, first, last)
        return self.layers[-1].read(state)

    def _run(self, state: Any, y: Tensor, first: int, last: int) -> Any:
        for k in range(first, last):
            state = self.layers[k](state, y, k)
        return state


def unroll(
    algorithm: Algorithm,
    depth: int,
    learn: Sequence[str] | None = None,
    checkpoint: int = 0,
    waive: Iterable[str] = (),
) -> Unrolled:
    """A network of `depth` iterations of `algorithm`, with independent parameters per layer for the names in `learn`.

    `learn` is a part of `algorithm.learnable`; None means all of it that the algorithm has. A learned scalar is a
    parameter that stays inside its rule whatever the optimiser does (`Within`). A learned prior or ridge is copied for
    every layer, with its parameters; a prior that has none gets its `weight` as one, kept positive. With learn=() the
    network equals `depth` steps of the algorithm. `checkpoint=k` keeps only every k-th state for the backward pass and
    recomputes the rest.

    Raises `SettingsError` for a name that cannot be learned and `ConditionError` if the conditions of the algorithm do
    not hold; `waive` names those to ignore, and a learned scalar whose rule is waived is only kept positive.
    """
    waived = tuple(waive)
    if depth < 1 or checkpoint < 0:
        raise SettingsError(f"depth is at least 1 and checkpoint at least 0, given {depth} and {checkpoint}")
    check(algorithm.conditions(), waived)
    names = what_to_learn(algorithm, learn)
    shared = nn.Module()
    for name, item in (*algorithm.named_children(), *algorithm.named_parameters(recurse=False)):
        if name not in names:
            setattr(shared, name, item)
    return Unrolled([layer_of(algorithm, names, waived) for _ in range(depth)], shared, checkpoint)


def what_to_learn(algorithm: Algorithm, learn: Sequence[str] | None) -> tuple[str, ...]:
    """The names to learn, in the algorithm's order; refuses those it does not have or that have nothing to learn."""
    able = [n for n in algorithm.learnable if has_something_to_learn(getattr(algorithm, n))]
    if learn is None:
        return tuple(able)
    if isinstance(learn, str):
        raise SettingsError(f"learn is a tuple of names, given the text {learn!r}; write learn=({learn!r},)")
    for name in learn:
        if name not in algorithm.learnable:
            raise SettingsError(f"{type(algorithm).__name__} cannot learn {name!r}; it can learn {tuple(able)}")
        if name not in able:
            raise SettingsError(
                f"the {name} of this {type(algorithm).__name__}, {getattr(algorithm, name)}, has nothing to learn; "
                f"leave it out of learn, or give one with a parameter or a positive weight"
            )
    return tuple(n for n in algorithm.learnable if n in learn)


def has_something_to_learn(value: Any) -> bool:
    if isinstance(value, nn.Module):
        weight = getattr(value, "weight", None)
        return any(True for _ in value.parameters()) or isinstance(weight, float | int | Tensor)
    return value is not None


def layer_of(algorithm: Algorithm, names: tuple[str, ...], waived: tuple[str, ...]) -> Algorithm:
    """A copy of the algorithm that owns what is learned and refers to the rest without registering it."""
    layer = copy.copy(algorithm)
    for kind in ("_parameters", "_buffers", "_modules"):
        own = {n: v for n, v in getattr(algorithm, kind).items() if n in names}
        layer.__dict__.update({n: v for n, v in getattr(algorithm, kind).items() if n not in names})
        layer.__dict__[kind] = own
    for kind, hooks in vars(algorithm).items():
        if kind.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            layer.__dict__[kind] = hooks.copy()  # a hook on one layer is not one on all
    scalars = algorithm.scalars()
    for name in names:
        if name in scalars:
            continue
        term = copy.deepcopy(getattr(algorithm, name))
        keep_weight_positive(term)
        setattr(layer, name, term)
    for name in scalars:
        if name in names:
            later = tuple(n for n in scalars[scalars.index(name) + 1 :] if n in names)
            make_parameter(layer, name)
            within = Within(layer, name, free=later, waived=name in waived)
            parametrize.register_parametrization(layer, name, within, unsafe=True)
    return layer


def keep_weight_positive(term: nn.Module) -> None:
    """Turn the weight of a prior, a number or a tensor, into a positive parameter."""
    weight = getattr(term, "weight", None)
    if not isinstance(weight, float | int | Tensor) or parametrize.is_parametrized(term, "weight"):
        return
    if isinstance(weight, nn.Parameter) or not any(True for _ in term.parameters()):
        make_parameter(term, "weight")
        parametrize.register_parametrization(term, "weight", Positive())


def make_parameter(module: nn.Module, name: str) -> None:
    """Replace the attribute, a number or a tensor, by an equal parameter."""
    value = torch.as_tensor(getattr(module, name)).detach().clone()
    delattr(module, name)
    dtype = value.dtype if value.dtype.is_floating_point and value.dim() else torch.get_default_dtype()
    module.register_parameter(name, nn.Parameter(value.to(dtype)))
