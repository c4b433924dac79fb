"""Compressed sensing: images from few measurements, by learned networks with and without a certificate."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from firmly.certificates import Certificate, Grouped, attack, certify, verify
from firmly.data import Crops, Measurement, catalogue, centre_crop, photographs
from firmly.errors import ConditionError, NotCertifiable
from firmly.lab.experiments import sensing_page
from firmly.lab.experiments.sensing_problems import Problem, parameters, problem, total_variation
from firmly.lab.metrics import psnr, ssim
from firmly.lab.page import Page
from firmly.lab.run_folder import RunFolder
from firmly.lab.settings import require
from firmly.lab.study import Listener, Study
from firmly.lab.training import Plan, train
from firmly.lab.weights import learned, restore, save_weights
from firmly.networks import IstaNet, Unrolled, UnrolledCheck, WarmStart, check_unrolled, project


@dataclass(frozen=True)
class SensingSettings:
    """`task` is block sampling of photographs, or undersampled Fourier data; `ratio` is the fraction measured.

    `patterns` of `block` x `block` pixels are used for blocks; `noise` is the standard deviation of white noise on the
    data in training and test, `more_noise` that of an additional test. `start_noise` regularises the linear start Q.
    The rival ISTA-Net+ has `phases` layers of `channels` channels, and with `constrained` its steps and thresholds stay
    in range; the rival ADMM-Net has as many stages and about as many parameters. So has the certified network of
    `depth` layers, with filters of `filter_size` pixels, whose slopes `cap` bounds (1: firmly nonexpansive layers); its
    steps are 1, the projection onto the data, unless `learn_steps`: learned ones come near 2, where bounds grow. An
    epoch has `rival_steps` steps for the rival and `steps` for the certified network, which take about as long;
    `scalar_rate` is the rate of the latter's scalars relative to `our_rate`. `ratios` are further ratios to train for;
    `scene` is the photograph that is shown. `attack` is the size of the perturbation relative to the data.
    """

    task: Literal["blocks", "mri"] = "blocks"
    ratio: float = 0.25
    patterns: Literal["gaussian", "cosine", "hadamard"] = "gaussian"
    block: int = 33
    noise: float = 0.0
    more_noise: float = 0.05
    start_noise: float = 0.02
    phases: int = 5
    channels: int = 8
    constrained: bool = False
    depth: int = 20
    filter_size: int = 5
    cap: float = 1.0
    learn_steps: bool = False
    threshold: tuple[float, ...] = (0.003, 0.001)
    crop: int = 66
    batch: int = 4
    epochs: int = 8
    steps: int = 50
    rival_steps: int = 150
    rival_rate: float = 1e-2
    our_rate: float = 2e-2
    scalar_rate: float = 3.0
    size: int = 231
    images: int = 8
    scene: str = "boats"
    tv_weights: tuple[float, ...] = (0.001, 0.003)
    tv_iterations: int = 100
    ratios: tuple[float, ...] = ()
    attack: float = 0.01
    certify_seconds: float = 20.0
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        require(0 < self.ratio < 1, f"ratio lies in (0, 1); given {self.ratio}")
        require(all(0 < r < 1 for r in self.ratios), f"ratios lie in (0, 1); given {self.ratios}")
        require(self.noise >= 0 and self.more_noise >= 0, "noise and more_noise are not negative")
        require(self.start_noise > 0, f"start_noise is positive; given {self.start_noise}")
        require(0 < self.cap < 2, f"cap lies in (0, 2), where layers are nonexpansive; given {self.cap}")
        require(len(self.threshold) == 2 and min(self.threshold) > 0, "threshold is two positive numbers")
        require(64 <= self.size <= 280, f"size lies in 64 .. 280; given {self.size}")
        require(self.crop >= 16, f"crop is at least 16; given {self.crop}")
        if self.task == "blocks":
            require(
                self.crop % self.block == 0 and self.size % self.block == 0,
                f"crop and size are multiples of the block, {self.block}; given {self.crop} and {self.size}",
            )
        require(1 <= self.images <= 8, f"there are 8 held-out photographs; given images = {self.images}")
        for name in ("phases", "channels", "depth", "batch", "epochs", "steps", "rival_steps", "tv_iterations"):
            require(getattr(self, name) >= 1, f"{name} is at least 1; given {getattr(self, name)}")
        require(self.filter_size >= 2, f"filter_size is at least 2; given {self.filter_size}")
        require(bool(self.tv_weights) and min(self.tv_weights) > 0, "tv_weights are positive numbers")
        require(self.attack > 0 and self.certify_seconds > 0, "attack and certify_seconds are positive")


SHARES = (1.0, 0.6, 0.4, 0.2, 0.1, 0.05)  # proportions of the two gains that are tried, relative to the closed form


class Row(NamedTuple):
    """One method: its images, and its mean scores without and with additional noise."""

    name: str
    parameters: int | None
    image: Tensor
    psnr: float
    ssim: float
    noisy_psnr: float


class Bounds(NamedTuple):
    """What is proved of the certified network, and what an attack moves both networks by, per unit of data."""

    start_norm: float
    closed_form: float
    spectral: float
    rho: tuple[float, float]  # of the data and of the start: |change|^2 <= rho[0] |d|^2 + rho[1] |Q d|^2
    certificate: Certificate
    ours_attacked: float
    rival_attacked: float
    rival_bound: float | None
    rival_reason: str


class Projection(NamedTuple):
    """The steps and thresholds of the rival, and its score before and after they are put back into their range."""

    check: UnrolledCheck
    before: float
    after: float


def told(settings: SensingSettings) -> str:
    if settings.task == "mri":
        return f"known only by {settings.ratio:.0%} of the columns of their Fourier transform"
    kind = {"gaussian": "random", "cosine": "cosine", "hadamard": "Hadamard"}[settings.patterns]
    return f"known only by inner products with {kind} patterns, {settings.ratio:.0%} as many as pixels"


def run(settings: SensingSettings, run_folder: RunFolder, listen: Listener) -> Page:
    given = problem(settings)
    rival, ours = trained(given, settings, run_folder, listen, "")
    listen("note", {"text": "comparing on held-out photographs"})
    truth = torch.stack([centre_crop(image, settings.size) for image in photographs("test")[: settings.images]])
    rows = compare(given, settings, truth, rival, ours)
    listen("note", {"text": "certifying and attacking"})
    bounds = bound(given, settings, truth, rival, ours)
    bounds.certificate.save(run_folder / "certificate.safetensors")
    projection = projected(given, settings, truth, rival) if isinstance(rival, IstaNet) else None
    curves: dict[str, list[tuple[float, float]]] = {}
    for ratio in sorted({settings.ratio, *settings.ratios}) if settings.ratios else ():
        at = replace(settings, ratio=ratio)
        there = problem(at)
        networks = (rival, ours) if ratio == settings.ratio else trained(there, at, run_folder, listen, f"-{ratio:g}")
        for row in compare(there, replace(at, tv_weights=settings.tv_weights[:1]), truth, *networks):
            curves.setdefault(row.name, []).append((100 * ratio, row.psnr))
    names = [p.name for p in catalogue() if p.split == "test"][: settings.images]
    scene = names.index(settings.scene) if settings.scene in names else 0
    return sensing_page.page(settings, run_folder, truth, scene, rows, bounds, projection, curves)


# -- training ------------------------------------------------------------------------------------------------------


def trained(
    given: Problem, settings: SensingSettings, run_folder: RunFolder, listen: Listener, suffix: str
) -> tuple[nn.Module, WarmStart]:
    """Both networks for images of the test size, trained on crops; a run that was interrupted goes on."""
    crops = Crops(photographs("train"), settings.crop)
    measure = measurement(given, settings, settings.crop, settings.noise)

    def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = crops.batch(settings.batch, generator)
        return measure(x, generator), x

    def fit(name: str, make: Callable[[int], nn.Module], plan: Plan) -> nn.Module:
        torch.manual_seed(settings.seed)
        network = make(settings.crop)
        total = plan.epochs * plan.steps
        outcome = train(
            network, sample, plan, run_folder, name,
            penalty=(lambda net, _: 0.01 * net.symmetry()) if isinstance(network, IstaNet) else None,  # type: ignore[operator]
            callback=lambda event: listen("training", {"name": name, "total": total, **event}),
        )  # fmt: skip
        if outcome.status == "interrupted":
            raise KeyboardInterrupt
        save_weights(run_folder / f"weights/{name}.safetensors", network, {"settings": dataclasses.asdict(settings)})
        return resized(network, make, settings.size)

    epochs, seed = settings.epochs, settings.seed
    rival = fit(f"rival{suffix}", given.rival, Plan(epochs, settings.rival_steps, settings.rival_rate, seed=seed))
    plan = Plan(epochs, settings.steps, settings.our_rate, settings.scalar_rate, seed=seed)
    ours = fit(f"certified{suffix}", lambda size: given.ours(settings, size), plan)
    assert isinstance(ours, WarmStart)
    return rival, ours


def resized(network: nn.Module, make: Callable[[int], nn.Module], size: int) -> nn.Module:
    """The same learned tensors in a network for images of another size."""
    other = make(size)
    restore(other, learned(network), "the trained network")
    return other.eval()


def measurement(given: Problem, settings: SensingSettings, size: int, noise: float) -> Measurement:
    A = given.operator(size)
    return Measurement(A, noise, getattr(A, "mask", None))


# -- evaluation ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def compare(given: Problem, settings: SensingSettings, truth: Tensor, rival: nn.Module, ours: nn.Module) -> list[Row]:
    """The linear start, the best total variation, the rival and the certified network, on the same data."""
    y, noisy = (
        measurement(given, settings, settings.size, sigma)(truth, torch.Generator().manual_seed(settings.seed + 1))
        for sigma in (settings.noise, (settings.noise**2 + settings.more_noise**2) ** 0.5)
    )
    A, Q = given.operator(settings.size), given.initial(settings.size)

    def row(name: str, count: int | None, method: Callable[[Tensor], Tensor]) -> Row:
        image, disturbed = shown(method(y)), shown(method(noisy))
        scores = [float(values.mean()) for values in (psnr(image, truth), ssim(image, truth), psnr(disturbed, truth))]
        return Row(name, count, image, *scores)

    def tv(weight: float) -> Row:
        method = functools.partial(total_variation, A, weight=weight, iterations=settings.tv_iterations)
        return row("Total variation", None, lambda data: method(data, Q(data)))

    return [
        row(given.linear_name, None, Q),
        max((tv(weight) for weight in settings.tv_weights), key=lambda found: found.psnr),
        row(given.rival_name, parameters(rival), rival),
        row("Certified", parameters(ours), ours),
    ]


def shown(image: Tensor) -> Tensor:
    """What is scored: the real part, within [0, 1]."""
    return image.real.clamp(0, 1)


def bound(given: Problem, settings: SensingSettings, truth: Tensor, rival: nn.Module, ours: WarmStart) -> Bounds:
    """Bounds of the certified network in closed form and by shared multipliers, and the reason why the rival has none.

    |F(y) - F(y')|^2 <= rho_d |d|^2 + rho_0 |Q d|^2 for the unrolled part gives L^2 <= rho_d + rho_0 |Q|^2. It is proved
    on the smallest images: the multipliers see the singular values of A, which are 0 and 1 for all of whole blocks, the
    steps, and the slopes of the priors, which hold at every size.
    """
    start_norm = ours.initial.norm().upper
    least = settings.block if settings.task == "blocks" else 16
    single = resized(ours, lambda size: given.ours(settings, size), least).network
    assert isinstance(single, Unrolled)
    closed_form = ours.closed_form()
    spectral, rho, certificate = math.inf, (math.inf, math.inf), None
    for share in SHARES:
        ratio = share * (closed_form**2 - start_norm**2)  # rho_d / rho_0, at most that of the closed form
        grouped = Grouped(single, ("data", "start"), None, {"data": 1 / math.sqrt(ratio), "start": 1.0})
        found = certify(grouped, grouped.groups, "spectral", budget_s=settings.certify_seconds / len(SHARES))
        value = found.upper * math.sqrt(ratio + start_norm**2) * (1 + 1e-12)
        if value < spectral:
            spectral, rho, certificate = value, (ratio * found.upper**2, found.upper**2), verify(found, grouped)
    assert certificate is not None  # every search ends with a finite bound or `NotCertifiable`
    y = given.operator(settings.size)(truth[:1])
    radius = settings.attack * float(y.norm())
    moved = [attack(network, y, radius).ratio for network in (ours, rival)]
    value, reason = None, ""
    try:
        small = resized(rival, given.rival, settings.crop)
        value = certify(small, method="product", budget_s=settings.certify_seconds).upper
    except (NotCertifiable, ConditionError) as error:
        reason = str(error)
    return Bounds(start_norm, closed_form, spectral, rho, certificate, *moved, value, reason)


@torch.no_grad()
def projected(given: Problem, settings: SensingSettings, truth: Tensor, rival: nn.Module) -> Projection:
    """What it costs the rival to have its steps and thresholds in the range of a proximal gradient method."""
    A = given.operator(settings.size)
    check = check_unrolled(rival, A)
    y = measurement(given, settings, settings.size, settings.noise)(
        truth, torch.Generator().manual_seed(settings.seed + 1)
    )
    scores = [float(psnr(shown(net(y)), truth).mean()) for net in (rival, project(rival, check))]
    return Projection(check, *scores)


SMOKE = SensingSettings(
    phases=2, channels=4, depth=3, filter_size=5, crop=33, batch=2, epochs=1, steps=4, rival_steps=4, size=66, images=2,
    tv_weights=(0.003,), tv_iterations=10, certify_seconds=4.0,
)  # fmt: skip
FULL = SensingSettings(
    phases=9, channels=32, depth=50, filter_size=9, crop=99, batch=16, epochs=60, steps=250, rival_steps=500,
    rival_rate=1e-3, our_rate=1e-2, tv_weights=(0.0003, 0.0005, 0.001, 0.002, 0.005), tv_iterations=300,
    ratios=(0.04, 0.1, 0.4, 0.5), certify_seconds=120.0,
)  # fmt: skip

STUDY = Study(
    "compressed-sensing",
    "Compressed sensing",
    {"smoke": SMOKE, "default": SensingSettings(), "full": FULL},
    told,
    run,
)
