"""How signals come from codes, and data from signals: y = A S(D, z), with A the identity or several operators."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from firmly.errors import ShapeError
from firmly.linear import Convolution


class Synthesis(ABC):
    """A map (D, z) -> x that is linear in each; dictionaries have their atoms, flattened, as columns: (m, n)."""

    @abstractmethod
    def signal_shape(self, dictionary: Tensor) -> tuple[int, ...]:
        """The shape of x without the batch."""

    @abstractmethod
    def apply(self, dictionary: Tensor, code: Tensor) -> Tensor:
        """x = S(D, z) for codes (batch, *code_shape): (batch, *signal_shape)."""

    @abstractmethod
    def adjoint(self, dictionary: Tensor, signal: Tensor) -> Tensor:
        """The adjoint in z: <S(D, z), x> = <z, adjoint(D, x)>."""

    @abstractmethod
    def squared_norm(self, dictionary: Tensor) -> float:
        """An upper bound of |S(D, .)|^2 that is tight up to rounding."""

    @abstractmethod
    def windows(self, signal: Tensor) -> Tensor:
        """The piece of every signal with the most energy, as long as an atom: (batch, m)."""


class MatrixSynthesis(Synthesis):
    """x = D z: codes (batch, n), signals (batch, m)."""

    def signal_shape(self, dictionary: Tensor) -> tuple[int, ...]:
        return (dictionary.shape[0],)

    def apply(self, dictionary: Tensor, code: Tensor) -> Tensor:
        return code @ dictionary.mT

    def adjoint(self, dictionary: Tensor, signal: Tensor) -> Tensor:
        return signal @ dictionary

    def squared_norm(self, dictionary: Tensor) -> float:
        top = torch.linalg.matrix_norm(dictionary.detach().double(), 2)
        return float(top) ** 2 * (1 + 1e-12)

    def windows(self, signal: Tensor) -> Tensor:
        return signal


class CircularSynthesis(Synthesis):
    """x = sum_j d_j * z_j, circular convolutions in one or two dimensions.

    signals (batch, *shape), codes (batch, n, *shape), atoms of the given size: D is (prod(size), n). An entry of z_j
    puts the atom around its place, its entry (size - 1) - size // 2 on it, and beyond the border on the other side.
    """

    def __init__(self, shape: Sequence[int], size: Sequence[int]):
        self.shape, self.size = tuple(shape), tuple(size)
        if len(self.shape) not in (1, 2) or len(self.size) != len(self.shape):
            raise ShapeError(f"signals and atoms both have one dimension or two, given {self.shape} and {self.size}")
        if any(not 1 <= k <= n for k, n in zip(self.size, self.shape)):
            raise ShapeError(f"atoms of {self.size} do not fit on signals of {self.shape}")
        self.axes = tuple(range(-len(self.shape), 0))
        self.centre = tuple((k - 1) - k // 2 for k in self.size)

    def filters(self, dictionary: Tensor) -> Tensor:
        """The atoms in their shape: (n, *size)."""
        return dictionary.mT.reshape(-1, *self.size)

    def linear_map(self, dictionary: Tensor) -> Convolution:
        """z -> S(D, z) as a linear map, for `lasso`, `unroll` and certificates."""
        kernel = self.filters(dictionary).flip(self.axes)[None]
        return Convolution(kernel, (len(kernel[0]), *self.shape), padding="circular")

    def signal_shape(self, dictionary: Tensor) -> tuple[int, ...]:
        return self.shape

    def spectrum(self, dictionary: Tensor) -> Tensor:
        """The Fourier transforms of the atoms, each around the origin: (n, *frequencies)."""
        room = [length for n, k in zip(reversed(self.shape), reversed(self.size)) for length in (0, n - k)]
        kernels = torch.nn.functional.pad(self.filters(dictionary), room)
        return torch.fft.rfftn(kernels.roll([-c for c in self.centre], self.axes), dim=self.axes)

    def apply(self, dictionary: Tensor, code: Tensor) -> Tensor:
        products = self.spectrum(dictionary) * torch.fft.rfftn(code, dim=self.axes)
        return torch.fft.irfftn(products.sum(1), s=self.shape, dim=self.axes)

    def adjoint(self, dictionary: Tensor, signal: Tensor) -> Tensor:
        products = self.spectrum(dictionary).conj() * torch.fft.rfftn(signal, dim=self.axes)[:, None]
        return torch.fft.irfftn(products, s=self.shape, dim=self.axes)

    def squared_norm(self, dictionary: Tensor) -> float:
        power = self.spectrum(dictionary.detach().double()).abs().square().sum(0)
        return float(power.max()) * (1 + 1e-12)

    def windows(self, signal: Tensor) -> Tensor:
        box = signal.new_ones(math.prod(self.size), 1)
        energy = self.adjoint(box, signal.square()).flatten(1)
        return self.pieces(signal, energy.argmax(1))

    def pieces(self, signal: Tensor, place: Tensor) -> Tensor:
        """The window of every signal around the flat index `place` (batch,): (batch, prod(size))."""
        index = torch.zeros(len(signal), *[1] * len(self.shape), dtype=torch.long, device=signal.device)
        stride = 1
        for axis in reversed(range(len(self.shape))):
            start = (place // stride) % self.shape[axis] - self.centre[axis]
            along = torch.arange(self.size[axis], device=signal.device)
            along = along.reshape([-1 if a == axis else 1 for a in range(len(self.shape))])
            index = index + stride * ((start.reshape(-1, *[1] * len(self.shape)) + along) % self.shape[axis])
            stride *= self.shape[axis]
        return signal.flatten(1).gather(1, index.flatten(1))
