"""The experiments that `firmly run` knows."""

from __future__ import annotations

from firmly.errors import SettingsError
from firmly.lab.experiments import (
    bilevel,
    bregman,
    compressed_sensing,
    ct,
    deblur,
    denoise,
    dictionary,
    inpaint,
    meg,
    mri,
    optim,
    segment,
    sparse_coding,
    tv,
)
from firmly.lab.reconstruction import Experiment
from firmly.lab.settings import nearest
from firmly.lab.study import Study

EXPERIMENTS: tuple[Experiment | Study, ...] = (
    deblur.EXPERIMENT,
    denoise.EXPERIMENT,
    inpaint.EXPERIMENT,
    mri.EXPERIMENT,
    meg.STUDY,
    tv.STUDY,
    ct.STUDY,
    compressed_sensing.STUDY,
    dictionary.STUDY,
    sparse_coding.STUDY,
    bilevel.STUDY,
    bregman.STUDY,
    segment.STUDY,
    optim.STUDY,
)


def find(name: str) -> Experiment | Study:
    """The experiment of this name; `SettingsError` with the nearest names if there is none."""
    known = {e.name: e for e in EXPERIMENTS}
    if name not in known:
        raise SettingsError(f"there is no experiment {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return known[name]
