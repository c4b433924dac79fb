"""Learned total variation: how fast unrolled networks get to the minimum, what is certified, and a real signal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from firmly.algorithms import Fista, ForwardBackward
from firmly.certificates import Certificate, certify
from firmly.lab.charts import Line, at_least, at_most
from firmly.lab.experiments.tv_problem import Heartbeat, Jumps, heartbeat, iterated, jumps, smallest
from firmly.lab.page import Chart, Page, Section, Table
from firmly.lab.run_folder import RunFolder
from firmly.lab.settings import require
from firmly.lab.study import Listener, Study
from firmly.lab.weights import load_weights, save_weights
from firmly.linear import Cumulative
from firmly.linear.map import LinearMap
from firmly.networks import Unrolled
from firmly.networks.descent import descend
from firmly.networks.learned_tv import JumpL1, first_and_jumps, learned_tv, tv_objective
from firmly.prox import TV1D

NETWORKS = {  # title: variant, nonexpansive
    "LPGD-Taut": ("taut", False),
    "LPGD-Taut, nonexpansive": ("taut", True),
    "LPGD-LISTA": ("lista", False),
    "synthesis LISTA": ("synthesis", False),
    "learned Condat-Vu": ("condat-vu", False),
}


@dataclass(frozen=True)
class TvSettings:
    """Signals of `n` entries seen through `m` measurements, `signals` for training and as many for test; `weight` of
    total variation; networks of `depths` layers, each trained by `steps` steps of descent; `inner_depth` layers stand
    for the prox in LPGD-LISTA. `certified_depth` is the depth at which bounds are computed.

    The electrocardiogram is cut into windows of `window` samples, `windows` of them for training, with noise of
    standard deviation `noise` in millivolts; its networks have `ecg_depth` layers and are trained by `ecg_steps`.
    """

    n: int = 8
    m: int = 5
    weight: float = 0.1
    signals: int = 200
    depths: tuple[int, ...] = (1, 2, 5, 10, 20)
    steps: int = 60
    inner_depth: int = 20
    certified_depth: int = 5
    window: int = 64
    windows: int = 200
    noise: float = 0.05
    ecg_weights: tuple[float, ...] = (0.002, 0.005, 0.01, 0.02, 0.04)
    ecg_depth: int = 5
    ecg_steps: int = 40
    certify_seconds: float = 10.0
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("m", "signals", "steps", "inner_depth", "certified_depth", "windows", "ecg_depth", "ecg_steps"):
            require(getattr(self, name) >= 1, f"{name} is at least 1; given {getattr(self, name)}")
        require(self.n >= 2, f"n is at least 2; given {self.n}")
        require(8 <= self.window <= 512, f"window lies in 8 .. 512; given {self.window}")
        require(bool(self.depths) and min(self.depths) >= 1, f"depths are at least 1; given {self.depths}")
        require(list(self.depths) == sorted(set(self.depths)), f"depths increase; given {self.depths}")
        require(self.certified_depth in self.depths, f"certified_depth is one of depths; given {self.certified_depth}")
        require(self.weight > 0 and self.noise > 0 and self.certify_seconds > 0, "weight, noise, time are positive")
        require(bool(self.ecg_weights) and min(self.ecg_weights) > 0, "ecg_weights are positive")


class Trained(NamedTuple):
    """One network and its mean distance to the minimum on the test signals."""

    net: Unrolled
    gap: float


def run(settings: TvSettings, run_folder: RunFolder, listen: Listener) -> Page:
    problem = jumps(settings.n, settings.m, settings.signals, settings.weight, settings.seed)
    ladder = classical(settings, problem)
    trained: dict[str, dict[int, Trained]] = {title: {} for title in NETWORKS}
    total = len(NETWORKS) * len(settings.depths)
    for title in NETWORKS:
        for depth in settings.depths:
            trained[title][depth] = fit(settings, problem, title, depth, trained[title], run_folder)
            done = sum(map(len, trained.values()))
            listen("work", {"name": "training on jumps", "done": done, "total": total})
    listen("note", {"text": "certifying"})
    chosen = {title: by_depth[settings.certified_depth] for title, by_depth in trained.items()}
    certificates = {t: certify(c.net, budget_s=settings.certify_seconds) for t, c in chosen.items()}
    for title, certificate in certificates.items():
        certificate.save(run_folder / f"certificates/{slug(title)}.safetensors")
    taut, last = trained["LPGD-Taut"], settings.depths[-1]
    middle = settings.certified_depth
    faster = ladder["FISTA, analysis"][middle - 1] / taut[middle].gap
    ratio = (problem.A @ Cumulative(settings.n)).norm().upper ** 2 / problem.A.norm().upper ** 2
    ecg_section, decibels = heart(settings, run_folder, listen)
    return Page(
        f"{middle} learned layers end {faster:.1f} times closer to the minimum than {middle} of FISTA",
        f"Unrolled solvers of 1/2 |Au - y|² + {settings.weight:g} Σ|u[i+1] - u[i]|, trained on that objective itself, "
        "without truth. The prox of total variation is exact in the layers, and so is its derivative.",
        (
            ladder_section(settings, ladder, trained, ratio),
            certificate_section(settings, chosen, certificates),
            ecg_section,
        ),
        {
            f"gap to the minimum, {last} layers": taut[last].gap,
            f"FISTA / LPGD-Taut, {middle} layers": faster,
            "certified bound, nonexpansive layers": at_most(certificates["LPGD-Taut, nonexpansive"].upper),
            "ECG, gain over exact TV (dB)": round(decibels, 2),
        },
    )


# -- jumps through a random matrix ---------------------------------------------------------------------------------


def classical(settings: TvSettings, p: Jumps) -> dict[str, list[float]]:
    """The mean gap after every iteration of four algorithms, from the least-squares signal."""
    start = p.test @ torch.linalg.pinv(p.A.matrix()).mT
    L, last = Cumulative(settings.n), settings.depths[-1]
    in_jumps = first_and_jumps(start)
    found = {
        "PGD, analysis": iterated(ForwardBackward(p.A, TV1D(settings.weight)), p.test, last, start),
        "FISTA, analysis": iterated(Fista(p.A, TV1D(settings.weight)), p.test, last, start),
        "ISTA, synthesis": iterated(ForwardBackward(p.A @ L, JumpL1(settings.weight)), p.test, last, in_jumps),
        "FISTA, synthesis": iterated(Fista(p.A @ L, JumpL1(settings.weight)), p.test, last, in_jumps),
    }
    signals = {name: [L(z) for z in us] if "synthesis" in name else us for name, us in found.items()}
    return {name: [gap(settings, p, u) for u in us] for name, us in signals.items()}


def gap(settings: TvSettings, p: Jumps, u: Tensor) -> float:
    return float((tv_objective(p.A, settings.weight, u, p.test) - p.best_test).mean())


def fit(
    settings: TvSettings, p: Jumps, title: str, depth: int, before: dict[int, Trained], run_folder: RunFolder
) -> Trained:
    """A network of this depth, trained from the one of the depth before it, new layers untrained."""
    variant, nonexpansive = NETWORKS[title]
    net = learned_tv(p.A, depth, variant, settings.weight, settings.inner_depth, nonexpansive)
    path = run_folder / f"weights/{slug(title)}-{depth}.safetensors"
    if before:
        for layer, known in zip(net.layers, before[max(before)].net.layers):
            layer.load_state_dict(known.state_dict())
    description = {"settings": dataclasses.asdict(settings), "variant": variant, "depth": depth}
    train_once(path, net, objective_loss(net, p.A, settings.weight, p.train), settings.steps, description)
    with torch.no_grad():
        return Trained(net, gap(settings, p, net(p.test)))


def train_once(path: Path, net: Unrolled, loss: Callable[[], Tensor], steps: int, description: dict[str, Any]) -> None:
    """Train the network, or take its weights from an interrupted run of the same settings."""
    if path.exists():
        load_weights(path, net)
        return
    descend(net.parameters(), loss, steps)
    save_weights(path, net, description)


def objective_loss(net: Unrolled, A: LinearMap, weight: float, y: Tensor) -> Callable[[], Tensor]:
    return lambda: tv_objective(A, weight, net(y), y).mean()


def slug(title: str) -> str:
    return title.lower().replace(",", "").replace(" ", "-")


def ladder_section(
    settings: TvSettings, ladder: dict[str, list[float]], trained: dict[str, dict[int, Trained]], ratio: float
) -> Section:
    lines = [Line(name, [(k + 1, value) for k, value in enumerate(values)]) for name, values in ladder.items()]
    for title, by_depth in trained.items():
        if title != "LPGD-Taut, nonexpansive":  # it would hide the other
            role = "ours" if title == "LPGD-Taut" else "other"
            lines.append(Line(title, [(k, t.gap) for k, t in by_depth.items()], role))
    rows = [(name, *(values[k - 1] for k in settings.depths)) for name, values in ladder.items()]
    ours = range(len(rows), len(rows) + len(trained))
    rows += [(title, *(by_depth[k].gap for k in settings.depths)) for title, by_depth in trained.items()]
    text = (
        f"Mean of objective minus minimum on {settings.signals} held-out signals of {settings.n} entries seen through "
        f"{settings.m} measurements. The same problem in jump variables is {ratio:.1f} times worse conditioned "
        "(|AL|² / |A|²), which is why the synthesis methods hardly move and the exact prox pays. Every network was "
        f"trained by at most {settings.steps} steps of descent on the objective, started from the network before it."
    )
    columns = ("gap to the minimum", *(f"{k} layer{'s' * (k > 1)}" for k in settings.depths))
    return Section(
        "The ladder",
        text,
        (
            Chart(lines, "layers", "gap to the minimum", "Mean over held-out signals.", log_x=True, log_y=True),
            Table(columns, rows, ours=tuple(ours)),
        ),
    )


def certificate_section(
    settings: TvSettings, chosen: dict[str, Trained], certificates: dict[str, Certificate]
) -> Section:
    rows = []
    for title, (net, distance) in chosen.items():
        c = certificates[title]
        norms = [layer.code.norm().upper for layer in net.layers if hasattr(layer, "code")]
        largest = f"{max(norms):.4f}" if norms else ""
        parameters = sum(q.numel() for q in net.parameters())
        rows.append((title, parameters, distance, largest, at_most(c.upper), at_least(c.lower), c.method))
    columns = ("network", "parameters", "gap to the minimum", "largest |C|", "bound", "attained", "bound by")
    free, held = chosen["LPGD-Taut"].gap, chosen["LPGD-Taut, nonexpansive"].gap
    text = (
        f"Bound of |change of u| / |change of y| for networks of {settings.certified_depth} layers. A layer "
        "u ← prox(C u + E y) is nonexpansive in u if |C| ≤ 1, because the prox of total variation is, whatever its "
        "weight: one multiplier for each signal and layer is enough for a proof. Holding |C| ≤ 1 during training "
        f"costs a factor of {held / free:.2f} in the gap.\n\n"
        "In the jump variables of the synthesis networks a layer may be nonexpansive, but the sum back to the signal "
        f"has norm about 2n/π; the {settings.inner_depth} inner layers of LPGD-LISTA are no proximal map, and its "
        "bound, where it is only a product of norms, says nothing. The steps of learned Condat-Vu stay inside their "
        "rule, so that each of its layers converges to the minimum when it is repeated. No bound says that the "
        "output is near the minimum: the gaps are measured, on signals of this kind only."
    )
    return Section("What is certified, and its price", text, (Table(columns, rows, ours=(1,)),))


# -- the electrocardiogram -----------------------------------------------------------------------------------------


def heart(settings: TvSettings, run_folder: RunFolder, listen: Listener) -> tuple[Section, float]:
    """A real signal: the exact solution against networks trained with and without truth."""
    p = heartbeat(settings.window, settings.windows, settings.noise, settings.seed)
    scores = [(snr(exact(p, weight, p.data), p.truth), weight) for weight in settings.ecg_weights]
    weight = max(scores)[1]
    depth = settings.ecg_depth
    start = p.test_data @ torch.linalg.pinv(p.A.matrix()).mT
    outputs = {
        "least squares": start,
        "total variation, exact": exact(p, weight, p.test_data),
        f"FISTA, {depth} iterations": iterated(Fista(p.A, TV1D(weight)), p.test_data, depth, start)[-1],
    }
    bounds: dict[str, Certificate] = {}
    for done, (title, supervised, held) in enumerate(ECG_NETWORKS):
        net = learned_tv(p.A, depth, "taut", weight, nonexpansive=held)
        loss = truth_loss(net, p) if supervised else objective_loss(net, p.A, weight, p.data)
        path = run_folder / f"weights/ecg-{slug(title)}.safetensors"
        train_once(path, net, loss, settings.ecg_steps, {"weight": weight, "depth": depth})
        with torch.no_grad():
            outputs[title] = net(p.test_data)
        bounds[title] = certify(net, budget_s=settings.certify_seconds)
        listen("work", {"name": "electrocardiogram", "done": done + 1, "total": len(ECG_NETWORKS)})
    best = smallest(p.A, weight, p.test_data)
    rows = []
    for title, u in outputs.items():
        distance = float((tv_objective(p.A, weight, u, p.test_data) - best).mean())
        c = bounds.get(title)
        bound = ("", "") if c is None else (at_most(c.upper), at_least(c.lower))
        rows.append((title, snr(u, p.test_truth), distance, *bound))
    table = Table(
        ("method", "SNR (dB)", "gap to the minimum", "bound", "attained"), rows, ours=(len(rows) - 1,)
    )  # fmt: skip
    gain = rows[-1][1] - rows[1][1]
    text = (
        "Record 208 of the MIT-BIH Arrhythmia Database at 180 Hz, in windows of "
        f"{settings.window} samples. A coarse sensor averages four samples, reports at half the rate, and adds noise "
        f"of {settings.noise:g} mV. The recording itself stands for the truth, its own noise included. The weight of "
        f"total variation, {weight:g}, is the best on the training part; the test part comes after it in time. Trained "
        "with the truth, a few layers may leave the minimum behind: they become a better estimator than total "
        "variation, and no longer its solver."
    )
    chart = Chart(
        [
            Line("recording", series(p.test_truth), "data"),
            Line("total variation", series(outputs["total variation, exact"])),
            Line("learned", series(outputs[ECG_NETWORKS[-1][0]]), "ours"),
        ],
        "sample", "mV", f"The first {4 * settings.window} samples of the test part.",
    )  # fmt: skip
    return Section("A heartbeat from a coarse sensor", text, (table, chart)), gain


ECG_NETWORKS = (  # title, supervised, nonexpansive
    ("learned, no truth", False, False),
    ("learned from truth", True, False),
    ("learned from truth, nonexpansive", True, True),
)


def exact(p: Heartbeat, weight: float, y: Tensor) -> Tensor:
    return iterated(Fista(p.A, TV1D(weight), restart=50), y, 300)[-1]


def truth_loss(net: Unrolled, p: Heartbeat) -> Callable[[], Tensor]:
    return lambda: (net(p.data) - p.truth).square().mean()


def snr(u: Tensor, truth: Tensor) -> float:
    """Signal-to-noise ratio in dB about the mean of each window."""
    varying = truth - truth.mean(-1, keepdim=True)
    return float(10 * torch.log10(varying.square().sum() / (u - truth).square().sum()))


def series(windows: Tensor, count: int = 4) -> list[tuple[float, float]]:
    return [(float(i), float(v)) for i, v in enumerate(windows[:count].flatten())]


DEFAULT = TvSettings()
SMOKE = replace(
    DEFAULT, signals=20, depths=(1, 2), steps=3, inner_depth=2, certified_depth=2, window=16, windows=20,
    ecg_weights=(0.01,), ecg_depth=2, ecg_steps=3, certify_seconds=2.0,
)  # fmt: skip
FULL = replace(DEFAULT, signals=1000, depths=(1, 2, 3, 5, 7, 10, 14, 20, 40), steps=300, ecg_steps=300, windows=1000)

STUDY = Study(
    "tv",
    "Learned total variation",
    {"smoke": SMOKE, "default": DEFAULT, "full": FULL},
    lambda s: f"signals of {s.n} entries from {s.m} measurements, and a coarsely sampled electrocardiogram",
    run,
)
