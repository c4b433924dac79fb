"""The resolvent (A*A + r I)^-1 of a least-squares term, applied exactly."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from firmly.errors import ConditionError, NotCertifiable, NotDiagonal
from firmly.linear.basis import Basis, Fourier
from firmly.linear.map import Bracket, LinearMap
from firmly.linear.memo import Memo
from firmly.linear.symbol import Symbol

LARGEST_DENSE = 2048


class Resolvent(LinearMap):
    """x -> (A*A + weight I)^-1 x, the minimiser of 1/2 |A u|^2 + weight / 2 |u|^2 - <u, x>, with weight > 0.

    It is applied by the structure of A: entry by entry if A*A is diagonal (masks), frequency by frequency if A is
    shift-invariant (circular convolutions, Fourier samplings, and what is built from them), by the matrix for domains
    of at most 2048 entries. Else it raises `NotDiagonal`, because a truncated inner iteration is not this linear map.
    `weight` is a number or a scalar tensor, which gradients reach; `ConditionError` if it is not positive.
    """

    weight: Tensor

    def __init__(self, of: LinearMap, weight: float | Tensor):
        super().__init__(of.domain, of.domain)
        self.of = of
        self.hold("weight", weight if isinstance(weight, Tensor) else torch.tensor(float(weight), dtype=torch.float64))
        if self.weight.numel() != 1 or not float(self.weight.detach()) > 0:
            raise ConditionError(f"the weight of a resolvent is one positive number, given {weight}")
        # kept on the map: algorithms make a resolvent in every step, with a weight that may be learned
        self._spectrum: Memo[tuple[Tensor, Tensor]] = of.__dict__.setdefault("_gram_spectrum", Memo())

    def _apply_map(self, x: Tensor) -> Tensor:
        diagonal = self.of.gram_diagonal()
        if diagonal is not None:
            return x / (diagonal + self.weight).to(x.real.dtype)
        if self.of.is_complex and not x.is_complex():
            x = x.to(x.dtype.to_complex())
        try:
            return self._by_frequency(x)
        except NotDiagonal:
            return self._by_matrix(x)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        return self._apply_map(y)

    def _by_frequency(self, x: Tensor) -> Tensor:
        spatial = self.domain[1:]
        if not spatial:
            raise NotDiagonal("flat features have no frequencies")
        basis = Fourier(spatial, full=x.is_complex(), track=False, device=x.device)
        value = self._symbol(basis).value.to(x.dtype.to_complex())
        value = value.expand(basis.blocks, -1, -1)  # (blocks, channel, channel)
        axes = tuple(range(2, x.dim()))
        forward, backward = (torch.fft.fftn, torch.fft.ifftn) if x.is_complex() else (torch.fft.rfftn, torch.fft.irfftn)
        frequencies = forward(x, dim=axes)
        if self.domain[0] == 1:
            product = value.reshape(basis.grid) * frequencies
        else:
            product = torch.einsum("foi,bif->bof", value, frequencies.flatten(2)).reshape(frequencies.shape)
        return backward(product, s=spatial, dim=axes)

    def _by_matrix(self, x: Tensor) -> Tensor:
        if math.prod(self.domain) > LARGEST_DENSE:
            raise NotDiagonal(
                f"no exact resolvent of {self.of._get_name()} on {self.domain}: it is neither diagonal nor "
                "shift-invariant, "
                f"and has more than {LARGEST_DENSE} entries; use an algorithm that needs only A and A.T "
                "(forward-backward, Chambolle-Pock), or circular padding"
            )
        flat = x.flatten(1).to(torch.complex128 if x.is_complex() else torch.float64)
        if torch.is_grad_enabled() and any(p.requires_grad for p in (*self.of.parameters(), *self.of.buffers())):
            gram = self._gram().to(flat.dtype)
            system = gram + self.weight * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            result = torch.linalg.solve(system, flat.mT).mT
        else:
            values, vectors = self._spectrum.get(self.of, self._eigen)
            vectors = vectors.to(flat.dtype)
            result = ((flat @ vectors.conj()) / (values + self.weight)) @ vectors.mT
        return result.to(x.dtype).reshape(x.shape)

    def _gram(self) -> Tensor:
        matrix = self.of.matrix()
        return matrix.mH @ matrix

    @torch.no_grad()
    def _eigen(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self._gram())
        return values.clamp(min=0), vectors  # a Gram matrix has no negative eigenvalue: what is below 0 is rounding

    def _norm(self) -> Bracket:
        try:
            return super()._norm()
        except NotCertifiable:
            weight = float(self.weight.detach())
            return Bracket((1 - 1e-12) / (self.of.norm().upper ** 2 + weight), (1 + 1e-12) / weight)

    def _symbol(self, basis: Basis) -> Symbol:
        symbol = self.of.symbol(basis)
        return (symbol.H @ symbol + basis.identity(self.domain).scale(self.weight)).inverse()
