"""Fixed points: iterate an algorithm to a tolerance, and differentiate equilibria."""

from firmly.fixedpoint.equilibrium import equilibrium
from firmly.fixedpoint.solve import Solution, Status, solve

__all__ = ["Solution", "Status", "equilibrium", "solve"]
