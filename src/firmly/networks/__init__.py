"""Networks: algorithms unrolled into layers."""

from firmly.networks.admm_net import AdmmNet
from firmly.networks.alista_metric import in_metric
from firmly.networks.analytic_weights import analytic_weights
from firmly.networks.beyond_depth import beyond_depth
from firmly.networks.bregman import BregmaNet, BregmanLayer
from firmly.networks.bregman_blocks import BregmanBlock, BregmanMean, BregmanResNet
from firmly.networks.bregman_flow import Affine, BregmanFlow, WideBregmanLayer
from firmly.networks.bregman_grid import Grid, grid_lines
from firmly.networks.bregman_inverse import Inverse, inverse
from firmly.networks.bregman_invertible import Invertibility, Residual, invertibility
from firmly.networks.bregman_lipschitz import OnBox, bounds_on_box
from firmly.networks.bregman_log_det import LogDet, estimate_log_det, log_det, series_log_det
from firmly.networks.bregman_weights import Triangular, invertible_weight
from firmly.networks.calibration import calibrate, calibrate_hyper, nmse_db
from firmly.networks.check_unrolled import UnrolledCheck, check_unrolled, project, read_tensors
from firmly.networks.descent import descend
from firmly.networks.ista_net import IstaNet, IstaNetPlus
from firmly.networks.learned_tv import learned_tv, tv_objective
from firmly.networks.lista import lista
from firmly.networks.monotone import MonotoneLayer
from firmly.networks.monotone_scales import MultiscaleMonotoneLayer
from firmly.networks.sparse_network import SparseNetwork
from firmly.networks.support_selection import Selection
from firmly.networks.unroll import Unrolled, unroll
from firmly.networks.warm_start import WarmStart
from firmly.networks.whitening import analytic_whitening

__all__ = [
    "AdmmNet",
    "Affine",
    "BregmaNet",
    "BregmanBlock",
    "BregmanFlow",
    "BregmanLayer",
    "BregmanMean",
    "BregmanResNet",
    "Grid",
    "Inverse",
    "Invertibility",
    "IstaNet",
    "IstaNetPlus",
    "LogDet",
    "MonotoneLayer",
    "MultiscaleMonotoneLayer",
    "OnBox",
    "Residual",
    "Selection",
    "SparseNetwork",
    "Triangular",
    "Unrolled",
    "UnrolledCheck",
    "WarmStart",
    "WideBregmanLayer",
    "analytic_weights",
    "analytic_whitening",
    "beyond_depth",
    "bounds_on_box",
    "calibrate",
    "calibrate_hyper",
    "check_unrolled",
    "descend",
    "estimate_log_det",
    "grid_lines",
    "in_metric",
    "inverse",
    "invertibility",
    "invertible_weight",
    "learned_tv",
    "nmse_db",
    "lista",
    "log_det",
    "project",
    "read_tensors",
    "series_log_det",
    "tv_objective",
    "unroll",
]
