"""Sparse coding and learned priors."""

from firmly.priors.alternating import Alternating, Unrolled
from firmly.priors.analysis_operator import AnalysisOperator, TightFrame, UnitRows
from firmly.priors.duality import Gap, duality_gap
from firmly.priors.hypergradient import implicit_lasso
from firmly.priors.k_svd import KSvd, Mod
from firmly.priors.lasso import SparseCode, SparseCodingStatus, lasso
from firmly.priors.learning import Learned, learn_dictionary, learn_from_stream
from firmly.priors.losses import Logistic, Softmax, Squared
from firmly.priors.omp import OmpCode, omp
from firmly.priors.online import Online
from firmly.priors.oracle_steps import OracleIsta
from firmly.priors.paths import LassoPath, lasso_path, weight_max
from firmly.priors.penalty import Penalty
from firmly.priors.recovery import recovery
from firmly.priors.several_operators import Identifiability, Masks, Operators
from firmly.priors.sparse_linear import SparseLinear
from firmly.priors.sparse_model import SparseModel
from firmly.priors.synthesis import CircularSynthesis, MatrixSynthesis

__all__ = [
    "Alternating",
    "AnalysisOperator",
    "CircularSynthesis",
    "Gap",
    "Identifiability",
    "KSvd",
    "LassoPath",
    "Learned",
    "Logistic",
    "Masks",
    "MatrixSynthesis",
    "Mod",
    "OmpCode",
    "Online",
    "Operators",
    "OracleIsta",
    "Penalty",
    "SparseCode",
    "SparseCodingStatus",
    "Softmax",
    "SparseLinear",
    "SparseModel",
    "Squared",
    "TightFrame",
    "UnitRows",
    "Unrolled",
    "duality_gap",
    "implicit_lasso",
    "lasso",
    "lasso_path",
    "learn_dictionary",
    "learn_from_stream",
    "omp",
    "recovery",
    "weight_max",
]
