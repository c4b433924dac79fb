"""Optimisers designed as feedback loops, with the stability tests that guard them."""

from firmly.optim import presets
from firmly.optim.a_posteriori import APosteriori
from firmly.optim.adaptation_gain import AdaptationGain, Response
from firmly.optim.block_kalman import BlockKalman
from firmly.optim.dag import Dag
from firmly.optim.events import EventPasses, LossEvent
from firmly.optim.feedback import Feedback, Stability
from firmly.optim.implicit_step import ImplicitStep, PredictionErrors
from firmly.optim.lyapunov import LyapunovMonitor, StabilityWarning
from firmly.optim.nearest_gain import nearest_gain
from firmly.optim.rate import Rate, certified_rate, verified
from firmly.optim.recursive_least_squares import RecursiveLeastSquares

__all__ = [
    "APosteriori",
    "AdaptationGain",
    "BlockKalman",
    "Dag",
    "EventPasses",
    "Feedback",
    "ImplicitStep",
    "LossEvent",
    "LyapunovMonitor",
    "PredictionErrors",
    "Rate",
    "RecursiveLeastSquares",
    "Response",
    "Stability",
    "StabilityWarning",
    "certified_rate",
    "nearest_gain",
    "presets",
    "verified",
]
