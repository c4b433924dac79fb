"""Segmentation: an entropic energy with total variation as a layer, its losses, features of pixels, models."""

from firmly.segment.energy import EntropicTV, Minimum
from firmly.segment.features import PixelFeatures
from firmly.segment.fenchel_young import fenchel_young
from firmly.segment.grid import contrast_weights
from firmly.segment.linear_segmenter import LinearSegmenter
from firmly.segment.random_walker import random_walker
from firmly.segment.structured_hinge import structured_hinge

__all__ = [
    "EntropicTV",
    "LinearSegmenter",
    "Minimum",
    "PixelFeatures",
    "contrast_weights",
    "fenchel_young",
    "random_walker",
    "structured_hinge",
]
