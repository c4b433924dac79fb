"""Training from uncertain labels: risks over ambiguity sets, label-noise models and losses.

The estimator for scikit-learn is in `firmly.robust.wasserstein_classifier`.
"""

from firmly.robust.adele import (
    Adele,
    class_overlaps,
    memorisation_onset,
    multiscale_consistency,
    multiscale_laws,
)
from firmly.robust.alma_prox import AlmaProx, logit_lead, logit_ratio
from firmly.robust.ambiguity import AmbiguitySet, WorstCase
from firmly.robust.annotators import Annotators, annotated, biased_annotators
from firmly.robust.attack_losses import margin_loss, plain_loss, segpgd_loss
from firmly.robust.attack_metrics import RobustnessCurves, certified_iou, mean_iou, robustness_curves
from firmly.robust.attacked_model import Adversarial, SegmentationAttack
from firmly.robust.baselines import (
    AnnotatorConfusion,
    co_trained,
    normalised_dice,
    transition_from_anchors,
    transition_from_clean,
)
from firmly.robust.contours import contour_offsets, move_contours
from firmly.robust.dag import DAG
from firmly.robust.divergences import KL, Chi2, CVaR, KLPenalty, TotalVariation
from firmly.robust.label_cleaner import (
    CleanedLabels,
    Cleaner,
    Seen,
    clean_labels,
    cleaner_features,
    label_posterior,
    transition_from_laws,
)
from firmly.robust.label_costs import boundary_distance, ordinal_cost, tree_cost
from firmly.robust.label_quality import LabelErrors, image_quality, label_errors, pixel_quality
from firmly.robust.label_smoothing import smoothed_labels
from firmly.robust.label_store import LabelStore, View
from firmly.robust.label_wasserstein import LabelRisk, Wasserstein, label_risk
from firmly.robust.linear_wasserstein import RobustLogistic, wasserstein_logistic
from firmly.robust.linf_prox import linf_prox
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
from firmly.robust.noise_models import (
    BoundaryJitter,
    BoundaryShift,
    ClassConfusion,
    Corrupted,
    InTurn,
    LabelNoise,
    MergedObjects,
    MissingObjects,
    RegionFlips,
    at_rate,
)
from firmly.robust.penalty import attack_penalty, penalty_slope
from firmly.robust.pencil import label_logits, label_step, pencil_loss, smooth_label_step
from firmly.robust.pgd import PGD, MinimalPGD
from firmly.robust.precision import Precision, SpectralDouglasRachford, robust_precision
from firmly.robust.risks import risk, worst_case
from firmly.robust.staple import Staple, staple
from firmly.robust.t_loss import TLoss
from firmly.segment.logistic_regression import logistic_regression

__all__ = [
    "Adele",
    "Adversarial",
    "AlmaProx",
    "AmbiguitySet",
    "AnnotatorConfusion",
    "Annotators",
    "BoundaryJitter",
    "BoundaryShift",
    "CVaR",
    "Chi2",
    "ClassConfusion",
    "CleanedLabels",
    "Cleaner",
    "Corrupted",
    "DAG",
    "InTurn",
    "KL",
    "KLPenalty",
    "LabelErrors",
    "LabelNoise",
    "LabelRisk",
    "LabelStore",
    "MergedObjects",
    "MinimalPGD",
    "MissingObjects",
    "PGD",
    "Precision",
    "RegionFlips",
    "RobustLogistic",
    "RobustnessCurves",
    "Seen",
    "SegmentationAttack",
    "SpectralDouglasRachford",
    "Staple",
    "TLoss",
    "TotalVariation",
    "View",
    "Wasserstein",
    "WorstCase",
    "active_passive",
    "annotated",
    "at_rate",
    "attack_penalty",
    "backward_correction",
    "bi_tempered",
    "biased_annotators",
    "boundary_distance",
    "certified_iou",
    "clean_labels",
    "cleaner_features",
    "class_overlaps",
    "co_trained",
    "contour_offsets",
    "cross_entropy",
    "early_learning",
    "forward_correction",
    "generalised_cross_entropy",
    "image_quality",
    "label_errors",
    "label_logits",
    "label_posterior",
    "label_risk",
    "label_step",
    "linf_prox",
    "logistic_regression",
    "logit_lead",
    "logit_ratio",
    "margin_loss",
    "mean_absolute_error",
    "mean_iou",
    "memorisation_onset",
    "move_contours",
    "multiscale_consistency",
    "multiscale_laws",
    "normalised_dice",
    "of_labels",
    "ordinal_cost",
    "penalty_slope",
    "pencil_loss",
    "pixel_quality",
    "plain_loss",
    "risk",
    "robust_precision",
    "robustness_curves",
    "segpgd_loss",
    "smooth_label_step",
    "smoothed_labels",
    "staple",
    "symmetric_cross_entropy",
    "transition_from_anchors",
    "transition_from_clean",
    "transition_from_laws",
    "tree_cost",
    "wasserstein_logistic",
    "worst_case",
]
