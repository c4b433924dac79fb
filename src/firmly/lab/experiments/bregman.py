"""BregmaNets beside multilayer perceptrons and residual networks of equal size: are they more robust, and why?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from firmly.lab.experiments import bregman_page as page
from firmly.lab.experiments.bregman_data import read
from firmly.lab.experiments.bregman_networks import KINDS, Activation, Budget, Kind, Shape
from firmly.lab.experiments.bregman_plane import flow_section, folding_section, region_section
from firmly.lab.experiments.bregman_robustness import Compared, Effort, compare
from firmly.lab.page import Page
from firmly.lab.run_folder import RunFolder
from firmly.lab.settings import require
from firmly.lab.study import Listener, Study


@dataclass(frozen=True)
class BregmanSettings:
    """`depth` layers of `width` units of each network learn `train` samples in `steps` batches, `seeds` times; the
    learning rate is one of `rates`, chosen on validation samples. `decay` is the weight decay of all sections but one,
    which goes through `decays`.

    Attacks take `attack_steps` on every ball, up to `radius` in the Euclidean norm of pixels in [0, 1], on `test`
    samples; `budget_s` is for one certificate. The networks of the spirals have `spiral_width` units and take
    `spiral_steps` batches, flows take `flow_steps`.
    """

    data: Literal["digits", "mnist", "fashion-mnist"] = "digits"
    train: int = 1200
    test: int = 360
    width: int = 32
    depth: int = 4
    activation: Activation = "tanh"
    steps: int = 500
    rates: tuple[float, ...] = (3e-3, 1e-2)
    decay: float = 1.0
    decays: tuple[float, ...] = (0.0,)
    seeds: int = 3
    radius: float = 0.8
    attack_steps: int = 30
    budget_s: float = 5.0
    spiral_width: int = 16
    spiral_steps: int = 1500
    flow_steps: int = 600
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        require(self.train >= 20 and self.test >= 10, "at least 20 samples to train and 10 for the test")
        require(min(self.width, self.depth, self.spiral_width) >= 1, "widths and depth are at least 1")
        require(min(self.steps, self.spiral_steps, self.flow_steps) >= 10, "at least 10 steps")
        require(bool(self.rates) and min(self.rates) > 0, f"rates are positive; given {self.rates}")
        require(min((self.decay, *self.decays)) >= 0, "weight decays are not negative")
        require(1 <= self.seeds <= 10, f"seeds is from 1 to 10; given {self.seeds}")
        require(self.radius > 0 and self.budget_s > 0, "radius and budget_s are positive")
        require(self.attack_steps >= 1, f"attack_steps is at least 1; given {self.attack_steps}")


def run(settings: BregmanSettings, run_folder: RunFolder, listen: Listener) -> Page:
    shape = Shape(settings.width, settings.depth, settings.activation)
    split = read(settings.data, settings.train, settings.test, settings.seed)
    decays = (settings.decay, *(d for d in settings.decays if d != settings.decay))
    done, total = 0, (1 + len(decays) * len(KINDS)) * settings.seeds

    def one_more() -> None:
        nonlocal done
        done += 1
        listen("work", {"name": "training, proving, attacking", "done": done, "total": total})

    found: list[Compared] = []
    for decay in decays:
        kinds: tuple[Kind, ...] = KINDS if found else (*KINDS, "BregmaNet, dual")
        budget = Budget(settings.steps, 64, settings.rates, decay)
        effort = Effort(settings.radius, settings.attack_steps, settings.budget_s)
        seeds = range(settings.seed, settings.seed + settings.seeds)
        found.append(compare(split, shape, budget, effort, seeds, run_folder, settings.data, one_more, kinds))
    ours = found[0]
    sections = [
        page.robustness_section(ours, run_folder),
        page.reasons_section(ours, split, run_folder),
        page.decay_section(decays, found),
    ]
    listen("note", {"text": "the plane: decision regions, folds, a flow"})
    sections.append(region_section(settings, run_folder))
    sections.append(folding_section(run_folder))
    sections.append(flow_section(settings, run_folder))
    return Page(page.headline(ours), page.summary(ours, split, shape), tuple(sections), page.facts(ours))


DEFAULT = BregmanSettings()
SMOKE = BregmanSettings(
    train=200, test=40, width=8, depth=2, steps=40, rates=(1e-2,), decays=(), seeds=1, attack_steps=5, budget_s=1.0,
    spiral_width=8, spiral_steps=60, flow_steps=20,
)  # fmt: skip
FULL = BregmanSettings("mnist", 20_000, 2000, 64, steps=3000, seeds=5, radius=1.5, budget_s=10.0, flow_steps=1500)
STUDY = Study(
    "bregman", "Bregman networks", {"smoke": SMOKE, "default": DEFAULT, "full": FULL},
    lambda settings: f"robust? MLP, ResNet and BregmaNet on {settings.data}", run,
)  # fmt: skip
