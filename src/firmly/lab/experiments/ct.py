"""Tomography of a real tooth from few views: learned, certified and classical reconstructions."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from firmly.algorithms import CondatVu, ForwardBackward
from firmly.certificates import Certificate, attack, certify
from firmly.lab.charts import Line, at_least, at_most
from firmly.lab.engine import Device, Engine
from firmly.lab.experiments.ct_problem import Phantoms, Problem, measured, problem, unused_error
from firmly.lab.metrics import psnr, ssim
from firmly.lab.page import Chart, Page, Pictures, Section, Table
from firmly.lab.pictures import png, signed
from firmly.lab.run_folder import RunFolder
from firmly.lab.settings import require
from firmly.lab.study import Listener, Study
from firmly.lab.training import Plan, train
from firmly.lab.weights import save_weights
from firmly.linear import Dense, Gradient, LinearMap
from firmly.networks import unroll
from firmly.prox import Clip, GradientStep, GroupL1, NonNegative, Ridge, dct_filters


@dataclass(frozen=True)
class CtSettings:
    """Images of `size` x `size` pixels from one view in `every`.

    The networks have `depth` layers, the learned denoiser `filters` filters of `filter_size` pixels. `cap` is the
    largest slope of its ridge in the certified network (1: each denoiser is firmly nonexpansive, 2: nonexpansive).
    Total variation with the weights `tv_weights` runs for `tv_iterations`. `attack` is the size of the perturbation of
    the data relative to the noise in it.
    """

    size: int = 96
    every: int = 6
    depth: int = 6
    filters: int = 16
    filter_size: int = 7
    cap: float = 1.0
    batch: int = 4
    epochs: int = 5
    steps: int = 50
    learning_rate: float = 1e-2
    scalar_rate: float = 3.0
    tv_weights: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08)
    tv_iterations: int = 300
    phantoms: int = 8
    attack: float = 1.0
    certify_seconds: float = 40.0
    seed: int = 0
    device: Device = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        require(32 <= self.size <= 192, f"size lies in 32 .. 192; given {self.size}")
        require(1 <= self.every <= 30, f"every lies in 1 .. 30; given {self.every}")
        for name in ("depth", "filters", "batch", "epochs", "steps", "tv_iterations", "phantoms"):
            require(getattr(self, name) >= 1, f"{name} is at least 1; given {getattr(self, name)}")
        require(0 < self.cap <= 2, f"cap is positive and at most 2; given {self.cap}")
        require(self.filter_size >= 2, f"filter_size is at least 2; given {self.filter_size}")
        require(len(self.tv_weights) > 0 and min(self.tv_weights) > 0, "tv_weights are positive numbers")
        require(self.attack > 0 and self.certify_seconds > 0, "attack and certify_seconds are positive")


class Method(NamedTuple):
    """A reconstruction from weighted data; `certificate` in the weighted data where there is one."""

    name: str
    reconstruct: Callable[[Tensor], Tensor]
    parameters: int
    upper: float | None = None
    lower: float | None = None
    how: str = ""


def run(settings: CtSettings, run_folder: RunFolder, listen: Listener) -> Page:
    listen("note", {"text": "building the scanner and proving the norm of its operator"})
    p = problem(settings.size, settings.every)
    bracket = p.B.norm()
    generator = torch.Generator().manual_seed(settings.seed + 1)
    truth = Phantoms(settings.size, "test").batch(settings.phantoms, generator)
    simulated = measured(p.B, truth, p.noise, generator)

    def own() -> LinearMap:
        """The operator for a network, which takes it to its device."""
        return copy.deepcopy(p.B)

    methods = [
        Method("filtered back projection", p.B.T, 0, bracket.upper, bracket.lower, "norm of the linear map"),
        tuned_tv(settings, p, listen),
        learned(settings, p, run_folder, listen, "primal-dual", primal_dual(settings, own())),
        learned(settings, p, run_folder, listen, "certified", forward_backward(settings, own(), settings.cap)),
        learned(settings, p, run_folder, listen, "free", forward_backward(settings, own(), None)),
    ]
    methods, attacks = attacked(settings, p, methods, run_folder)
    with torch.no_grad():
        real = {m.name: m.reconstruct(p.weighted) for m in methods}
        phantom = {m.name: float(psnr(m.reconstruct(simulated), truth).mean()) for m in methods}
    rows = [row(p, m, real[m.name], phantom[m.name]) for m in methods]
    names = [m.name for m in methods]
    ours, free, back = (names.index(n) for n in (CERTIFIED, FREE, "filtered back projection"))
    weight = Dense(p.B.root).norm().upper
    best = methods[ours]
    assert best.upper is not None and best.lower is not None
    return Page(
        f"{rows[ours][3] - rows[back][3]:+.1f} dB over filtered back projection, and no error of the data grows more "
        f"than {at_most(best.upper)}-fold",
        f"Two slices of a real tooth, from {p.B.codomain[1]} of 181 views. Networks were trained on simulated objects "
        "seen by the same scanner and have met neither the tooth nor any other measurement. Filtered back projection "
        "from all 181 views stands for the truth: it has noise and ring artefacts of its own, which no method should "
        "reproduce, and that limits the decibels. The error on the views that were left out needs no truth; by it "
        f"{closest(rows)}.",
        (
            Section(
                "What they reach, and what is proved", BOUNDS.format(weight=at_most(weight)), (table(p, rows, ours),)
            ),
            Section("The tooth", "", tuple(galleries(run_folder, p, real))),
            Section("What is certified, and what is not", certified_text(settings, methods, rows, ours, free)),
            Section("Under attack", ATTACK.format(size=settings.attack), attacks),
            Section("The scanner", scanner_text(settings, p), (training_chart(run_folder),)),
        ),
        {
            "certified bound": at_most(best.upper),
            "attained": at_least(best.lower),
            "PSNR on the tooth (dB)": round(rows[ours][3], 2),
            "views": p.B.codomain[1],
        },
    )


CERTIFIED, FREE, PRIMAL_DUAL, TV = "certified network", "twin without cap", "learned primal-dual", "total variation"
TITLES = {"certified": CERTIFIED, "free": FREE, "primal-dual": PRIMAL_DUAL}

BOUNDS = (
    "The bound is the largest possible |change of the image| / |change of the data|, for the ramp-weighted data that "
    "the networks take; in the sinogram itself it is at most {weight} times as large. Attained is what an explicit "
    "pair of data sets reaches. PSNR and SSIM are against the reconstruction from all views; 'left-out views' is the "
    "relative error of the views that no method was given."
)
ATTACK = (
    "The worst perturbation found of the data of the first slice, whose norm is {size:g} times that of the noise, and "
    "what it does to the image: gray is no change, black and white a change of 0.1 of the range. Pairs of data unlike "
    "any measurement may be worse: they count as attained in the first table."
)


# -- the methods ---------------------------------------------------------------------------------------------------


def total_variation(B: LinearMap, weight: float) -> CondatVu:
    """min 1/2 |B x - y|^2 + weight TV(x) over x >= 0, isotropic."""
    return CondatVu(B, GroupL1(weight), Gradient(B.domain), constraint=NonNegative())


def solved(algorithm: CondatVu, y: Tensor, iterations: int) -> Tensor:
    state = algorithm.start(y)
    for k in range(iterations):
        state = algorithm.step(state, y, k)
    return algorithm.read(state)


@torch.no_grad()
def tuned_tv(settings: CtSettings, p: Problem, listen: Listener) -> Method:
    """Total variation with the weight that is best on simulated objects."""
    generator = torch.Generator().manual_seed(settings.seed + 2)
    truth = Phantoms(settings.size, "validation").batch(4, generator)
    y = measured(p.B, truth, p.noise, generator)
    scores = []
    for done, weight in enumerate(settings.tv_weights, start=1):
        image = solved(total_variation(p.B, weight), y, settings.tv_iterations)
        scores.append((float(psnr(image, truth).mean()), weight))
        listen("work", {"name": "total variation", "done": done, "total": len(settings.tv_weights)})
    best = total_variation(p.B, max(scores)[1])
    return Method(TV, lambda data: solved(best, data, settings.tv_iterations), 1)


def primal_dual(settings: CtSettings, B: LinearMap) -> nn.Module:
    """Unrolled Condat-Vu whose weights of total variation and step sizes are learned, layer by layer."""
    return unroll(total_variation(B, 0.05), settings.depth, learn=("step_size", "dual_step", "prior"))


def forward_backward(settings: CtSettings, B: LinearMap, cap: float | None) -> nn.Module:
    """Unrolled forward-backward on the weighted data, started at filtered back projection, with a learned denoiser."""
    filters = dct_filters(settings.filter_size, settings.filters) / settings.filter_size
    ridge = Ridge(filters, Clip(settings.filters, 1.0), cap=cap, zero_mean=True)
    algorithm = ForwardBackward(B, GradientStep(ridge))
    waived = () if cap is not None and cap <= 1 else ("prior",)
    net = unroll(algorithm, settings.depth, learn=("step_size", "prior"), waive=waived)
    for layer, threshold in zip(net.layers, torch.logspace(-1, -2, settings.depth).tolist()):
        nn.init.constant_(layer.prior.ridge.activation.log_threshold, math.log(threshold))
    return net


def learned(
    settings: CtSettings, p: Problem, run_folder: RunFolder, listen: Listener, name: str, net: nn.Module
) -> Method:
    """The network, trained on simulated objects and certified."""
    phantoms, total = Phantoms(settings.size, "train"), settings.epochs * settings.steps

    def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        image = phantoms.batch(settings.batch, generator)
        return measured(p.B, image, p.noise, generator), image

    plan = Plan(settings.epochs, settings.steps, settings.learning_rate, settings.scalar_rate, seed=settings.seed)
    outcome = train(
        net, sample, plan, run_folder, name, engine=Engine(settings.device),
        callback=lambda event: listen("training", {"name": TITLES[name], "total": total, **event}),
    )  # fmt: skip
    if outcome.status == "interrupted":
        raise KeyboardInterrupt
    net.cpu()
    save_weights(run_folder / f"weights/{name}.safetensors", net, {"settings": dataclasses.asdict(settings)})
    listen("note", {"text": f"certifying: {TITLES[name]}"})
    certificate = certify(net, budget_s=settings.certify_seconds)
    certificate.save(run_folder / f"certificates/{name}.safetensors")
    parameters = sum(q.numel() for q in net.parameters())
    return Method(TITLES[name], net, parameters, certificate.upper, certificate.lower, how(certificate))


def how(certificate: Certificate) -> str:
    return f"{certificate.method}, {certificate.basis.name} basis"


# -- the report ----------------------------------------------------------------------------------------------------


def row(p: Problem, m: Method, image: Tensor, phantom: float) -> tuple:
    score, similarity = float(psnr(image, p.reference).mean()), float(ssim(image, p.reference).mean())
    upper = "none" if m.upper is None else at_most(m.upper)
    lower = "" if m.lower is None else at_least(m.lower)
    return (m.name, m.parameters, phantom, score, similarity, 100 * unused_error(p, image), upper, lower, m.how)


def table(p: Problem, rows: list[tuple], ours: int) -> Table:
    """The methods, and the reference itself on the views that it has seen and they have not."""
    reference = ("all views, filtered back projection", 0, None, None, None, 100 * unused_error(p, p.reference))
    columns = (
        "method", "parameters", "PSNR, simulated (dB)", "PSNR, tooth (dB)", "SSIM, tooth", "left-out views (%)",
        "bound", "attained", "bound by",
    )  # fmt: skip
    return Table(columns, [*rows, (*reference, "", "", "")], ours=(ours,))


def galleries(run_folder: RunFolder, p: Problem, real: dict[str, Tensor]) -> list[Pictures]:
    found = []
    for index in range(len(p.reference)):
        images = {"all 181 views": p.reference, **real}
        items = []
        for number, (name, image) in enumerate(images.items()):
            file = f"slice{index}-{number}.png"
            run_folder.write(f"pictures/{file}", png(enlarged(image[index])))
            items.append((file, name))
        found.append(Pictures(items, f"Slice {index + 1}"))
    return found


def enlarged(image: Tensor, factor: int = 3) -> Tensor:
    """The image (1, height, width) with every pixel repeated."""
    return image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def attacked(
    settings: CtSettings, p: Problem, methods: list[Method], run_folder: RunFolder
) -> tuple[list[Method], tuple[Table, Pictures]]:
    """What the worst perturbation that an ascent finds does to the first slice, next to what is proved.

    Also the methods again: where this perturbation is amplified more than the pair in the certificate, it is what is
    attained.
    """
    y = p.weighted[:1].double()
    generator = torch.Generator().manual_seed(settings.seed)
    white = torch.randn(1, *p.B.codomain, generator=generator, dtype=y.dtype)
    radius = settings.attack * p.noise * float(p.B.weighted(white).norm())
    known, rows, items = [], [], []
    for number, m in enumerate(methods):
        net = m.reconstruct
        if m.upper is None or m.lower is None or not isinstance(net, nn.Module):
            known.append(m)
            continue
        found = attack(net, y, radius)
        known.append(m._replace(lower=max(m.lower, found.ratio * (1 - 1e-9))))
        rows.append((m.name, radius, found.ratio * radius, at_most(m.upper * radius)))
        with torch.no_grad():
            change = net(y + found.perturbation) - net(y)
        run_folder.write(f"pictures/attack{number}.png", png(enlarged(signed(change[0], 0.1))))
        items.append((f"attack{number}.png", m.name))
    columns = ("method", "|change of the data|", "|change of the image| found", "at most")
    pictures = Pictures(items, "Change of the image under the perturbation found.")
    return known, (Table(columns, rows), pictures)


def closest(rows: list[tuple]) -> str:
    """Who is best on the views that were left out, in words."""
    ordered = sorted(rows, key=lambda r: r[5])
    return ", ".join(f"{'the order is ' * (i == 0)}{r[0]} ({r[5]:.1f} %)" for i, r in enumerate(ordered))


def certified_text(settings: CtSettings, methods: list[Method], rows: list[tuple], ours: int, free: int) -> str:
    simulated, real = (rows[free][i] - rows[ours][i] for i in (2, 3))
    attained = at_least(methods[free].lower or 0.0)
    denoiser = "firmly nonexpansive" if settings.cap <= 1 else "nonexpansive"
    return (
        "The certified network is forward-backward splitting with a gradient step on a learned convex ridge in the "
        f"place of the proximal map. The ridge is held at slope {settings.cap:g}, so that each denoiser is {denoiser}, "
        f"and all that remains is one operator and its adjoint: the bound ({methods[ours].how}) is computed on the "
        "singular values of B, or on intervals that cover [0, |B|], and holds for every operator that has them. The "
        f"twin without the cap differs by {simulated:+.2f} dB on simulated objects and {real:+.2f} dB on the "
        f"tooth; of two data sets that are known it amplifies the difference {attained}-fold. That is the price, and "
        "what it buys."
        "\n\nThe learned primal-dual network has two operators that share no basis, the scanner and the image "
        "gradient: its bound is sound, and useless. Total variation run to convergence has no bound of this kind: "
        "where the views determine nothing, its solution may jump with the data. That the training objects resemble "
        "the tooth is not certified, nor is any image correct for being stable."
    )


def scanner_text(settings: CtSettings, p: Problem) -> str:
    return (
        f"Parallel rays, 181 views over half a turn, of which {p.B.codomain[1]} are used; the projections of the file "
        f"are averaged to {settings.size} bins. The axis of rotation stands before detector {p.centre:.2f} of 400, "
        "found from the centres of mass of the views, which follow c + a cos + b sin. The operator is the Radon "
        "transform with each view weighted by the square root of the ramp filter, so that its adjoint is filtered back "
        f"projection; its norm is proved to lie in [{p.B.norm().lower:.5f}, {p.B.norm().upper:.5f}] by a Cholesky "
        f"factorisation. Noise in training has the standard deviation {p.noise:.3g} of the real data in air. Training "
        "objects are random ellipses with the texture of photographs."
    )


def training_chart(run_folder: RunFolder) -> Chart:
    lines = []
    for name, title in TITLES.items():
        points = [(e["epoch"] + 1, -10 * math.log10(e["loss"])) for e in run_folder.metrics("epoch", network=name)]
        lines.append(Line(title, points, "ours" if name == "certified" else "other"))
    return Chart(lines, "epoch", "PSNR in training (dB)", "Training on simulated objects.", dots=True)


DEFAULT = CtSettings()
SMOKE = replace(
    DEFAULT, size=32, every=12, depth=2, filters=4, filter_size=3, batch=2, epochs=2, steps=3, tv_weights=(0.04,),
    tv_iterations=20, phantoms=2, certify_seconds=4.0,
)  # fmt: skip
FULL = replace(DEFAULT, size=128, depth=10, filters=32, batch=8, epochs=20, steps=150)

STUDY = Study(
    "ct",
    "Tomography of a tooth from few views",
    {"smoke": SMOKE, "default": DEFAULT, "full": FULL},
    lambda s: f"a real sinogram of which one view in {s.every} is used, at {s.size} x {s.size} pixels",
    run,
)
