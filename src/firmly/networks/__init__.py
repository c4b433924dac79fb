"""Networks: algorithms unrolled into layers."""

from firmly.networks.analytic_weights import analytic_weights, analytic_whitening
from firmly.networks.lista import lista
from firmly.networks.sparse_network import SparseNetwork
from firmly.networks.support_selection import Selection
from firmly.networks.unroll import Unrolled, unroll

__all__ = ["Selection", "SparseNetwork", "analytic_weights", "analytic_whitening", "lista", "Unrolled", "unroll"]
