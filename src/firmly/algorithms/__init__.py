"""Optimisation algorithms, each written once: a start, a step, a reading, and executable conditions."""

from firmly.algorithms.admm import Admm
from firmly.algorithms.algorithm import Algorithm, Condition, Rule, check
from firmly.algorithms.chambolle_pock import ChambollePock
from firmly.algorithms.condat_vu import CondatVu
from firmly.algorithms.douglas_rachford import DouglasRachford
from firmly.algorithms.dual_forward_backward import DualForwardBackward
from firmly.algorithms.equilibrium import EquilibriumForwardBackward, PeacemanRachford
from firmly.algorithms.fista import Fista
from firmly.algorithms.forward_backward import ForwardBackward
from firmly.algorithms.heavy_ball import HeavyBall
from firmly.algorithms.hqs import Hqs
from firmly.algorithms.smooth import SmoothTerm, Tikhonov

__all__ = [
    "Admm",
    "Algorithm",
    "ChambollePock",
    "CondatVu",
    "Condition",
    "DouglasRachford",
    "DualForwardBackward",
    "EquilibriumForwardBackward",
    "Fista",
    "ForwardBackward",
    "HeavyBall",
    "Hqs",
    "PeacemanRachford",
    "Rule",
    "SmoothTerm",
    "Tikhonov",
    "check",
]
