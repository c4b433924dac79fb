"""Linear maps with an adjoint, and a norm that can be trusted."""

from firmly.linear.adapters import from_deepinv, from_pylops, from_scipy
from firmly.linear.algebra import Compose, Identity, Scale, Stack, Sum
from firmly.linear.basis import Basis
from firmly.linear.basis import Dense as DenseBasis
from firmly.linear.basis import Fourier as FourierBasis
from firmly.linear.basis import Singular as SingularBasis
from firmly.linear.block_sampling import BlockSampling
from firmly.linear.blur import Blur
from firmly.linear.convolution import Convolution
from firmly.linear.dense import Dense
from firmly.linear.differences import Cumulative, Differences
from firmly.linear.filtered_radon import FilteredRadon
from firmly.linear.fourier_sampling import FourierSampling
from firmly.linear.gradient import Gradient
from firmly.linear.gram import is_gram
from firmly.linear.map import Bracket, LinearMap
from firmly.linear.mask import Diagonal, Mask
from firmly.linear.monotone import LoopResolvent, Monotone, balanced_step, monotonicity
from firmly.linear.radon import Radon
from firmly.linear.resolvent import Resolvent
from firmly.linear.sparse import Sparse
from firmly.linear.spectrum import singular_basis
from firmly.linear.symbol import Symbol
from firmly.linear.tiers import Tier, Tiers, from_phases, phases
from firmly.linear.wavelet import Wavelet

__all__ = [
    "Basis",
    "BlockSampling",
    "Blur",
    "Bracket",
    "Compose",
    "Convolution",
    "Cumulative",
    "Dense",
    "DenseBasis",
    "Diagonal",
    "Differences",
    "FilteredRadon",
    "FourierBasis",
    "FourierSampling",
    "Gradient",
    "Identity",
    "LinearMap",
    "LoopResolvent",
    "Mask",
    "Monotone",
    "Radon",
    "Resolvent",
    "Scale",
    "SingularBasis",
    "Sparse",
    "Stack",
    "Sum",
    "Symbol",
    "Tier",
    "Tiers",
    "Wavelet",
    "balanced_step",
    "from_deepinv",
    "from_phases",
    "from_pylops",
    "from_scipy",
    "is_gram",
    "monotonicity",
    "phases",
    "singular_basis",
]
