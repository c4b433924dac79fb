"""Segmentation: an entropic energy with total variation as a layer, and its losses."""

from firmly.segment.energy import EntropicTV, Minimum
from firmly.segment.fenchel_young import fenchel_young
from firmly.segment.grid import contrast_weights
from firmly.segment.structured_hinge import structured_hinge

__all__ = ["EntropicTV", "Minimum", "contrast_weights", "fenchel_young", "structured_hinge"]
