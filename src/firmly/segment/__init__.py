"""Segmentation: an entropic energy with total variation as a layer."""

from firmly.segment.energy import EntropicTV

__all__ = ["EntropicTV"]
