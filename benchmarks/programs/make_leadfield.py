"""Make the leadfield that ships as firmly/data/meg/vectorview.npz, from the coil positions of mne. Needs firmly[meg].

python -m benchmarks.programs.make_leadfield vectorview.npz
"""

from __future__ import annotations

import sys
from pathlib import Path

import mne
import numpy as np

CENTRE = np.array([0.0, 0.0, 0.04])  # of the spherical head, metres
OUTERMOST = 0.075


def cortex_like_positions() -> np.ndarray:
    """Vertices of the inner skull of `fsaverage` in head coordinates, shrunk, the upper part, inside a sphere."""
    folder = Path(mne.__file__).parent / "data" / "fsaverage"
    skull = mne.read_bem_surfaces(folder / "fsaverage-inner_skull-bem.fif")[0]
    to_head = mne.transforms.invert_transform(mne.read_trans(folder / "fsaverage-trans.fif"))
    points = mne.transforms.apply_trans(to_head, skull["rr"])[:642]
    points = points.mean(0) + 0.8 * (points - points.mean(0))
    points = points[points[:, 2] > 0]
    offset = points - CENTRE
    length = np.linalg.norm(offset, axis=1, keepdims=True)
    return CENTRE + offset * np.minimum(1, OUTERMOST / length)


def tangential_directions(positions: np.ndarray) -> np.ndarray:
    """A random tangential direction for every source, and the one at a right angle to it: (sources, 2, 3)."""
    radial = positions - CENTRE
    radial /= np.linalg.norm(radial, axis=1, keepdims=True)
    first = np.random.RandomState(0).randn(*positions.shape)
    first -= (first * radial).sum(1, keepdims=True) * radial
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    return np.stack([first, np.cross(radial, first)], 1)


def main(target: str) -> None:
    info = mne.channels.read_meg_canonical_info("neuromag")
    lifted = np.eye(4)
    lifted[2, 3] = 0.05  # the helmet's origin lies inside the head: some coils would, too
    with info._unlock():
        info["dev_head_t"] = mne.transforms.Transform("meg", "head", lifted)
    positions = cortex_like_positions()
    directions = tangential_directions(positions)
    sphere = mne.make_sphere_model(r0=tuple(CENTRE), head_radius=0.09)
    sources = mne.setup_volume_source_space(
        pos={"rr": positions, "nn": directions[:, 0]},
        sphere=(*CENTRE, 0.08),
        sphere_units="m",
        mindist=0.0,
        exclude=0.0,
    )
    nowhere = mne.transforms.Transform("head", "mri", np.eye(4))
    forward = mne.make_forward_solution(info, trans=nowhere, src=sources, bem=sphere, eeg=False, mindist=0.0)
    noise = mne.make_ad_hoc_cov(info)
    spread = dict(zip(noise["names"], np.sqrt(noise["data"])))
    fields = forward["sol"]["data"].reshape(len(info["chs"]), len(positions), 3)
    gain = np.einsum("msk,sok->mso", fields, directions) * 1e-9  # of 1 nAm
    gain /= np.array([spread[name] for name in forward["sol"]["row_names"]])[:, None, None]
    scale = np.abs(gain).max((0, 2)).astype(np.float32)
    np.savez_compressed(
        target,
        gain=(gain / scale[None, :, None]).astype(np.float16),
        scale=scale,
        positions=positions.astype(np.float32),
    )
    print(f"wrote {target}: {gain.shape[0]} sensors, {gain.shape[1]} sources, {gain.shape[2]} directions")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "vectorview.npz")
