"""Linear maps with an adjoint, and a norm that can be trusted."""

from firmly.linear.algebra import Compose, Identity, Scale, Stack, Sum
from firmly.linear.basis import Basis
from firmly.linear.basis import Dense as DenseBasis
from firmly.linear.basis import Fourier as FourierBasis
from firmly.linear.basis import Singular as SingularBasis
from firmly.linear.convolution import Convolution
from firmly.linear.dense import Dense
from firmly.linear.map import Bracket, LinearMap
from firmly.linear.resolvent import Resolvent
from firmly.linear.symbol import Symbol

__all__ = [
    "Basis",
    "Bracket",
    "Compose",
    "Convolution",
    "Dense",
    "DenseBasis",
    "FourierBasis",
    "Identity",
    "LinearMap",
    "Resolvent",
    "Scale",
    "SingularBasis",
    "Stack",
    "Sum",
    "Symbol",
]
