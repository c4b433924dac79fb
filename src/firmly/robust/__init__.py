"""Training from uncertain labels: risks over ambiguity sets, label-noise models and losses."""

from firmly.robust.ambiguity import AmbiguitySet, WorstCase
from firmly.robust.divergences import KL, Chi2, CVaR, KLPenalty, TotalVariation
from firmly.robust.risks import risk, worst_case

__all__ = [
    "KL",
    "AmbiguitySet",
    "CVaR",
    "Chi2",
    "KLPenalty",
    "TotalVariation",
    "WorstCase",
    "risk",
    "worst_case",
]
