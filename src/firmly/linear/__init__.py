"""Linear maps with an adjoint, and a norm that can be trusted."""

from firmly.linear.algebra import Compose, Identity, Scale, Stack, Sum
from firmly.linear.basis import Basis, Dense as DenseBasis, Fourier as FourierBasis, Singular as SingularBasis
from firmly.linear.map import Bracket, LinearMap
from firmly.linear.symbol import Symbol

__all__ = ["Basis", "Bracket", "Compose", "DenseBasis", "FourierBasis", "Identity", "LinearMap", "Scale", "SingularBasis", "Stack", "Sum", "Symbol"]
