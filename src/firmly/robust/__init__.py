"""Training from uncertain labels: risks over ambiguity sets, label-noise models and losses."""

from firmly.robust.ambiguity import AmbiguitySet, WorstCase
from firmly.robust.divergences import KL, Chi2, CVaR, KLPenalty, TotalVariation
from firmly.robust.label_costs import boundary_distance, ordinal_cost, tree_cost
from firmly.robust.label_wasserstein import LabelRisk, Wasserstein, label_risk
from firmly.robust.risks import risk, worst_case

__all__ = [
    "KL",
    "AmbiguitySet",
    "CVaR",
    "Chi2",
    "KLPenalty",
    "LabelRisk",
    "TotalVariation",
    "Wasserstein",
    "WorstCase",
    "boundary_distance",
    "label_risk",
    "ordinal_cost",
    "risk",
    "tree_cost",
    "worst_case",
]
