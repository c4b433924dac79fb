"""Optimisers designed as feedback loops, with the stability tests that guard them."""

from firmly.optim import gain_profiles, presets
from firmly.optim.a_posteriori import APosteriori, gauss_newton_curvature
from firmly.optim.adaptation_gain import AdaptationGain, Response
from firmly.optim.balance import Balance
from firmly.optim.block_kalman import BlockKalman
from firmly.optim.change_detection import PageHinkley
from firmly.optim.dag import Dag
from firmly.optim.events import EventPasses, LossEvent
from firmly.optim.feedback import Feedback, Stability
from firmly.optim.implicit_step import ImplicitStep, PredictionErrors
from firmly.optim.layer_rls import LayerRls
from firmly.optim.line_search import ArmijoSearch
from firmly.optim.lyapunov import LyapunovMonitor, StabilityWarning
from firmly.optim.nearest_gain import nearest_gain
from firmly.optim.polyak import PolyakStep
from firmly.optim.rate import Rate, certified_rate, verified
from firmly.optim.recursive_least_squares import RecursiveLeastSquares
from firmly.optim.streaming import StreamLearner

__all__ = [
    "APosteriori",
    "AdaptationGain",
    "ArmijoSearch",
    "Balance",
    "BlockKalman",
    "Dag",
    "EventPasses",
    "Feedback",
    "ImplicitStep",
    "LayerRls",
    "LossEvent",
    "LyapunovMonitor",
    "PageHinkley",
    "PolyakStep",
    "PredictionErrors",
    "Rate",
    "RecursiveLeastSquares",
    "Response",
    "Stability",
    "StabilityWarning",
    "StreamLearner",
    "certified_rate",
    "gain_profiles",
    "gauss_newton_curvature",
    "nearest_gain",
    "presets",
    "verified",
]
