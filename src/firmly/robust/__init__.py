"""Training from uncertain labels: risks over ambiguity sets, label-noise models and losses."""

from firmly.robust.ambiguity import AmbiguitySet, WorstCase
from firmly.robust.divergences import KL, Chi2, CVaR, KLPenalty, TotalVariation
from firmly.robust.label_costs import boundary_distance, ordinal_cost, tree_cost
from firmly.robust.label_store import LabelStore, View
from firmly.robust.label_wasserstein import LabelRisk, Wasserstein, label_risk
from firmly.robust.losses import (
    active_passive,
    backward_correction,
    bi_tempered,
    cross_entropy,
    early_learning,
    forward_correction,
    generalised_cross_entropy,
    mean_absolute_error,
    of_labels,
    symmetric_cross_entropy,
)
from firmly.robust.pencil import label_logits, label_step, pencil_loss, smooth_label_step
from firmly.robust.precision import Precision, SpectralDouglasRachford, robust_precision
from firmly.robust.risks import risk, worst_case

__all__ = [
    "AmbiguitySet",
    "CVaR",
    "Chi2",
    "KL",
    "KLPenalty",
    "LabelRisk",
    "LabelStore",
    "Precision",
    "SpectralDouglasRachford",
    "TotalVariation",
    "View",
    "Wasserstein",
    "WorstCase",
    "active_passive",
    "backward_correction",
    "bi_tempered",
    "boundary_distance",
    "cross_entropy",
    "early_learning",
    "forward_correction",
    "generalised_cross_entropy",
    "label_logits",
    "label_risk",
    "label_step",
    "mean_absolute_error",
    "of_labels",
    "ordinal_cost",
    "pencil_loss",
    "risk",
    "robust_precision",
    "smooth_label_step",
    "symmetric_cross_entropy",
    "tree_cost",
    "worst_case",
]
