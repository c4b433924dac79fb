"""Sparse coding and learned priors."""

from firmly.priors.duality import Gap, duality_gap
from firmly.priors.lasso import SparseCode, SparseCodingStatus, lasso
from firmly.priors.penalty import Penalty

__all__ = ["Gap", "Penalty", "SparseCode", "SparseCodingStatus", "duality_gap", "lasso"]
