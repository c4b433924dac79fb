"""Compressed sensing of images block by block: the same few inner products with every block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from firmly.errors import DataError, ShapeError
from firmly.linear.dense import Dense
from firmly.linear.map import Bracket, LinearMap
from firmly.linear.memo import Memo


class BlockSampling(LinearMap):
    """x -> inner products of every block of an image (1, height, width) with the same m patterns.

    `patterns` is (m, b, b). The image is cut into b x b blocks from its top left corner and filled with zeros below and
    to the right up to the next multiples of b; data are (m, rows of blocks, columns of blocks), so that data[:, i, j]
    belongs to block (i, j). `gaussian`, `cosine` and `hadamard` draw patterns with Phi Phi' = I, whose norm is 1.
    The patterns may be any others: Q = A.T of such a map takes data to an image by one linear rule for every block.
    Raises `ShapeError` unless the patterns are real and square and the image has one channel.
    """

    patterns: Tensor

    def __init__(self, patterns: Tensor, shape: Sequence[int]):
        if patterns.dim() != 3 or patterns.shape[1] != patterns.shape[2] or patterns.is_complex():
            raise ShapeError(f"the patterns of blocks are real, (m, b, b); given {tuple(patterns.shape)}")
        if len(shape) != 3 or shape[0] != 1:
            raise ShapeError(f"BlockSampling takes images (1, height, width), given the shape {tuple(shape)}")
        self.block = patterns.shape[1]
        grid = [math.ceil(n / self.block) for n in shape[1:]]
        super().__init__(shape, (len(patterns), *grid))
        self.padding = [count * self.block - n for count, n in zip(grid, shape[1:])]  # below, to the right
        self.hold("patterns", patterns)
        self._remembered: Memo[Bracket] = Memo()

    @classmethod
    def gaussian(cls, count: int, shape: Sequence[int], generator: torch.Generator, block: int = 33) -> BlockSampling:
        """`count` Gaussian patterns, made orthonormal by a QR factorisation in float64."""
        draw = torch.randn(block**2, _checked(count, block), dtype=torch.float64, generator=generator)
        return cls(torch.linalg.qr(draw).Q.mT.reshape(count, block, block).contiguous(), shape)

    @classmethod
    def cosine(cls, count: int, shape: Sequence[int], generator: torch.Generator, block: int = 32) -> BlockSampling:
        """The mean and `count` - 1 other rows, drawn at random, of the orthonormal two-dimensional cosine transform."""
        places, orders = (torch.arange(block, dtype=torch.float64) + shift for shift in (0.5, 0.0))
        rows = torch.cos(math.pi / block * orders[:, None] * places) * math.sqrt(2 / block)
        rows[0] /= math.sqrt(2)
        return cls(_drawn(rows, count, generator), shape)

    @classmethod
    def hadamard(cls, count: int, shape: Sequence[int], generator: torch.Generator, block: int = 32) -> BlockSampling:
        """The mean and `count` - 1 other rows, drawn at random, of the orthonormal Walsh-Hadamard transform."""
        if block & (block - 1):
            raise ShapeError(f"Hadamard patterns exist here for blocks of a power of two, given {block}")
        rows = torch.ones(1, 1, dtype=torch.float64)
        while len(rows) < block:
            rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
        return cls(_drawn(rows / math.sqrt(block), count, generator), shape)

    @property
    def weight(self) -> Tensor:
        """The patterns as a matrix Phi, (m, b^2)."""
        return self.patterns.flatten(1)

    def on(self, shape: Sequence[int]) -> BlockSampling:
        """The same patterns for images of another size."""
        return BlockSampling(self.patterns, shape)

    def linear_inverse(self, images: Sequence[Tensor], noise: float = 0.0) -> LinearMap:
        """The linear map Q of data to images that is best on the blocks x of `images` (1, height, width):

            Q = sum x y' (sum y y' + n noise^2 I)^-1,   y = Phi x,  n blocks,

        which minimises the mean of |Q (y + e) - x|^2 for white e with standard deviation `noise`. Without noise
        Phi Q = I. The blocks are those that lie inside the images. `DataError` where they do not determine Q.
        Source: Zhang and Ghanem, ISTA-Net, 2018, equation (7), for noise = 0.
        """
        b = self.block
        blocks = [
            functional.unfold(i[None, :, : i.shape[1] // b * b, : i.shape[2] // b * b], b, stride=b) for i in images
        ]
        x = torch.cat([part[0].mT for part in blocks]).to(self.patterns.device, torch.float64)  # (n, b^2)
        y = x @ self.weight.double().mT
        gram = y.mT @ y + len(x) * noise**2 * torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if int(failed) or not bool(gram.isfinite().all()):
            raise DataError(
                f"{len(x)} blocks do not determine a linear inverse of {y.shape[1]} measurements: give more images, or "
                "noise > 0"
            )
        rows = torch.cholesky_solve(y.mT @ x, factor)  # Q', (m, b^2)
        return BlockSampling(rows.reshape(-1, b, b).to(self.patterns.dtype), self.domain).T

    # -- the map -----------------------------------------------------------------------------------------------

    def _apply_map(self, x: Tensor) -> Tensor:
        below, right = self.padding
        kernel = self.patterns.to(x.dtype)[:, None]
        return functional.conv2d(functional.pad(x, (0, right, 0, below)), kernel, stride=self.block)

    def _apply_adjoint(self, y: Tensor) -> Tensor:
        image = functional.conv_transpose2d(y, self.patterns.to(y.dtype)[:, None], stride=self.block)
        return image[..., : self.domain[1], : self.domain[2]]

    def _norm(self) -> Bracket:
        return self._remembered.get(self, self._block_norm)

    def _block_norm(self) -> Bracket:
        """Blocks do not meet: the norm is that of one, the fullest, since a cropped pattern is a part of it."""
        height, width = (min(n, self.block) for n in self.domain[1:])
        return Dense(self.patterns[:, :height, :width].flatten(1).cpu()).norm()


def measurements(ratio: float, block: int = 33) -> int:
    """How many measurements of a b x b block are the fraction `ratio` of it: ratio b^2, rounded.

    For 33 x 33 blocks these are the published counts 545, 436, 327, 272, 109, 43, 10 at 50, 40, 30, 25, 10, 4, 1 %;
    the last two are rounded down there (ISTA-Net, 2018, and the papers before it).
    """
    if not 0 < ratio <= 1:
        raise ShapeError(f"the ratio of measurements lies in (0, 1], given {ratio}")
    exact = ratio * block**2
    return max(1, math.floor(exact if block == 33 and ratio in (0.04, 0.01) else exact + 0.5))


def _checked(count: int, block: int) -> int:
    if not 1 <= count <= block**2:
        raise ShapeError(f"a block of {block} x {block} has 1 to {block**2} orthonormal patterns, asked for {count}")
    return count


def _drawn(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the products of two of the orthonormal rows, the first always among them: (count, b, b)."""
    block = len(rows)
    others = torch.randperm(block**2 - 1, generator=generator)[: _checked(count, block) - 1] + 1
    chosen = torch.cat([torch.zeros(1, dtype=torch.long), others.sort().values])
    return torch.einsum("ni,nj->nij", rows[chosen // block], rows[chosen % block])
