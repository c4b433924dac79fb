"""Proximal maps and activations with their slope intervals."""

from firmly.prox.activation import Activation, Clip
from firmly.prox.filter_bank import dct_filters, peak_power
from firmly.prox.l1 import L1
from firmly.prox.prior import Prior, Slope, Zero, proximal
from firmly.prox.ridge import Ridge, ridge_gradient
from firmly.prox.spline import LinearSpline, huber_slopes

__all__ = [
    "L1",
    "Activation",
    "Clip",
    "LinearSpline",
    "Prior",
    "Ridge",
    "Slope",
    "Zero",
    "dct_filters",
    "huber_slopes",
    "peak_power",
    "proximal",
    "ridge_gradient",
]
