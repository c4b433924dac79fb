"""Proximal maps and activations with their slope intervals."""

from firmly.prox.activation import Activation, Clip
from firmly.prox.balls import L1Ball, L2Ball
from firmly.prox.box import Box, NonNegative
from firmly.prox.elastic_net import ElasticNet
from firmly.prox.filter_bank import dct_filters, peak_power
from firmly.prox.gradient_step import GradientStep
from firmly.prox.group_l1 import GroupL1
from firmly.prox.huber import Huber
from firmly.prox.kl import KullbackLeibler
from firmly.prox.l1 import L1
from firmly.prox.legendre import Legendre, legendre
from firmly.prox.manifold import Manifold
from firmly.prox.mixed_norm import MixedNorm
from firmly.prox.norms import L2, SquaredL2
from firmly.prox.prior import Prior, Slope, Zero, proximal
from firmly.prox.ridge import Ridge, ridge_gradient
from firmly.prox.row_stochastic import RowStochastic
from firmly.prox.simplex import Simplex
from firmly.prox.spectral import LogDet, Nuclear
from firmly.prox.spectral_entropy import NoisyLogDet, VonNeumann
from firmly.prox.spline import LinearSpline, MonotoneSpline, huber_slopes
from firmly.prox.threshold import ChannelThreshold
from firmly.prox.tv import TV
from firmly.prox.tv1d import TV1D
from firmly.prox.weakly_convex import MCP, SCAD

__all__ = [
    "L1",
    "L2",
    "MCP",
    "SCAD",
    "TV",
    "TV1D",
    "Activation",
    "Box",
    "ChannelThreshold",
    "Clip",
    "ElasticNet",
    "GradientStep",
    "GroupL1",
    "Huber",
    "KullbackLeibler",
    "L1Ball",
    "L2Ball",
    "Legendre",
    "LinearSpline",
    "LogDet",
    "Manifold",
    "MixedNorm",
    "MonotoneSpline",
    "NoisyLogDet",
    "NonNegative",
    "Nuclear",
    "Prior",
    "Ridge",
    "RowStochastic",
    "Simplex",
    "Slope",
    "SquaredL2",
    "VonNeumann",
    "Zero",
    "dct_filters",
    "huber_slopes",
    "legendre",
    "peak_power",
    "proximal",
    "ridge_gradient",
]
