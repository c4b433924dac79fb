"""Fixed points: iterate an algorithm to a tolerance."""

from firmly.fixedpoint.solve import Solution, Status, solve

__all__ = ["Solution", "Status", "solve"]
