"""Networks: algorithms unrolled into layers."""

from firmly.networks.unroll import Unrolled, unroll

__all__ = ["Unrolled", "unroll"]
