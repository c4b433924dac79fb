"""Source localisation in magnetoencephalography: which currents in the brain explain the field at the sensors.

The model is y = G x + noise with y (batch, time, sensors), currents x (batch, time, sources * orientations) and noise
of unit variance: data and gain are whitened first, with `whitener`.
"""

from firmly.priors.sources.gamma_map import gamma_map
from firmly.priors.sources.group_lista import GroupLista
from firmly.priors.sources.localisation import localisation_error, peaks, spatial_dispersion
from firmly.priors.sources.minimum_norm import MinimumNorm
from firmly.priors.sources.mixed_norm import Estimate, mixed_norm, reweighted_mixed_norm
from firmly.priors.sources.source_model import SourceModel, whitener

__all__ = [
    "Estimate",
    "GroupLista",
    "MinimumNorm",
    "SourceModel",
    "gamma_map",
    "localisation_error",
    "mixed_norm",
    "peaks",
    "reweighted_mixed_norm",
    "spatial_dispersion",
    "whitener",
]
