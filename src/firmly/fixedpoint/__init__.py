"""Fixed points: iterate to a tolerance, and differentiate solutions."""

from firmly.fixedpoint.adjoints import AdjointWarning, Checkpointed, Implicit, Neumann, OneStep, Unrolled
from firmly.fixedpoint.bilevel import BilevelSolution, Ending, bilevel
from firmly.fixedpoint.contraction import contraction_factor
from firmly.fixedpoint.criteria import Criterion, Estimate, cross_validation, divergence, hold_out, k_folds, sure
from firmly.fixedpoint.equilibrium import equilibrium
from firmly.fixedpoint.fixed_point import FixedPoint, fixed_point
from firmly.fixedpoint.layer import ImplicitLayer, implicit
from firmly.fixedpoint.proximal_gradient import ProximalGradient
from firmly.fixedpoint.quadratic_program import QuadraticProgram, quadratic_program
from firmly.fixedpoint.solve import Solution, Status, solve
from firmly.fixedpoint.solvers import Anderson, Broyden, Newton, Picard
from firmly.fixedpoint.stochastic_bilevel import StochasticSolution, stochastic_bilevel

__all__ = [
    "AdjointWarning",
    "Anderson",
    "BilevelSolution",
    "Broyden",
    "Checkpointed",
    "Criterion",
    "Ending",
    "Estimate",
    "FixedPoint",
    "Implicit",
    "ImplicitLayer",
    "Neumann",
    "Newton",
    "OneStep",
    "Picard",
    "ProximalGradient",
    "QuadraticProgram",
    "Solution",
    "Status",
    "StochasticSolution",
    "Unrolled",
    "bilevel",
    "contraction_factor",
    "cross_validation",
    "divergence",
    "equilibrium",
    "fixed_point",
    "hold_out",
    "implicit",
    "k_folds",
    "quadratic_program",
    "solve",
    "stochastic_bilevel",
    "sure",
]
