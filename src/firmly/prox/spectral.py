"""Functions of the singular values or eigenvalues of a matrix: the nuclear norm and the log-determinant."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from firmly.errors import ShapeError
from firmly.once_differentiable import once_differentiable
from firmly.prox.prior import Prior, Slope, positive, sum_over_sample


class Nuclear(Prior):
    """g(X) = weight times the sum of the singular values, on the last two dimensions; prox = soft threshold of them.

    Other dimensions of a sample (channels) hold separate matrices. Real or complex.
    Source: Cai, Candes and Shen, A singular value thresholding algorithm for matrix completion, 2010, theorem 2.1.
    """

    structure = "whole"

    def __init__(self, weight: float | Tensor = 1.0):
        super().__init__()
        self._hold("weight", positive("the weight of a nuclear norm", weight, allow_zero=True))

    def value(self, x: Tensor) -> Tensor:
        return self.weight * sum_over_sample(torch.linalg.svdvals(x))

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        rows, columns = z.shape[-2:]
        corner = pad(z, (rows, 0, 0, columns))
        # the eigenvalues of [[0, Z], [Z*, 0]] are plus and minus the singular values of Z, and zeros
        values, vectors = torch.linalg.eigh((corner + corner.mH).detach())
        shrunk = values.sgn() * (values.abs() - step * self.weight).clamp(min=0)
        slopes = (shrunk.detach() != 0).to(values.dtype)
        return SpectralMap.apply(corner + corner.mH, values, vectors, shrunk, slopes)[..., :rows, rows:]

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        positive("the weight of a nuclear norm", self.weight, allow_zero=True)
        return super().slope_at(step)


class LogDet(Prior):
    """g(X) = -weight log det X for symmetric (Hermitian) positive definite X on the last two dimensions, else infinity.

    prox: the eigenvalues s of the symmetric part of Z become (s + sqrt(s^2 + 4 t weight)) / 2, always positive.
    Source: Parikh and Boyd, Proximal algorithms, 2014, section 6.7.5.
    """

    structure = "whole"

    def __init__(self, weight: float | Tensor = 1.0):
        super().__init__()
        self._hold("weight", positive("the weight of a log-determinant", weight))

    def value(self, x: Tensor) -> Tensor:
        square(x)
        skew = (x - x.mH).abs().flatten(1).amax(1) > 1e3 * torch.finfo(x.dtype).eps * x.abs().flatten(1).amax(1)
        factor, failed = torch.linalg.cholesky_ex((x + x.mH) / 2)
        logarithms = 2 * torch.diagonal(factor, dim1=-2, dim2=-1).real.log()
        outside = skew | (failed.reshape(len(x), -1) > 0).any(1)
        return torch.where(outside, torch.inf, -self.weight * sum_over_sample(logarithms))

    def _prox(self, z: Tensor, step: float | Tensor) -> Tensor:
        square(z)
        symmetric = (z + z.mH) / 2
        values, vectors = torch.linalg.eigh(symmetric.detach())
        product = step * self.weight
        root = (values**2 + 4 * product).sqrt()
        # the root by Vieta where the eigenvalue is negative: no cancellation, always positive
        mapped = torch.where(values >= 0, (values + root) / 2, 2 * product / (root - values))
        return SpectralMap.apply(symmetric, values, vectors, mapped, (mapped / root).detach())

    def slope_at(self, step: float | Tensor = 1.0) -> Slope:
        positive("the weight of a log-determinant", self.weight)
        return super().slope_at(step)


def square(matrices: Tensor) -> None:
    if matrices.dim() < 3 or matrices.shape[-1] != matrices.shape[-2]:
        raise ShapeError(f"a log-determinant takes square matrices (batch, ..., n, n), given {tuple(matrices.shape)}")


@once_differentiable
class SpectralMap(torch.autograd.Function):
    """V diag(mapped) V* for a Hermitian matrix V diag(values) V*, differentiable also where eigenvalues coincide.

    `slopes` holds the derivative of the scalar map at every eigenvalue. The derivative in direction G is
    V (Gamma o (V* G V)) V* with Gamma_ij = (mapped_i - mapped_j) / (values_i - values_j), or the mean slope where
    eigenvalues coincide (Daleckii and Krein 1965; Bhatia, Matrix analysis, 1997, theorem V.3.3). That formula holds the
    eigenvectors fixed, so a second derivative through it is refused.
    """

    @staticmethod
    def forward(ctx, matrix: Tensor, values: Tensor, vectors: Tensor, mapped: Tensor, slopes: Tensor) -> Tensor:
        ctx.save_for_backward(values, vectors, mapped, slopes)
        return (vectors * mapped.unsqueeze(-2)) @ vectors.mH

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        values, vectors, mapped, slopes = ctx.saved_tensors
        rotated = vectors.mH @ gradients[0] @ vectors
        distance = values.unsqueeze(-1) - values.unsqueeze(-2)
        mean = (slopes.unsqueeze(-1) + slopes.unsqueeze(-2)) / 2
        size = values.abs().amax(-1, keepdim=True).unsqueeze(-1)
        apart = distance.abs() > torch.finfo(values.dtype).eps ** 0.5 * size
        quotients = (mapped.unsqueeze(-1) - mapped.unsqueeze(-2)) / torch.where(apart, distance, 1)
        gamma = torch.where(apart, quotients, mean)
        of_matrix = vectors @ (gamma * rotated) @ vectors.mH
        of_mapped = torch.diagonal(rotated, dim1=-2, dim2=-1).real
        return of_matrix, None, None, of_mapped, None
