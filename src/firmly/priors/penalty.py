"""The penalties of sparse coding: what is added to the squared error, with all that solvers and gaps need of it."""

from __future__ import annotations

import torch
from torch import Tensor

from firmly.errors import SettingsError, ShapeError


class Penalty:
    """h(z) = sum_g weight_g |z_g|_2 + curvature / 2 |z|^2, plus the constraint z >= 0 if `nonnegative`.

    The groups g are `group` consecutive entries of the last dimension of a code (batch, n): 1 is the l1 norm, 3 the
    three orientations of a dipole. `weight` is a positive number or a tensor that broadcasts against
    (batch, n / group): (n / group,) gives each group its own, (batch, 1) each problem. With `curvature` > 0 this is
    the elastic net (Zou and Hastie 2005), with `group` > 1 the group lasso (Yuan and Lin 2006).

    Raises `SettingsError` for weights that are not positive and finite (an atom without a penalty leaves no feasible
    dual point by scaling), for a negative curvature and for a group that is not a positive integer.
    """

    def __init__(self, weight: float | Tensor, curvature: float = 0.0, group: int = 1, nonnegative: bool = False):
        weight = torch.as_tensor(weight, dtype=None if isinstance(weight, Tensor) else torch.float64).detach()
        if weight.is_complex() or not bool((torch.isfinite(weight) & (weight > 0)).all()):
            raise SettingsError(
                "the weights of a penalty are positive and finite; an atom that is not penalised has no place here"
            )
        if not 0 <= curvature < float("inf"):
            raise SettingsError(f"the curvature of a penalty is a finite number of at least 0, given {curvature}")
        if not isinstance(group, int) or isinstance(group, bool) or group < 1:
            raise SettingsError(f"group is a positive number of consecutive entries, given {group!r}")
        self.weight, self.curvature, self.group, self.nonnegative = weight, float(curvature), group, bool(nonnegative)

    def on(self, y: Tensor, entries: int) -> Penalty:
        """The same penalty with weights (batch or 1, 1 or n / group) in float64 on the device of y."""
        if entries % self.group:
            raise ShapeError(f"codes of {entries} entries do not divide into groups of {self.group}")
        shape = (len(y), entries // self.group)
        try:
            self.weight.expand(shape)
        except RuntimeError:
            raise ShapeError(
                f"weights of shape {tuple(self.weight.shape)} do not broadcast against (batch, groups) = {shape}; "
                "one weight for each problem has shape (batch, 1), for each group (groups,)"
            ) from None
        weight = self.weight.to(device=y.device, dtype=torch.float64)
        return self.weighing(weight.reshape(1, -1) if weight.dim() < 2 else weight)

    def rows(self, chosen: Tensor) -> Penalty:
        """The penalty of these problems of the batch (indices or a mask)."""
        return self if len(self.weight) == 1 else self.weighing(self.weight[chosen])

    def atoms(self, chosen: Tensor) -> Penalty:
        """The penalty of these atoms (indices), for groups of one entry."""
        return self if self.weight.shape[1] == 1 else self.weighing(self.weight[:, chosen])

    def to(self, dtype: torch.dtype) -> Penalty:
        weight = self.weight.to(dtype)
        if not bool((weight > 0).all()):
            raise SettingsError(f"weights as small as {float(self.weight.min()):g} are zero in {dtype}; use float64")
        return self.weighing(weight)

    def heavier(self, factor: Tensor) -> Penalty:
        """The penalty with weights multiplied by `factor`, (batch, 1)."""
        return self.weighing(self.weight * factor)

    def weighing(self, weight: Tensor) -> Penalty:
        """The penalty with other weights, which are not checked."""
        made = object.__new__(Penalty)
        made.weight, made.curvature, made.group, made.nonnegative = weight, self.curvature, self.group, self.nonnegative
        return made

    def __repr__(self) -> str:
        weight = f"{self.weight.item():g}" if self.weight.numel() == 1 else f"tensor {tuple(self.weight.shape)}"
        return f"Penalty({weight}, curvature={self.curvature:g}, group={self.group}, nonnegative={self.nonnegative})"

    # -- formulas; z and v are (batch, n), results of groups (batch, n / group) ----------------------------------

    def norms(self, v: Tensor) -> Tensor:
        """The Euclidean norm of every group."""
        return v.abs() if self.group == 1 else torch.linalg.vector_norm(v.unflatten(1, (-1, self.group)), dim=2)

    def value(self, z: Tensor) -> Tensor:
        """h(z) of every problem, (batch,); the constraint is the caller's promise."""
        return (self.weight * self.norms(z)).sum(1) + self.curvature / 2 * z.square().sum(1)

    def prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        """argmin_u h(u) + |u - z|^2 / (2 step); `step` is a number or (batch, 1)."""
        threshold = step * self.weight
        if self.nonnegative and self.group == 1:
            shrunk = (z - threshold).clamp(min=0)
        elif self.group == 1:
            shrunk = z - z.clamp(-threshold, threshold)
        else:
            z = self.upward(z)
            factor = (1 - threshold / self.norms(z).clamp(min=torch.finfo(z.dtype).tiny)).clamp(min=0)
            shrunk = (z.unflatten(1, (-1, self.group)) * factor[..., None]).flatten(1)
        return shrunk / (1 + step * self.curvature) if self.curvature else shrunk

    def pull(self, v: Tensor) -> Tensor:
        """What a negative gradient v pulls every group with: |v_g|_2, or |max(v_g, 0)|_2; (batch, n / group).

        Zero is optimal for a group if and only if the pull is at most its weight.
        """
        return self.norms(self.upward(v))

    def conjugate(self, v: Tensor) -> Tensor:
        """h*(v) of every problem, (batch,), where it is finite: 0 without curvature."""
        if not self.curvature:
            return v.new_zeros(len(v))
        return (self.pull(v) - self.weight).clamp(min=0).square().sum(1) / (2 * self.curvature)

    def upward(self, v: Tensor) -> Tensor:
        """The positive part under the constraint, else v."""
        return v.clamp(min=0) if self.nonnegative else v


def as_penalty(penalty: float | Tensor | Penalty) -> Penalty:
    """A number or tensor w stands for the l1 norm w |z|_1."""
    return penalty if isinstance(penalty, Penalty) else Penalty(penalty)
