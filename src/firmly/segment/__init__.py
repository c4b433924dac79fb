"""Segmentation: an entropic energy with total variation as a layer, its losses, features of pixels, models.

The settings of hyperparameters that are tuned are in `firmly.segment.tuning`; the estimators for scikit-learn in
`firmly.segment.classifiers` and `firmly.segment.pixel_classifier`.
"""

from firmly.segment.certified import CertifiedPixels, certified_pixels
from firmly.segment.dual_ascent import Minimum
from firmly.segment.energy import EntropicTV
from firmly.segment.features import PixelFeatures
from firmly.segment.fenchel_young import fenchel_young
from firmly.segment.grid import contrast_weights
from firmly.segment.linear_segmenter import LinearSegmenter
from firmly.segment.networks import monotone_segmenter, unrolled_segmenter
from firmly.segment.random_walker import random_walker
from firmly.segment.structured_hinge import structured_hinge
from firmly.segment.tuning import tune_energy, tune_segmenter
from firmly.segment.unet import UNet
from firmly.segment.unrolled import EntropicDual, unrolled_head

__all__ = [
    "CertifiedPixels",
    "EntropicDual",
    "EntropicTV",
    "LinearSegmenter",
    "Minimum",
    "PixelFeatures",
    "UNet",
    "certified_pixels",
    "contrast_weights",
    "fenchel_young",
    "monotone_segmenter",
    "random_walker",
    "structured_hinge",
    "tune_energy",
    "tune_segmenter",
    "unrolled_head",
    "unrolled_segmenter",
]
